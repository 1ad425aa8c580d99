"""Head sizes, strides and pointers as kernels want them: multiples of ALIGNMENT, or made so."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from heddle.kernels.common.replay import derived

# Triton then loads 16 bytes at a time, and ahead. Where it cannot, ptxas 12.8 gets kernels wrong:
# docs/decisions/0005-ragged-heads.md.
ALIGNMENT = 16
# Narrower tiles beside wide ones are two layouts of one address, which ptxas 12.8 gets wrong as well.
LEAST_HEAD = 64


def block(size: int) -> int:
    """The tile that holds `size` rows or columns."""
    # Products want at least 16 rows and columns.
    return max(16, 1 << (size - 1).bit_length())


def aligned(x: Tensor) -> Tensor:
    """The same with all strides and the beginning multiples of ALIGNMENT, as a copy if need be."""
    *outer, last = x.stride()
    if last == 1 and not any(stride % ALIGNMENT for stride in outer) and x.data_ptr() % ALIGNMENT == 0:
        return x
    return derived(_dense_copy, x)


def dense(x: Tensor) -> Tensor:
    """The same without gaps, as a copy if need be."""
    return x if x.is_contiguous() else derived(_dense_copy, x)


def padded(x: Tensor, *axes: int) -> Tensor:
    """Zeros after the last `axes`, up to a multiple of ALIGNMENT each."""
    spare = [(-x.shape[axis]) % ALIGNMENT for axis in axes]
    return pad(x, [length for extra in spare for length in (0, extra)]) if any(spare) else x


def dense_state(state: Tensor | None) -> Tensor | None:
    """A given state as kernels read it: float32, dense."""
    return None if state is None else derived(_dense_float, state)


def turned_state(state: Tensor | None) -> Tensor | None:
    """A given state with K and V exchanged, float32, dense."""
    return None if state is None else derived(_turned_float, state)


def _dense_copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _dense_float(x: Tensor) -> Tensor:
    return x.to(torch.float32).contiguous()


def _turned_float(x: Tensor) -> Tensor:
    return x.mT.to(torch.float32).contiguous()


def infinite(x: Tensor) -> Tensor:
    """As large, all infinite."""
    return torch.full_like(x, torch.inf)


def strides(*tensors: Tensor) -> list[int]:
    """The strides of the first three axes of each, as kernels are told them."""
    return [stride for x in tensors for stride in x.stride()[:3]]


def room(size: int, device: torch.device, least: int = LEAST_HEAD) -> int:
    """A head size as kernels with tiles of keys and of values take it: a multiple of ALIGNMENT, on a GPU at least `least`."""
    return max(size + -size % ALIGNMENT, least if device.type == "cuda" else 0)


def wider(x: Tensor, size: int) -> Tensor:
    """The same with a last axis of `size`, zeros behind what is there."""
    return pad(x, (0, size - x.shape[-1])) if size > x.shape[-1] else x


def narrower(x: Tensor, size: int) -> Tensor:
    """The first `size` of the last axis, in memory with time before heads."""
    return x if size == x.shape[-1] else x.transpose(1, 2)[..., :size].contiguous().transpose(1, 2)


def with_room(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    states: Sequence[Tensor | None],
    *,
    least: int = LEAST_HEAD,
) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor | None]] | None:
    """Inputs with zeros after K and V, which change nothing, as `room` says; None if there is room already.

    Shapes:  keys: [B, T, *, K];  values: [B, T, *, V];  states: [N, *, K, V]
    """
    K, V = keys[0].shape[3], values[0].shape[3]
    more_k, more_v = (room(size, keys[0].device, least) - size for size in (K, V))
    if not more_k and not more_v:
        return None
    wider = [None if x is None else pad(x, (0, more_v, 0, more_k)) for x in states]
    return [pad(x, (0, more_k)) for x in keys], [pad(x, (0, more_v)) for x in values], wider
