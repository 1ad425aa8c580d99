"""Counts of a placement that are drawn each for itself take no more layers than there are, where lower values find room."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import product
from typing import Any, cast

import optuna
import pytest

from heddle.errors import HeddleError, HeddleErrors
from heddle.search.placement import Question, propose
from heddle.search.space import suggest, suggest_all
from heddle.search.study import Study
from heddle.specs import Parameter, SpecFile, loads

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
OVER = [counts for counts in product(*RANGES.values()) if sum(counts) > LENGTH]


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
        assert sum(kept.values()) <= LENGTH
        assert all(kept[name] in RANGES[name] and kept[name] <= drawn[name] for name in RANGES)
        assert kept == drawn or sum(counts) > LENGTH


def test_the_rest_gets_its_share_where_counts_are_cut(file: SpecFile) -> None:
    kept = [sum(found(file, dict(zip(RANGES, counts, strict=True))).values()) for counts in OVER]
    assert sum(LENGTH - one > 0 for one in kept) > len(OVER) / 2


def test_counts_are_cut_in_proportion() -> None:
    wide = loads(TEXT.replace("length: 4", "length: 12").replace("[0, 3]", "[0, 9]"))
    assert found(wide, {"full": 9, "wide": 3, "linear": 6}) == {"full": 4, "wide": 1, "linear": 3}


def test_an_even_placement_of_more_layers_than_there_are_is_refused(file: SpecFile) -> None:
    counts = {f"layers.placement.count.{name}": 3 for name in RANGES}
    with pytest.raises(HeddleErrors, match="the counts take 9 of 4 layers"):
        file.placed(counts)


def test_even_layers_are_counted_by_layers_where_the_values_of_a_run_of_before_count_more(
    file: SpecFile,
) -> None:
    counts = {f"layers.placement.count.{name}": number for name, number in (("full", 2), ("linear", 3))}
    layers = ["full", "linear", "rest", "wide"]
    one_each = {f"layers.placement.count.{name}": 1 for name in RANGES}
    assert file.placed_as(layers, counts) == file.placed(one_each)
    assert sorted(file.placed_as(layers, counts)) == layers


def test_a_range_whose_step_misses_its_end_ends_at_the_last_value_before_it() -> None:
    trial = optuna.create_study().ask()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert suggest(trial, Parameter("window", "int", low=16, high=50, step=16)) in (16, 32, 48)


def test_counts_that_no_placement_has_are_refused() -> None:
    question = Question({"full": 2, "rest": -1}, {}, ("full",), lambda _: True)
    with pytest.raises(HeddleError, match=r"no placement has \{'full': 2, 'rest': -1\} of 1 layers"):
        propose(question, [], seed=0, number=0)
