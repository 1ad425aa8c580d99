"""Causal attention to the keys of a window, or to all without a large mask, by kernels of its own where they run unasked."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from heddle.compose.cache import Call
from heddle.compose.modules.in_view import makes_large_mask
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


def slides(q: Tensor, keys: tuple[Tensor, Tensor, Tensor | None], view: View, call: Call) -> bool:
    """Whether `attend_sliding` is the better way: kernels run, and a window is to be cut out of the keys or a large mask spared.

    Where memory is written in parts masks have gradients, which the kernels do not make. Behind padding sinks are not the first
    keys; the kernels are told of them for the rows of a whole call alone.
    """
    (k, _, written), queries = keys, q.shape[2]
    # One query needs no mask: its cache holds no more than is in view.
    if not view.causal or written is not None or queries == 1:
        return False
    if view.sinks and call.key_padding is not None and queries < k.shape[2]:
        return False
    how = (q.device, q.dtype, q.shape[3], q.shape[1] // k.shape[1])
    if view.sees_all(k.shape[2]):
        return makes_large_mask(call, queries, k.shape[2]) and has_kernels(*how)
    found: bool = _runs_kernels(*how)
    return found


def attend_sliding(
    q: Tensor, keys: tuple[Tensor, Tensor, Tensor | None], call: Call, view: View, scale: float | None = None
) -> Tensor:
    """What `attend_in_view` gives with softmax attention.  Shapes:  as there"""
    k, v, _ = keys
    window = k.shape[2] if view.window is None else view.window
    if view.sinks and call.key_padding is not None:
        return _in_rows(q, (k, v), call.key_padding, view, scale)
    real = None if call.key_padding is None else call.key_padding[:, -k.shape[2] :] > 0
    return sliding_window_attention(
        q, k, v, window=window, sinks=view.sinks, real=real, cu_seqlens=call.cu_seqlens, scale=scale
    )


def _in_rows(
    q: Tensor, keys: tuple[Tensor, Tensor], padding: Tensor, view: View, scale: float | None
) -> Tensor:
    """All rows as packed sequences, each from its first real token on: its own first keys are its sinks.

    Shapes:  q, keys: as of `attend_sliding`, S = T;  padding: [B, T] bool
    """
    assert view.window is not None
    B, T = padding.shape
    # Views, where projections have made them: time stands before heads in memory.
    q, k, v = (x.transpose(1, 2).reshape(1, B * T, x.shape[1], -1).transpose(1, 2) for x in (q, *keys))
    start = torch.arange(0, B * T, T, device=q.device)
    first = start + padding.to(torch.uint8).argmax(dim=1)
    ends = F.pad(torch.stack((start, first), dim=1).flatten(), (0, 1), value=B * T)
    real = padding.reshape(1, B * T)
    o = sliding_window_attention(
        q, k, v, window=view.window, sinks=view.sinks, real=real, cu_seqlens=ends, scale=scale
    )
    return o.transpose(1, 2).reshape(B, T, o.shape[1], -1).transpose(1, 2)
