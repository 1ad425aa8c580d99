"""block_choice: lists against the reference query by query, ties, what is not complete, and equal runs.

On a CPU the path in plain torch runs, with TRITON_INTERPRET=1 (see test_interpreter.py) the kernels, interpreted; on a GPU
the real ones.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from held import compiled, over_settings
from torch import Tensor

from heddle.errors import HeddleError
from heddle.kernels import force_path, watch_paths
from heddle.kernels.block_choice import block_choice, block_choice_reference, mark_blocks
from heddle.kernels.op import INTERPRETED, LIBRARY

pytestmark = pytest.mark.usefixtures("kernels_on_gpu")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
Given = dict[str, Any]
# Names of forms, and what they change; `kernels` below adds the other way of scoring to each.
FORMS: dict[str, dict[str, Any]] = {
    "step": {},
    "few": {"T": 3, "G": 3},
    "odd": {"K": 20, "S": 75, "G": 5},
    "padded": {"starts": (3, 70), "B": 2},
    "before": {"starts": (-2, 0), "B": 2, "T": 4},
    "marked": {"marks": True, "T": 2},
    "dense": {"dense_length": 50, "starts": (40, 71), "B": 2},
    "every": {"count": 99},
    "short": {"S": 5},
}

# More queries than a tile holds, and more kernels.
LONG: dict[str, Any] = {"B": 1, "T": 40, "S": 300, "G": 3, "marks": True}


def drawn(
    *,
    B: int = 2,
    T: int = 1,
    S: int = 72,
    G: int = 2,
    K: int = 16,
    count: int = 5,
    kernels: bool = False,
    starts: tuple[int, ...] = (),
    marks: bool = False,
    **more: Any,
) -> Given:
    """Arguments in float64: blocks of 8 keys, 2 key heads; NaN stands for what is not complete."""
    generator, N, block = torch.Generator().manual_seed(S + T + G), 2, 8
    parts, blocks = (S // 2 - 1 if kernels else S // block), -(-S // block)
    parts = max(0, parts)
    means = torch.randn(B, N, parts, K, generator=generator, dtype=torch.float64)
    start = torch.tensor(starts) if starts else torch.full((B,), S - T)
    held = None
    if marks:
        held = torch.rand(B, parts, generator=generator) < 0.5
        held[0] = False
    return {
        "q": torch.randn(B, N * G, T, K, generator=generator, dtype=torch.float64),
        "means": means,
        "start": start,
        "held": held,
        "block": block,
        "blocks": blocks,
        "count": count,
        "sink": 1,
        "recent": 2,
        "kernels": kernels,
        **more,
    }


def lists(function: Any, given: Given, dtype: torch.dtype, device: str) -> Tensor:
    """What `function` lists for q and means of this dtype on this device, on the CPU."""
    there = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in given.items()}
    there |= {name: there[name].to(dtype) for name in ("q", "means")}
    found: Tensor = function(**there)
    return found.cpu()


@over_settings
@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_lists_are_those_of_the_reference(form: str, kernels: bool, device: str, dtype: torch.dtype) -> None:
    given = drawn(**FORMS[form], kernels=kernels)
    # As rounded as what the op is given.
    rounded = given | {name: given[name].to(dtype).double() for name in ("q", "means")}
    with (
        watch_paths() as seen,
        force_path("triton") if INTERPRETED or device == "cuda" else force_path("torch"),
    ):
        found = lists(block_choice, given, dtype, device)
    assert seen == [("block_choice", "triton" if INTERPRETED or device == "cuda" else "torch")]
    assert found.dtype == torch.int32
    assert torch.equal(found, lists(block_choice_reference, rounded, torch.float64, "cpu"))


# Of blocks of 8 the last one of 63 and of 65 is a part.
LENGTHS = (1, 63, 64, 65, pytest.param(1000, marks=pytest.mark.long))


@over_settings
@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_every_query_of_a_whole_sequence_has_the_list_of_the_reference(
    length: int, kernels: bool, device: str, dtype: torch.dtype
) -> None:
    # The reference goes head by head.
    given = drawn(B=1, T=length, S=length, G=2 if length <= 65 else 1, kernels=kernels)
    rounded = given | {name: given[name].to(dtype).double() for name in ("q", "means")}
    with force_path("triton" if INTERPRETED or device == "cuda" else "torch"):
        found = lists(block_choice, given, dtype, device)
        marks = lists(mark_blocks, given, dtype, device)
    exact = lists(block_choice_reference, rounded, torch.float64, "cpu")
    assert torch.equal(found, exact)
    assert torch.equal(marks, (exact[..., None] == torch.arange(given["blocks"])).any(-2))


@over_settings
@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("form", [*FORMS, "long"])
def test_marks_of_many_queries_are_those_of_lists(
    form: str, kernels: bool, device: str, dtype: torch.dtype
) -> None:
    given = drawn(**(LONG if form == "long" else FORMS[form]), kernels=kernels)
    rounded = given | {name: given[name].to(dtype).double() for name in ("q", "means")}
    path = "triton" if INTERPRETED or device == "cuda" else "torch"
    with force_path(path), watch_paths() as seen:
        marks = lists(mark_blocks, given, dtype, device)
    assert seen == [("block_choice", path)]
    listed = lists(block_choice_reference, rounded, torch.float64, "cpu")
    assert torch.equal(marks, (listed[..., None] == torch.arange(given["blocks"])).any(-2))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernels", [False, True])
def test_of_equal_blocks_the_earliest_are_listed(kernels: bool, device: str) -> None:
    given = drawn(kernels=kernels)
    given["means"] = torch.ones_like(given["means"])
    with force_path("triton" if INTERPRETED or device == "cuda" else "torch"):
        found = lists(block_choice, given, torch.float32, device)
    assert found[0, 0, 0].tolist() == [0, 1, 2, 7, 8]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernels", [False, True])
def test_what_is_not_complete_is_never_looked_at(kernels: bool, device: str) -> None:
    given, found = drawn(kernels=kernels, T=2, starts=(13, 50)), []
    for value in (0.0, 1e4):
        means = given["means"].clone()
        # Kernels that end behind the last query, and the own block on.
        means[0, :, 6 if kernels else 1 :] = value
        with force_path("triton" if INTERPRETED or device == "cuda" else "torch"):
            found.append(lists(block_choice, {**given, "means": means}, torch.float32, device))
    assert torch.equal(*found)
    assert found[0][0, 0, 0].tolist() == [0, 1, -1, -1, -1]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernels", [False, True])
def test_two_runs_list_the_same_among_many(kernels: bool, device: str) -> None:
    given = drawn(kernels=kernels, S=8 * 700 + 3, count=40, B=1)
    with force_path("triton" if INTERPRETED or device == "cuda" else "torch"):
        first, again = (lists(block_choice, given, torch.float32, device) for _ in range(2))
    assert torch.equal(first, again)
    rounded = given | {name: given[name].float().double() for name in ("q", "means")}
    assert torch.equal(first, lists(block_choice_reference, rounded, torch.float64, "cpu"))


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_marks_are_the_same_under_autocast(kernels: bool, device: str) -> None:
    given = {
        name: x.to(device, torch.float32) if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in drawn(T=12, kernels=kernels).items()
    }
    given = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in given.items()}
    expected = mark_blocks(**given)
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(mark_blocks(**given), expected)


def test_a_choice_runs_in_kernels_unasked() -> None:
    assert block_choice.is_proven(torch.bfloat16, K=128, G=16, choice=2049)


def test_torch_library_knows_the_op() -> None:
    given = drawn(kernels=True, marks=True)
    numbers = [given[name] for name in ("block", "blocks", "count", "sink", "recent")]
    tensors = [given[name] for name in ("q", "means", "start", "held")]
    known = getattr(torch.ops, LIBRARY).block_choice.default
    assert torch.equal(known(*tensors, 0.25, True, *numbers, 0), block_choice(**given, scale=0.25))
    whole = compiled(block_choice)
    assert torch.equal(whole(**given), block_choice(**given))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"recent": 0}, "recent 1"),
        ({"count": 2}, "count is sink"),
        ({"kernels": True, "block": 6}, "multiple of 4"),
        ({"blocks": 2}, "9 means are more"),
        ({"means": torch.zeros(2, 3, 9, 16)}, "N dividing H"),
        ({"means": torch.zeros(2, 2, 9, 16)}, "means is float32, expected float64 as q"),
        ({"start": torch.zeros(3, dtype=torch.int64)}, "start has shape"),
    ],
)
def test_wrong_arguments_are_told(change: dict[str, Any], told: str) -> None:
    with pytest.raises(HeddleError, match=told):
        block_choice(**{**drawn(), **change})
