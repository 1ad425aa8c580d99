"""Two blocks that are equal: every placement of them is one model, and a search says so instead of looking for another."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from fast_search import scored

from heddle.search import space
from heddle.search.run import search
from heddle.specs import loads

TRIALS = 4
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
    assert len({trial.layers for trial in run.trials}) == TRIALS
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
        one = space.place(
            file, {}, [], lambda _: False, seed=0, number=number, is_tried=lambda _, layers: layers in tried
        )
        assert one.layers not in tried
        tried.add(one.layers)
