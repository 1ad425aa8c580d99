"""`sampler: grid` and `sampler: all`: each combination, and each spec, once; and no search of a space that has no end."""

from __future__ import annotations

from collections import Counter
from itertools import permutations
from pathlib import Path

import pytest
from fast_search import TEXT, scored

from heddle.errors import HeddleErrors
from heddle.search.listing import Listing, arrangements
from heddle.search.record import Run
from heddle.search.run import search
from heddle.specs import SpecFile, loads


def listed_file(sampler: str, window: str = "{choice: [4, 8]}", length: int = 4, full: str = "") -> SpecFile:
    """Two windows of `near`, and two to `length` / 2 layers of `full`."""
    text = TEXT.format(trials=100, round=5, length=length, most=length // 2, sampler=sampler)
    text = text.replace("{int: [4, 60]}", window).replace(
        "full: {mixer: {kind: attention, heads: 2", f"\\g{full}"
    )
    return loads(text.replace("\\g", "full: {mixer: {kind: attention, heads: 2"), file="listed.yaml")


def asked(run: Run) -> list[tuple[object, ...]]:
    return [(trial.number, trial.params, trial.layers, trial.hash) for trial in run.trials]


@pytest.mark.usefixtures("workers")
def test_grid_takes_each_combination_once_and_ends(tmp_path: Path) -> None:
    run = search(listed_file("grid", length=6), tmp_path / "run", evaluate=scored)
    found = [
        (t.params["blocks.near.mixer.window"], t.params["layers.placement.count.full"]) for t in run.trials
    ]
    assert sorted(found) == [(4, 2), (4, 3), (8, 2), (8, 3)]
    assert all(
        trial.layers.count("full") == count for trial, (_, count) in zip(run.trials, found, strict=True)
    )
    assert run.status == "finished"


@pytest.mark.usefixtures("workers")
def test_all_takes_each_spec_once_also_when_it_is_stopped_between(tmp_path: Path) -> None:
    file = listed_file("all")
    whole = search(file, tmp_path / "whole", evaluate=scored)
    assert len({trial.hash for trial in whole.trials}) == len(whole.trials) == 2 * 6
    assert Counter(trial.layers for trial in whole.trials) == dict.fromkeys(
        set(permutations(("near", "near", "full", "full"))), 2
    )
    search(file, tmp_path / "parts", evaluate=scored, trials=7)
    parts = search(file, tmp_path / "parts", evaluate=scored, trials=100, resume=True)
    assert asked(parts) == asked(whole)


def test_all_takes_a_spec_once_that_has_many_placements() -> None:
    """At a window of 4 both blocks are one."""
    listing = Listing(listed_file("all", full=", window: 4"), "all")
    found = [listing.at(number) for number in range(20)]
    assert sum(one is not None for one in found) == 1 + 6
    assert found[7:] == [None] * 13


def test_all_lists_as_many_specs_as_the_size_says_where_blocks_have_no_layer() -> None:
    file = listed_file("all", window="{int: [4, 8]}")
    file = loads(file.text.replace("{int: [2, 2]}", "{int: [2, 4]}"), file="listed.yaml")
    # Six and four placements at five windows each, and one of `full` alone, where no window has an effect.
    assert file.space.size() == 5 * (6 + 4) + 1
    listing = Listing(file, "all")
    assert sum(listing.at(number) is not None for number in range(100)) == 51


def test_a_block_without_layers_has_no_values_to_go_through() -> None:
    text = listed_file("tpe", window="{int: [4, 1000000]}").text
    text = text.replace("full: {int: [2, 2]}", "near: 0").replace("of: [near, full]", "of: [full, near]")
    assert loads(text).space.size() == 1
    with pytest.raises(HeddleErrors, match="this space has 999,997"):
        loads(text.replace("sampler: tpe", "sampler: all"))


def test_arrangements_are_all_permutations_in_order() -> None:
    names = ("a", "a", "b", "c", "c")
    assert list(arrangements({"a": 2, "b": 1, "c": 2})) == sorted(set(permutations(names)))
    assert list(arrangements({"a": 3, "b": 0})) == [("a", "a", "a")]


NESTED = """
version: 1
name: nested
model:
  vocab_size: 256
  hidden_size: {choice: [16, 32]}
  blocks:
    one:
      mixer:
        choice:
          - kind: attention
            heads: 2
            window: {int: [4, 8]}
            qk_norm: {choice: [true, false], when: {hidden_size: 32}, otherwise: false}
          - {kind: gated_deltanet, heads: {choice: [1, 2]}}
      channel: {kind: gelu, ratio: 1.0}
  layers: [one]
"""


def test_the_settings_of_a_space_are_as_many_as_its_size_says() -> None:
    space = loads(NESTED).space
    found = [opened for opened, _ in space.settings()]
    assert len(found) == len({repr(one) for one in found}) == space.size()
    assert all(space.at(one)[0] == one for one in found)


@pytest.mark.parametrize(
    ("sampler", "window", "told"),
    [
        (
            "grid",
            "{int: [4, 1000000]}",
            "sampler grid goes through at most 100,000 combinations of open values, and this space has 999,997",
        ),
        (
            "all",
            "{int: [4, 10000]}",
            "sampler all goes through at most 10,000 specs, and this space has 59,982",
        ),
    ],
)
def test_a_space_too_large_to_go_through_is_refused_at_its_sampler(
    sampler: str, window: str, told: str
) -> None:
    with pytest.raises(HeddleErrors) as caught:
        listed_file(sampler, window)
    (error,) = caught.value.errors
    assert (error.code, error.where.path, error.where.line) == ("bad-space", "search.sampler", 13)
    assert told in error.what


def test_a_space_without_end_is_refused_and_the_open_float_named() -> None:
    text = TEXT.format(trials=4, round=2, length=4, most=2, sampler="grid").replace(
        "ratio: 1.0", "ratio: {float: [1.0, 2.0]}", 1
    )
    with pytest.raises(HeddleErrors) as caught:
        loads(text)
    (error,) = caught.value.errors
    assert "has no end of them" in error.what
    assert error.hint == "a choice of values for blocks.near.channel.ratio"
