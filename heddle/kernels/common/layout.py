"""Head sizes, strides and pointers as kernels want them: multiples of ALIGNMENT, or made so."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

# Triton then loads 16 bytes at a time, and ahead. Where it cannot, ptxas 12.8 gets kernels wrong:
# docs/decisions/0005-ragged-heads.md.
ALIGNMENT = 16


def block(size: int) -> int:
    """The tile that holds `size` rows or columns."""
    # Products want at least 16 rows and columns.
    return max(16, 1 << (size - 1).bit_length())


def aligned(x: Tensor) -> Tensor:
    """The same with all strides and the beginning multiples of ALIGNMENT, as a copy if need be."""
    *outer, last = x.stride()
    if last == 1 and not any(stride % ALIGNMENT for stride in outer) and x.data_ptr() % ALIGNMENT == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def padded(x: Tensor, *axes: int) -> Tensor:
    """Zeros after the last `axes`, up to a multiple of ALIGNMENT each."""
    spare = [(-x.shape[axis]) % ALIGNMENT for axis in axes]
    return pad(x, [length for extra in spare for length in (0, extra)]) if any(spare) else x


def dense_state(state: Tensor | None) -> Tensor | None:
    """A given state as kernels read it: float32, dense."""
    return None if state is None else state.to(torch.float32).contiguous()
