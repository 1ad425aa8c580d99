"""A worker, the raylet and the driver killed in one search: nothing finished is lost or made again. Real training and the last
phases of a search are in test_kill.py; tests/bench/faults.py does it fifty times."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from bench.faults import VICTIMS, disturbed, same
from fast_search import fast_file, scored

from heddle.search.record import read_run
from heddle.search.run import search

TRIALS = 24


# Long: minutes, of which most go by waiting for Ray to see that its raylet is gone.
@pytest.mark.long
@pytest.mark.usefixtures("workers")
def test_three_kills_leave_the_search_as_it_would_have_been(tmp_path: Path, random_seed: int) -> None:
    dice, kinds = random.Random(random_seed), list(VICTIMS)
    dice.shuffle(kinds)
    whole = search(fast_file(trials=TRIALS, round=4), tmp_path / "whole", evaluate=scored)
    tally = disturbed(tmp_path / "broken", TRIALS, kinds, dice)
    assert tally.kills == dict.fromkeys(VICTIMS, 1)
    assert (tally.lost, tally.again) == (0, 0)
    assert same(whole, read_run(tmp_path / "broken"))
