"""What torch knows of the kernels of block_choice: an opaque op, of which nothing has a gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from heddle.kernels._block_choice_launch import launch
from heddle.kernels.op import register

_NUMBERS = "int block, int blocks, int count, int sink, int recent, int dense_length"
_INPUTS = f"Tensor q, Tensor means, Tensor start, Tensor? held, float scale, bool kernels, {_NUMBERS}"


def _like(q: Tensor, means: Tensor, *rest: Any) -> Tensor:
    block, blocks, count, _, _, dense_length = rest[4:]
    length = min(blocks, max(count, -(-dense_length // block)))
    return q.new_empty(q.shape[0], means.shape[1], q.shape[2], length, dtype=torch.int32)


kernels = register("block_choice_kernels", f"({_INPUTS}) -> Tensor", launch, fake=_like)
