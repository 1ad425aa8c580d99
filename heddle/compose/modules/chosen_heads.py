"""Causal attention in the heads that a router chose by kernels of its own, where they run unasked."""

from __future__ import annotations

import torch
from torch import Tensor

from heddle.compose.cache import Call
from heddle.compose.modules.masks import View, real_keys
from heddle.kernels.head_sparse_attention import head_sparse_attention


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def has_routed_kernels(device: torch.device, dtype: torch.dtype, size: int, group: int) -> bool:
    """Whether they take heads of this size, so many of them to a key head. A compiler takes the answer as it is."""
    return head_sparse_attention.path(device, dtype, K=size, V=size, G=group) == "triton"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _runs_kernels(device: torch.device, dtype: torch.dtype, size: int, group: int) -> bool:
    """`has_routed_kernels`, asked where the work is about to be done: that they do not run on a GPU is told."""
    return head_sparse_attention.told_path(device, dtype, K=size, V=size, G=group) == "triton"


def skips(q: Tensor, keys: tuple[Tensor, Tensor, Tensor | None], view: View) -> bool:
    """Whether `attend_chosen` is the better way where heads may be left out: keys are all those before, and there are kernels.

    Where memory is written in parts masks have gradients, which the kernels do not make.
    """
    k, _, written = keys
    if not view.causal or written is not None or not view.sees_all(k.shape[2]):
        return False
    found: bool = _runs_kernels(q.device, q.dtype, q.shape[3], q.shape[1] // k.shape[1])
    return found


def attend_chosen(
    q: Tensor, keys: tuple[Tensor, Tensor, Tensor | None], call: Call, view: View, scale: float | None = None
) -> Tensor:
    """What `attend_in_view` gives with softmax attention, times the factors of heads.  Shapes:  as there"""
    assert call.head_gates is not None
    k, v, _ = keys
    known = real_keys(call, k.shape[2], view.sinks)
    real = None if known is None else known[:, 0, 0] > 0
    return head_sparse_attention(q, k, v, call.head_gates, real=real, cu_seqlens=call.cu_seqlens, scale=scale)
