"""Counts of a placement that are drawn each for itself never take more layers than there are."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any, cast

import pytest

from heddle.errors import HeddleErrors
from heddle.search.space import suggest_all
from heddle.search.study import Study
from heddle.specs import SpecFile, loads

LENGTH = 4
TEXT = """\
version: 1
name: counted
model:
  vocab_size: 256
  hidden_size: 16
  blocks:
    full: {mixer: {kind: attention, heads: 2}, channel: {kind: swiglu}}
    wide: {mixer: {kind: attention, heads: 2, window: 8}, channel: {kind: swiglu}}
    linear: {mixer: {kind: linear_attention, heads: 2}, channel: {kind: swiglu}}
    rest: {mixer: {kind: lightning, heads: 2}, channel: {kind: swiglu}}
  layers:
    placement:
      length: 4
      of: [full, wide, linear, rest]
      count: {full: {int: [0, 3]}, wide: {int: [1, 3], step: 2}, linear: {int: [0, 3]}}
"""
RANGES = {"full": range(4), "wide": range(1, 4, 2), "linear": range(4)}


class Drawn:
    """A study that draws what it is told to."""

    def __init__(self, counts: dict[str, int]) -> None:
        self.counts = counts

    def suggest(self, number: int, name: str, draw: Callable[[Any], Any]) -> int:  # noqa: ARG002
        return self.counts[name.rpartition(".")[2]]


@pytest.fixture(scope="module")
def file() -> SpecFile:
    return loads(TEXT)


def found(file: SpecFile, drawn: dict[str, int]) -> dict[str, int]:
    values = suggest_all(cast("Study", Drawn(drawn)), 0, file.space)
    return {name.rpartition(".")[2]: value for name, value in values.items()}


def test_counts_are_cut_to_the_layers_there_are_and_only_then(file: SpecFile) -> None:
    for counts in product(*RANGES.values()):
        drawn = dict(zip(RANGES, counts, strict=True))
        kept = found(file, drawn)
        assert sum(kept.values()) == min(LENGTH, sum(counts)) or kept["wide"] < drawn["wide"]
        assert all(kept[name] in RANGES[name] and kept[name] <= drawn[name] for name in RANGES)
        assert kept == drawn or sum(counts) > LENGTH


def test_those_that_ask_for_most_get_fewer(file: SpecFile) -> None:
    assert found(file, {"full": 3, "wide": 1, "linear": 2}) == {"full": 1, "wide": 1, "linear": 2}
    assert found(file, {"full": 3, "wide": 1, "linear": 3}) == {"full": 1, "wide": 1, "linear": 2}


def test_an_even_placement_of_more_layers_than_there_are_is_refused(file: SpecFile) -> None:
    counts = {f"layers.placement.count.{name}": 3 for name in RANGES}
    with pytest.raises(HeddleErrors, match="the counts take 9 of 4 layers"):
        file.placed(counts)
