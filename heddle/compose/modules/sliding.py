"""Causal attention to the keys of a window by kernels of its own, where they run unasked."""

from __future__ import annotations

import torch
from torch import Tensor

from heddle.compose.cache import Call
from heddle.compose.modules.masks import View
from heddle.kernels.sliding_window_attention import sliding_window_attention


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def has_kernels(device: torch.device, dtype: torch.dtype, size: int, group: int) -> bool:
    """Whether they take heads of this size, so many of them to a key head. A compiler takes the answer as it is."""
    return sliding_window_attention.path(device, dtype, K=size, V=size, G=group) == "triton"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _runs_kernels(device: torch.device, dtype: torch.dtype, size: int, group: int) -> bool:
    """`has_kernels`, asked where the work is about to be done: that they do not run on a GPU is told."""
    return sliding_window_attention.told_path(device, dtype, K=size, V=size, G=group) == "triton"


def slides(q: Tensor, keys: tuple[Tensor, Tensor, Tensor | None], view: View) -> bool:
    """Whether `attend_sliding` is the better way: there is a window to be cut out of the keys, and kernels that do.

    Where memory is written in parts masks have gradients, which the kernels do not make.
    """
    k, _, written = keys
    if view.window is None or not view.causal or written is not None:
        return False
    # One query needs no mask: its cache holds no more than its window.
    if q.shape[2] == 1 or k.shape[2] <= view.window:
        return False
    found: bool = _runs_kernels(q.device, q.dtype, q.shape[3], q.shape[1] // k.shape[1])
    return found


def attend_sliding(
    q: Tensor, keys: tuple[Tensor, Tensor, Tensor | None], call: Call, view: View, scale: float | None = None
) -> Tensor:
    """What `attend_in_view` gives with softmax attention.  Shapes:  as there"""
    assert view.window is not None
    k, v, _ = keys
    real = None if call.key_padding is None else call.key_padding[:, -k.shape[2] :] > 0
    return sliding_window_attention(
        q, k, v, window=view.window, real=real, cu_seqlens=call.cu_seqlens, scale=scale
    )
