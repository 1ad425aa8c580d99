"""Attention over chosen keys at short and odd lengths, around a tile of queries: results and gradients.

On a CPU the paths in plain torch run, with TRITON_INTERPRET=1 (see tests/kernels/test_interpreter.py) the kernels, interpreted;
on a GPU the real ones. Choices of blocks and routed chunks, whose results are of another kind, are in tests/kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from chosen_keys import (
    FORMS,
    Given,
    N,
    dense_plainly,
    gradient,
    grouped,
    in_time,
    landmark,
    over_blocks,
    results,
)
from held import assert_held, assert_near, over_settings
from torch import Tensor

from heddle.kernels import force_path
from heddle.kernels.accuracy import EPSILON
from heddle.kernels.sliding_window_attention import (
    sliding_window_attention,
    sliding_window_attention_reference,
)

pytestmark = pytest.mark.usefixtures("kernels_on_gpu")

windowed = (sliding_window_attention, sliding_window_attention_reference)
EVERY = FORMS | {
    "sliding": (windowed, grouped, {"window": 20}),
    "sinks": (windowed, grouped, {"window": 20, "sinks": 3}),
}
# Over many tokens a reference that looks at each block of 8 takes minutes.
WIDE = {"landmarks": (landmark, over_blocks("landmarks", 64), {"block": 64, "scale": 0.3})}
IN_TORCH = ("all", "members", "dense")
LENGTHS = (1, 63, 64, 65, pytest.param(1000, marks=pytest.mark.long))

over_lengths = pytest.mark.parametrize("length", LENGTHS)


def form_at(form: str, length: int) -> Any:
    """The op and its reference, what draws its arguments, and those that are no tensors."""
    return (EVERY | WIDE if length > 65 else EVERY)[form]


def drawn(form: str, length: int, dtype: torch.dtype) -> Given:
    """Arguments, rounded; of one key head and its group, for references take tokens one by one."""
    given = form_at(form, length)[1](length, torch.Generator().manual_seed(length))
    rounded = {name: x.to(dtype) if x.is_floating_point() else x for name, x in given.items()}
    return {name: x[:, : x.shape[1] // N] if x.dim() > 2 else x for name, x in rounded.items()}


def told(function: Any, given: Given, rest: Given) -> dict[str, Tensor]:
    heads, length = given["q"].shape[1:3]
    return in_time(results(function, given, rest, gradient(length)[:, :heads]))


def exact_results(reference: Any, given: Given, rest: Given) -> tuple[dict[str, Tensor], set[str]]:
    """What the reference gives in float64, and names of what is nothing: gradients of logits where there is one key."""
    wide = {name: x.double() if x.is_floating_point() else x for name, x in given.items()}
    exact = told(reference, wide, rest)
    nothing = {name for name, x in exact.items() if x.abs().max() < 1e-13}
    return {name: x for name, x in exact.items() if name not in nothing}, nothing


def assert_nothing(found: Mapping[str, Tensor], names: set[str], dtype: torch.dtype) -> None:
    # Rounding has no size there to be measured by.
    assert all(found[name].abs().max() <= EPSILON[dtype] for name in names)


@over_settings
@over_lengths
@pytest.mark.parametrize("form", [form for form in EVERY if form not in IN_TORCH])
def test_results_and_gradients_are_those_of_the_reference(
    form: str, length: int, device: str, dtype: torch.dtype
) -> None:
    (fast, reference), _, rest = form_at(form, length)
    given = drawn(form, length, dtype)
    exact, nothing = exact_results(reference, given, rest)
    there, found = {name: x.to(device) for name, x in given.items()}, []

    def run() -> Mapping[str, Tensor]:
        found.append(told(fast, there, rest))
        return found[-1]

    assert_held(exact, run, dtype, device)
    assert_nothing(found[0], nothing, dtype)


@over_settings
@over_lengths
@pytest.mark.parametrize("form", IN_TORCH)
def test_what_has_no_kernels_of_its_own_is_the_reference_too(
    form: str, length: int, device: str, dtype: torch.dtype
) -> None:
    (fast, reference), _, rest = form_at(form, length)
    given = drawn(form, length, dtype)
    exact, nothing = exact_results(reference, given, rest)
    there = {name: x.to(device) for name, x in given.items()}
    # A call without a choice has none, and whoever asks for them is told so.
    with force_path("torch"):
        found = told(fast, there, rest)
    rounded = {name: x.to(dtype) for name, x in exact.items()}
    assert_near(exact, found, told(dense_plainly, there, rest) if form == "dense" else rounded, dtype)
    assert_nothing(found, nothing, dtype)
