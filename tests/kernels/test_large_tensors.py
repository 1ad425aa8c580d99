"""Tensors of more than 2³¹ elements: what the last tokens of one give is what they give alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from heddle.kernels import OPS, Op
from heddle.kernels.accuracy import EPSILON, draw, worst_error
from heddle.kernels.op import watch_paths

AnyOp = Op[..., Any]
# 257 rows of 2²³ elements: the last one begins at element 2³¹.
SIZES = {"H": 16, "HV": 16, "K": 128, "V": 128, "C": 2048, "W": 4}
ROWS, LENGTH = 257, 4096
# Two chunks and a part of one.
COMPARED = 130


@pytest.fixture
def empty_gpu() -> Iterator[None]:
    torch.cuda.empty_cache()
    yield
    torch.cuda.empty_cache()


def _assert_right(op: AnyOp, found: Tensor, alone: Mapping[str, Tensor]) -> None:
    """`found` is as near to the reference as what the op itself gives for these tokens."""
    exact, _ = op.reference(**{name: x.double().cpu() for name, x in alone.items()})
    error, worst = worst_error(found, exact, timed=True)
    allowed, _ = worst_error(op(**alone)[0], exact, timed=True)
    assert error <= 2 * allowed + EPSILON[found.dtype], f"{error:.2e} and alone {allowed:.2e}, {worst}"


def check_last_tokens(op: AnyOp, rows: int, length: int, device: str) -> None:
    """Many equal rows and a last one of its own: its first tokens, and as packed sequences its last tokens."""
    shape = {**SIZES, "B": 1, "T": length}
    many, last = (
        draw(op, shape, torch.bfloat16, seed=seed, initial_state=False, device=device).arguments
        for seed in (0, 1)
    )
    given = {
        name: torch.cat((many[name].expand(rows - 1, *x.shape[1:]), x)) if name in op.cases.sequence else x
        for name, x in last.items()
    }
    _assert_right(op, op(**given)[0][-1:, :COMPARED], _tokens(op, last, slice(COMPARED)))
    packed = {name: x.flatten(0, 1)[None] if name in op.cases.sequence else x for name, x in given.items()}
    tokens = rows * length
    ends = torch.tensor([0, tokens - COMPARED, tokens], dtype=torch.int32, device=device)
    found, _ = op(**packed, cu_seqlens=ends)
    _assert_right(op, found[:, -COMPARED:], _tokens(op, last, slice(-COMPARED, None)))


def _tokens(op: AnyOp, given: Mapping[str, Tensor], which: slice) -> dict[str, Tensor]:
    return {name: x[:, which] if name in op.cases.sequence else x for name, x in given.items()}


@pytest.mark.gpu
@pytest.mark.usefixtures("empty_gpu", "kernels_on_gpu")
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_the_last_tokens_of_a_large_tensor_are_right(op: AnyOp) -> None:
    assert ROWS * LENGTH * SIZES["C"] > 2**31
    with torch.no_grad(), watch_paths() as seen:
        check_last_tokens(op, ROWS, LENGTH, "cuda")
    assert {path for _, path in seen} == {"triton"}


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_a_small_one_is_compared_alike(op: AnyOp, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in {"H": 2, "HV": 2, "K": 16, "V": 16, "C": 8}.items():
        monkeypatch.setitem(SIZES, name, size)
    with torch.no_grad():
        check_last_tokens(op, 3, 160, "cpu")
