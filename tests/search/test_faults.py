"""A worker, the raylet and the driver killed in one search: nothing finished is lost or made again. Real training and the last
phases of a search are in test_kill.py; tests/bench/faults.py does it fifty times."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest
from bench.faults import VICTIMS, Tally, disturbed, ending, same, started, victims, wait_for
from fast_search import fast_file, scored, scored_in

from heddle.search.record import read_run
from heddle.search.run import search

TRIALS, FEW = 24, 8


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


@pytest.mark.slow
@pytest.mark.usefixtures("workers")
def test_a_search_whose_raylet_is_killed_says_so_and_goes_on_elsewhere(
    tmp_path: Path, random_seed: int
) -> None:
    dice, folder = random.Random(random_seed), tmp_path / "broken"
    whole = search(fast_file(trials=FEW, round=4), tmp_path / "whole", evaluate=scored)
    driver = started(folder, FEW)
    try:
        assert wait_for(driver, folder, dice.randint(4, 12))
        tally = Tally(folder)
        tally.note()
        (raylet,) = (one for one in victims(driver, "raylet") if one.name() == "raylet")
        os.kill(raylet.pid, signal.SIGKILL)
        driver.wait(timeout=120)
    finally:
        driver.kill()
        driver.wait()
    assert ending(folder, driver) == "cluster-lost"
    run = search(fast_file(trials=FEW, round=4), folder, resume=True, evaluate=scored_in(0.05))
    tally.note()
    assert (tally.lost, tally.again) == (0, 0)
    assert same(whole, run)
