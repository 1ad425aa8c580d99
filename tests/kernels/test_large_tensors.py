"""Tensors of more than 2³¹ elements: what the last tokens of one give is what they give alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from large import (
    ALIKE,
    COMPARED,
    LENGTH,
    MORE_SIZES,
    OTHERS,
    PACKED,
    ROWS,
    SIZES,
    STEP_ROWS,
    AnyOp,
    Other,
    cut,
    drawn,
    in_a_row,
    last_tokens,
)
from torch import Tensor

from heddle.kernels.accuracy import EPSILON, draw, worst_error
from heddle.kernels.op import watch_paths

over_others = pytest.mark.parametrize("other", OTHERS, ids=lambda other: other.op.name)


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
        if name not in ("q", "v")
    }
    if "k" in given:
        # Memory for three of them is not needed.
        last |= {"q": last["k"], "v": last["k"]}
        given |= {"q": given["k"], "v": given["k"]}
    _assert_right(op, op(**given)[0][-1:, :COMPARED], _tokens(op, last, slice(COMPARED)))
    packed = {name: x.flatten(0, 1)[None] if name in op.cases.sequence else x for name, x in given.items()}
    tokens = rows * length
    ends = torch.tensor([0, tokens - COMPARED, tokens], dtype=torch.int32, device=device)
    found, _ = op(**packed, cu_seqlens=ends)
    _assert_right(op, found[:, -COMPARED:], _tokens(op, last, slice(-COMPARED, None)))


def _tokens(op: AnyOp, given: Mapping[str, Tensor], which: slice) -> dict[str, Tensor]:
    return {name: x[:, which] if name in op.cases.sequence else x for name, x in given.items()}


@pytest.mark.gpu
@pytest.mark.usefixtures("one_at_a_time", "kernels_on_gpu")
@pytest.mark.parametrize("op", ALIKE, ids=lambda op: op.name)
def test_the_last_tokens_of_a_large_tensor_are_right(op: AnyOp) -> None:
    assert ROWS * LENGTH * SIZES["C"] > 2**31
    with torch.no_grad(), watch_paths() as seen:
        check_last_tokens(op, ROWS, LENGTH, "cuda")
    assert {path for _, path in seen} == {"triton"}


@pytest.mark.parametrize("op", ALIKE, ids=lambda op: op.name)
def test_a_small_one_is_compared_alike(op: AnyOp, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in {"H": 2, "HV": 2, "K": 16, "V": 16, "C": 8}.items():
        monkeypatch.setitem(SIZES, name, size)
    with torch.no_grad():
        check_last_tokens(op, 3, 160, "cpu")


def check_last_row(other: Other, rows: int, length: int, device: str) -> None:
    """Many equal rows and a last one of its own: its first tokens; where sequences may be packed, its last ones too."""
    op, (_, last, given, numbers) = other.op, drawn(other, rows, length, device)
    found = [x[-1:] if other.time is None else x[-1:, :COMPARED] for x in _results(other, given, numbers)]
    _assert_row_right(other, found, cut(other, last, slice(COMPARED)), numbers)
    if op in PACKED:
        tokens = rows * length
        packed = in_a_row(other, given)
        ends = torch.tensor([*range(0, tokens, length), tokens - COMPARED, tokens], device=device)
        found = [x[:, -COMPARED:] for x in _results(other, packed, {**numbers, "cu_seqlens": ends})]
        alone = last_tokens(other, last, length)
        _assert_row_right(other, found, alone, numbers)


def _results(other: Other, given: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> list[Tensor]:
    """What is compared, tokens before heads."""
    found = other.op(**given, **numbers)
    chosen = [found] if isinstance(found, Tensor) else [found[index] for index in other.compared]
    return [x.transpose(1, 2) if other.time == 2 else x for x in chosen]


def _assert_row_right(
    other: Other, found: list[Tensor], alone: Mapping[str, Tensor], numbers: Mapping[str, Any]
) -> None:
    wide = {name: x.double().cpu() for name, x in alone.items()}
    exact = other.op.reference(**wide, **numbers)
    exact = [exact] if isinstance(exact, Tensor) else [exact[index] for index in other.compared]
    for here, there, truth in zip(found, _results(other, alone, numbers), exact, strict=True):
        truth = truth.transpose(1, 2) if other.time == 2 else truth
        is_timed = truth.shape[1] in (1, COMPARED)
        error, worst = worst_error(here, truth, timed=is_timed)
        allowed, _ = worst_error(there, truth, timed=is_timed)
        assert error <= 2 * allowed + EPSILON[here.dtype], f"{error:.2e} and alone {allowed:.2e}, {worst}"


@pytest.mark.gpu
@pytest.mark.usefixtures("one_at_a_time", "kernels_on_gpu")
@over_others
def test_the_last_row_of_a_large_tensor_is_right(other: Other) -> None:
    rows = STEP_ROWS if other.time is None else ROWS
    assert (rows - 1) * SIZES["HV"] * SIZES["V"] * (SIZES["K"] if other.time is None else LENGTH) >= 2**31
    with torch.no_grad(), watch_paths() as seen:
        check_last_row(other, rows, LENGTH, "cuda")
    assert {path for _, path in seen} == {"triton"}


@over_others
def test_a_small_row_is_compared_alike(other: Other, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in {"H": 2, "HV": 2, "K": 16, "V": 16}.items():
        monkeypatch.setitem(SIZES, name, size)
    monkeypatch.setitem(MORE_SIZES, "N", 2)
    with torch.no_grad():
        check_last_row(other, 3, 160, "cpu")
