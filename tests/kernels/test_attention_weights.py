"""What every softmax attention keeps, over its ops: weights that sum to one, and no bit of what later tokens say.

On a CPU the paths in plain torch run, with TRITON_INTERPRET=1 (see test_interpreter.py) the kernels, interpreted; on a GPU
the real ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from held import assert_held, by_columns, over_settings
from torch import Tensor

from heddle.compose.modules.clusters import Members
from heddle.kernels.accuracy import EPSILON
from heddle.kernels.block_attention import block_attention
from heddle.kernels.dense_attention import dense_attention
from heddle.kernels.grid_window_attention import grid_window_attention
from heddle.kernels.head_sparse_attention import head_sparse_attention
from heddle.kernels.landmark_attention import landmark_attention
from heddle.kernels.member_attention import member_attention
from heddle.kernels.op import INTERPRETED
from heddle.kernels.rat_attention import rat_attention
from heddle.kernels.sliding_window_attention import sliding_window_attention
from heddle.kernels.span_attention import TILE, span_attention

pytestmark = pytest.mark.usefixtures("kernels_on_gpu")

B, H, N, T, SIZE = 2, 4, 2, 70, 16
BLOCK, BLOCKS = 16, 5
Given = dict[str, Any]


def drawn(heads: int = N, **more: tuple[int, ...]) -> Given:
    """Queries, keys and values, and what else there is by its shape, in float64."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"q": (B, H, T, SIZE), "k": (B, heads, T, SIZE), "v": (B, heads, T, SIZE), **more}
    return {
        name: torch.randn(*shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()
    }


def marked(*shape: int, share: float = 0.6) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(5)) < share


def blocks(form: str) -> Given:
    """Keys of which some are padding and some not written, in blocks that are chosen in one of three ways."""
    chosen = marked(B, N, T, BLOCKS)
    how = {
        "chosen": chosen,
        "listed": torch.where(chosen, torch.arange(BLOCKS), -1),
        "gates": marked(B, N, BLOCKS).double(),
    }
    limits = {"real": marked(B, T, share=0.9), "written": marked(B, T, share=0.9).double()}
    return {**drawn(), **limits, form: how[form], "block": BLOCK, "start": torch.zeros(B, dtype=torch.int64)}


def landmarks() -> Given:
    place = {"block": BLOCK, "start": torch.zeros(B, dtype=torch.int64)}
    return {**drawn(landmarks=(B, N, BLOCKS, SIZE)), **place, "top": 2, "real": marked(B, T, share=0.9)}


def heads() -> Given:
    weights = torch.rand(B, T, H, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 0.5
    return {**drawn(), "weights": weights * marked(B, T, H), "real": marked(B, T, share=0.9)}


def spans() -> Given:
    """Clusters, of some of which a query sees no member."""
    z = torch.randint(3, (B, H, T), generator=torch.Generator().manual_seed(5))
    members = Members(z, marked(B, H, T), 3, tile=TILE)
    first, last, queries = members.spans(z, 9)
    given = {"order": members.order, "first": first, "last": last, "queries": queries, "width": 9}
    return {**drawn(H, own=(B, H, T, SIZE)), **given}


def lists() -> Given:
    index = torch.where(marked(B, H, T, 9), torch.randint(T, (B, H, T, 9)), -1)
    return {**drawn(H, own=(B, H, T, SIZE)), "index": index}


def summaries() -> Given:
    """Of chunks of 7 tokens, with time before heads."""
    rows, sums = (B, T, H, SIZE), (B, H, 10, SIZE)
    given = drawn(q=(B, T, N, SIZE), key=rows, value=rows, keys=sums, values=sums)
    return {name: x for name, x in given.items() if name not in ("k", "v")} | {"chunk": 7}


CASES: dict[str, tuple[Callable[..., Tensor], Callable[[], Given]]] = {
    "dense": (dense_attention, lambda: {**drawn(), "is_causal": True}),
    "window": (sliding_window_attention, lambda: {**drawn(), "window": 9, "real": marked(B, T, share=0.9)}),
    "sinks": (sliding_window_attention, lambda: {**drawn(), "window": 9, "sinks": 3}),
    "chosen blocks": (block_attention, lambda: blocks("chosen")),
    "listed blocks": (block_attention, lambda: blocks("listed")),
    "gated blocks": (block_attention, lambda: blocks("gates")),
    "landmarks": (landmark_attention, landmarks),
    "heads": (head_sparse_attention, heads),
    "spans": (span_attention, spans),
    "lists": (member_attention, lists),
    "grid": (
        grid_window_attention,
        lambda: {**drawn(), "width": 9, "row_window": 2, "column_window": 3, "boundary": "inward"},
    ),
    "summaries": (rat_attention, summaries),
}
# These have no kernels of their own.
PLAIN = (dense_attention, member_attention)


def at(given: Given, dtype: torch.dtype, device: str) -> Given:
    def one(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.to(device, dtype) if x.is_floating_point() else x.to(device)

    return {name: one(x) for name, x in given.items()}


@over_settings
@pytest.mark.parametrize("name", CASES)
def test_weights_of_a_query_sum_to_one(name: str, device: str, dtype: torch.dtype) -> None:
    op, made = CASES[name]
    given = made()
    for side in ("v", "own", "value", "values", "weights"):
        if side in given:
            given[side] = torch.ones_like(given[side])
    given = at(given, dtype, device)
    if op in PLAIN:
        # A weight is rounded, and so is what they sum to.
        assert (op(**given) - 1).abs().max() <= torch.finfo(dtype).eps + EPSILON[torch.float32]
        return
    exact = {"out": torch.ones(B, T, H, SIZE, dtype=torch.float64)}

    def run() -> dict[str, Tensor]:
        out = op(**given)
        return {"out": out if op is rat_attention else out.transpose(1, 2)}

    assert_held(exact, run, dtype, device)


@over_settings
# Of spans and lists the caller says what is earlier, tests/kernels/test_span_attention.py has the clusters; a grid looks ahead.
@pytest.mark.parametrize("name", [name for name in CASES if name not in ("spans", "lists", "grid")])
@torch.no_grad()
def test_what_later_tokens_say_changes_no_bit(
    name: str, device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if INTERPRETED:
        monkeypatch.setattr(numpy, "matmul", by_columns)
    (op, made), t = CASES[name], 50
    before, after = made(), made()
    time = 1 if op is rat_attention else 2
    for side in ("q", "k", "v", "key", "value"):
        if side in after:
            after[side].narrow(time, t, T - t).mul_(-1.5)
    # Token 50 stands in chunk 7, and in block 3.
    for side, axis, first in (("keys", 2, 7), ("values", 2, 7), ("landmarks", 2, 3), ("weights", 1, t)):
        if side in after:
            after[side].narrow(axis, first, after[side].shape[axis] - first).mul_(-1.5)
    for side, axis, first, other in (
        ("chosen", 2, t, True), ("listed", 2, t, -1), ("gates", 2, 3, 1.0), ("real", 1, t, True), ("written", 1, t, 1.0)
    ):  # fmt: skip
        if side in after:
            after[side].narrow(axis, first, after[side].shape[axis] - first).fill_(other)
    outs = [op(**at(given, dtype, device)) for given in (before, after)]
    early, late = zip(*(out.split((t, T - t), dim=time) for out in outs), strict=True)
    assert torch.equal(*early)
    assert not torch.equal(*late)
