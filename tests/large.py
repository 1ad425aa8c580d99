"""Arguments of more than 2³¹ elements: many equal rows and a last one of its own. For tests on a GPU, and small ones anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from heddle.kernels import OPS, Op, taylor_attention
from heddle.kernels.accuracy import draw
from heddle.kernels.dynamic_conv import dynamic_conv
from heddle.kernels.gated_delta_layer import gated_delta_layer_step
from heddle.kernels.local_linear_attention import local_linear_attention
from heddle.kernels.rat_attention import rat_attention
from heddle.kernels.rat_scan import rat_scan
from heddle.kernels.rms_norm import rms_norm

AnyOp = Op[..., Any]
Arguments = dict[str, Tensor]
# 257 rows of 2²³ elements: the last one begins at element 2³¹.
SIZES = {"H": 16, "HV": 16, "K": 128, "V": 128, "C": 2048, "W": 4}
ROWS, LENGTH = 257, 4096
# Two chunks and a part of one.
COMPARED = 130


@dataclass(frozen=True, slots=True)
class Other:
    """An op with a call of its own: arguments that have rows, those that are others once more, results that are compared.

    `time`: the axis of tokens of what has rows and such an axis, which what is `untimed` has not.
    """

    op: AnyOp
    rows: tuple[str, ...]
    same: Mapping[str, str]
    compared: tuple[int, ...] = (0,)
    time: int | None = 1
    untimed: tuple[str, ...] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)


# Two groups, chunks of 16 tokens.
MORE_SIZES = {"G": 2, "chunk": 16, "N": 16}
# A state of 2¹⁸ elements.
STEP_ROWS = 8193
OTHERS = (
    Other(rat_scan, ("q", "k", "x", "gate"), {"gate": "x"}, (1, 2)),
    Other(
        rat_attention, ("q", "key", "value", "keys", "values"), {"value": "key"}, untimed=("keys", "values")
    ),
    Other(local_linear_attention, ("q", "k", "v"), {"q": "k", "v": "k"}, time=2),
    Other(rms_norm, ("x", "gate"), {"gate": "x"}),
    Other(dynamic_conv, ("x", "weight"), {}),
    # Queries of few dimensions.
    Other(taylor_attention, ("q", "k", "v"), {"q": "k"}, sizes={"K": 16}),
    Other(gated_delta_layer_step, ("qkv", "z", "a", "b", "state", "conv_state"), {}, (0, 1), None),
)
PACKED = (rat_scan, rat_attention)
# Those that queries, keys and values may be one tensor of.
ALIKE = tuple(op for op in OPS if op not in [other.op for other in OTHERS])


def drawn(
    other: Other, rows: int, length: int, device: str
) -> tuple[Arguments, Arguments, Arguments, dict[str, Any]]:
    """A row, another one, the first many times and then the other, and the numbers that all are called with."""
    op, shape = other.op, {**SIZES, **MORE_SIZES, **other.sizes, "B": 1, "T": length, "S": length}
    many, last = (
        draw(op, shape, torch.bfloat16, seed=seed, initial_state=other.time is None, device=device).arguments
        for seed in (0, 1)
    )
    for each in (many, last):
        each |= {name: each[like] for name, like in other.same.items()}
        if other.time is None:
            each["state"] = each.pop("initial_state")
    given = {
        name: torch.cat((many[name].expand(rows - 1, *x.shape[1:]), x))
        if name in other.rows and name not in other.same
        else x
        for name, x in last.items()
    }
    # What no row has of its own is that of all.
    many |= {name: x for name, x in last.items() if name not in other.rows}
    given |= {name: given[like] for name, like in other.same.items()}
    return many, last, given, op.cases.numbers(shape)


def cut(other: Other, given: Mapping[str, Tensor], which: slice) -> Arguments:
    """These tokens of a row."""
    if other.time is None:
        return dict(given)
    at = (slice(None),) * other.time + (which,)
    return {
        name: x[at] if name in other.rows and name not in other.untimed else x for name, x in given.items()
    }


def last_tokens(other: Other, row: Mapping[str, Tensor], length: int) -> Arguments:
    """The last tokens of a row, and the chunks that begin among them."""
    first = -(-(length - COMPARED) // MORE_SIZES["chunk"])
    chunks = {name: row[name][:, :, first:] for name in other.untimed}
    return {**cut(other, row, slice(length - COMPARED, None)), **chunks}


def in_a_row(other: Other, given: Mapping[str, Tensor]) -> Arguments:
    """All rows one after the other."""

    def flat(name: str, x: Tensor) -> Tensor:
        if name in other.untimed:
            return x.transpose(0, 1).flatten(1, 2)[None]
        return x.flatten(0, 1)[None] if name in other.rows else x

    return {name: flat(name, x) for name, x in given.items()}
