"""Gradients of tensors of more than 2³¹ elements: those of the last tokens of one are what these tokens alone have."""

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
    Other,
    cut,
    drawn,
    in_a_row,
    last_tokens,
)
from torch import Tensor

from heddle.kernels import OPS, force_path
from heddle.kernels.accuracy import EPSILON, worst_error
from heddle.kernels.op import watch_paths

# A step keeps nothing that grows with its rows but states.
ALL = (
    *(Other(op, op.cases.sequence, {"q": "k", "v": "k"} if "k" in op.cases.sequence else {}) for op in ALIKE),
    *(other for other in OTHERS if other.time is not None),
)
# As many tokens in rows that attention may see the whole of.
SHORT_ROWS, SHORT_LENGTH = 2049, 512
over_all = pytest.mark.parametrize(
    ("other", "is_packed"),
    [
        pytest.param(other, is_packed, id=f"{other.op.name}-{'packed' if is_packed else 'rows'}")
        for other in ALL
        for is_packed in ((False, True) if other.op in (*OPS, *PACKED) else (False,))
    ],
)


def _gradients(other: Other, given: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> dict[str, Tensor]:
    """By name; what flows back is an argument once more, as memory for it is not needed."""
    traits = other.op.cases
    names = [name for name in traits.differentiable if name in given]
    # Arguments that are one tensor have gradients of their own.
    leaves = {name: x.detach().requires_grad_(name in names) for name, x in given.items()}
    found = other.op(**leaves, **numbers)
    read = [found] if isinstance(found, Tensor) else [found[index] for index in traits.read]
    upstream = [given[traits.output_like].to(one.dtype) for one in read]
    gradients = torch.autograd.grad(read, [leaves[name] for name in names], upstream, allow_unused=True)
    return {name: x for name, x in zip(names, gradients, strict=True) if x is not None}


def _exact(other: Other, given: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> dict[str, Tensor]:
    wide = {name: x.double() if x.is_floating_point() else x for name, x in given.items()}
    with force_path("torch"):
        return _gradients(other, wide, numbers)


def _assert_near(other: Other, name: str, found: Tensor, alone: Tensor, exact: Tensor) -> None:
    """`found` is as near to the exact gradient as what the op itself gives alone."""
    if other.time == 2:
        found, alone, exact = (x.transpose(1, 2) for x in (found, alone, exact))
    is_timed = name in other.rows and name not in other.untimed
    error, worst = worst_error(found, exact, timed=is_timed)
    allowed, _ = worst_error(alone, exact, timed=is_timed)
    limit = 2 * allowed + EPSILON[torch.bfloat16]
    assert error <= limit, f"{name}: {error:.2e} and alone {allowed:.2e}, {worst}"


def check_last_row(other: Other, rows: int, length: int, device: str) -> set[str]:
    """Many equal rows and a last one of its own: the gradients of its first tokens, and of what all rows share.

    The paths that were taken.
    """
    many, last, given, numbers = drawn(other, rows, length, device)
    alone, exact = _gradients(other, last, numbers), _exact(other, last, numbers)
    shared = [name for name in exact if name not in other.rows]
    others, exact_others = (make(other, many, numbers) if shared else {} for make in (_gradients, _exact))
    with watch_paths() as seen:
        found = _gradients(other, given, numbers)
    for name in shared:
        sides = ((others, alone), (exact_others, exact))
        sums = [(rows - 1) * first[name].double() + second[name].double() for first, second in sides]
        _assert_near(other, name, found[name], *sums)
    parts = [cut(other, each, slice(COMPARED)) for each in (found, alone, exact)]
    for name, x in parts[2].items():
        if name not in shared:
            _assert_near(other, name, parts[0][name][-1:], parts[1][name], x)
    return {path for _, path in seen}


def check_last_sequence(other: Other, rows: int, length: int, device: str) -> set[str]:
    """The same rows one after the other: the gradients of a sequence of the last tokens.

    The paths that were taken.
    """
    _, last, given, numbers = drawn(other, rows, length, device)
    row, tokens = last_tokens(other, last, length), rows * length
    alone, exact = _gradients(other, row, numbers), _exact(other, row, numbers)
    # Chunks that are given end with the rows.
    first = range(0, tokens, length) if other.op in PACKED else (0,)
    ends = torch.tensor([*first, tokens - COMPARED, tokens], dtype=torch.int32, device=device)
    with watch_paths() as seen:
        found = _gradients(other, in_a_row(other, given), {**numbers, "cu_seqlens": ends})
    for name in exact.keys() & set(other.rows):
        at = tuple(slice(-size, None) for size in exact[name].shape)
        _assert_near(other, name, found[name][at], alone[name], exact[name])
    return {path for _, path in seen}


@pytest.mark.gpu
@pytest.mark.usefixtures("one_at_a_time", "kernels_on_gpu")
@over_all
def test_the_last_gradients_of_a_large_tensor_are_right(other: Other, is_packed: bool) -> None:
    rows, length = (ROWS, LENGTH) if other.op in OPS else (SHORT_ROWS, SHORT_LENGTH)
    assert (rows - 1) * length * SIZES["C"] >= 2**31
    check = check_last_sequence if is_packed else check_last_row
    assert check(other, rows, length, "cuda") == {"triton"}


@over_all
def test_small_gradients_are_compared_alike(
    other: Other, is_packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, size in {"H": 2, "HV": 2, "K": 16, "V": 16, "C": 8}.items():
        monkeypatch.setitem(SIZES, name, size)
    monkeypatch.setitem(MORE_SIZES, "N", 2)
    check = check_last_sequence if is_packed else check_last_row
    assert check(other, 3, 160, "cpu") == {"torch"}
