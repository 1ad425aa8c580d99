"""Two blocks that are equal: every placement of them is one model, and a search says so instead of looking for another."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from fast_search import scored

from heddle.search import space
from heddle.search.equal_blocks import merge
from heddle.search.placement import Seen
from heddle.search.run import search
from heddle.specs import loads

TRIALS = 4
PLACED = "length: 5, of: [near, full, far], count: {full: 1, far: 2}"
TEXT = f"""
version: 1
name: twins
model:
  vocab_size: 256
  hidden_size: 16
  context_length: 64
  blocks:
    near: {{mixer: {{kind: attention, heads: 2, window: 8}}, channel: {{kind: gelu, ratio: 1.0}}}}
    full: {{mixer: {{kind: attention, heads: 2, window: {{choice: [8]}}}}, channel: {{kind: gelu, ratio: 1.0}}}}
  layers: {{placement: {{length: 24, of: [near, full], count: {{full: 6}}}}}}
train: {{tokens: 8k, batch_tokens: 512}}
search: {{tasks: [{{mqar: {{pairs: 2, length: 16}}}}], trials: {TRIALS}, round: 2, confirm_seeds: 2}}
"""


@pytest.mark.usefixtures("workers")
def test_a_search_of_equal_blocks_ends_and_tells_the_tie(tmp_path: Path) -> None:
    began = time.monotonic()
    run = search(loads(TEXT, file="twins.yaml"), tmp_path / "run", evaluate=scored)
    # It went through 134,596 placements for each trial, 0.7 ms of a core each.
    assert time.monotonic() - began < 120
    assert run.status == "finished"
    assert [trial.duplicate_of for trial in run.trials] == [None] + [0] * (TRIALS - 1)
    # Equal blocks are one kind to the solver, which has one placement of them.
    assert len({trial.layers for trial in run.trials}) == 1
    # The model was scored once for the search and once for each new seed.
    assert sum(event["event"] == "evaluation_started" for event in run.events) == 3
    assert run.front == (0,)
    assert run.confirm is not None
    assert run.confirm.same


def test_a_placement_asked_for_before_is_no_twin_and_never_taken_again() -> None:
    """However many those are: as long as one is left, it is found."""
    file = loads(TEXT.replace("length: 24", "length: 12").replace("window: {choice: [8]}", "window: 9"))
    tried = set[tuple[str, ...]]()
    for number in range(space.TWINS + 10):
        known = space.Known([], lambda _: False, tried=lambda _: tried.__contains__)
        one = space.place(file, {}, known, seed=0, number=number)
        assert one.layers not in tried
        tried.add(one.layers)


def test_of_three_blocks_of_which_two_are_equal_no_model_comes_twice_while_one_is_left() -> None:
    more = "    far: {mixer: {kind: attention, heads: 2, window: 4}, channel: {kind: gelu, ratio: 1.0}}\n  layers:"
    text = TEXT.replace("  layers:", more).replace("length: 24, of: [near, full], count: {full: 6}", PLACED)
    file, asked, history = loads(text), set[str](), list[Seen]()
    known = space.Known(history, asked.__contains__)
    # Ten places for two layers of `far`; which of the others are called near or full makes no other model.
    for number in range(10):
        one = space.place(file, {}, known, seed=0, number=number)
        assert one.hash not in asked
        assert {name: one.layers.count(name) for name in ("near", "full", "far")} == {
            "near": 2,
            "full": 1,
            "far": 2,
        }
        asked.add(one.hash)
        history.append(Seen(one.layers, {}, float(one.layers.index("far"))))
    assert space.place(file, {}, known, seed=0, number=10).hash in asked


def test_equal_blocks_that_share_weights_or_take_from_layers_are_not_merged() -> None:
    layers = ("near", "full", "near")
    model = loads(TEXT).spec.model
    counts = {"near": 2, "full": 1}
    assert merge(model, counts, layers).merged_counts() == {"near": 3}
    assert merge(model, counts, layers).layers(("near",) * 3) == layers
    shared = {name: block.model_copy(update={"shared": True}) for name, block in model.blocks.items()}
    apart = merge(model.model_copy(update={"blocks": shared}), counts, layers)
    assert not apart.any
    assert apart.merged_counts() == counts
