"""What torch knows of the kernels of block_choice: opaque ops, of which nothing has a gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from heddle.kernels._block_choice_launch import launch, launch_marks, launch_shares
from heddle.kernels.op import register

_NUMBERS = "int block, int blocks, int count, int sink, int recent, int dense_length"
_INPUTS = f"Tensor q, Tensor means, Tensor start, Tensor? held, float scale, bool kernels, {_NUMBERS}"


def _like(q: Tensor, means: Tensor, *rest: Any) -> Tensor:
    block, blocks, count, _, _, dense_length = rest[4:]
    length = min(blocks, max(count, -(-dense_length // block)))
    return q.new_empty(q.shape[0], means.shape[1], q.shape[2], length, dtype=torch.int32)


kernels = register("block_choice_kernels", f"({_INPUTS}) -> Tensor", launch, fake=_like)
marks = register(
    "block_choice_marks",
    f"(Tensor worth, Tensor start, bool pooled, {_NUMBERS}) -> Tensor",
    launch_marks,
    fake=lambda worth, start, pooled, block, blocks, *rest: worth.new_empty(  # noqa: ARG005
        *worth.shape[:3], blocks, dtype=torch.bool
    ),
)
shares = register(
    "block_choice_shares",
    "(Tensor q, Tensor means, Tensor start, Tensor? held, float scale, int block) -> Tensor",
    launch_shares,
    fake=lambda q, means, *rest: q.new_empty(  # noqa: ARG005
        q.shape[0], means.shape[1], q.shape[2], means.shape[2], dtype=torch.float32
    ),
)
