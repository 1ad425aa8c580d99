"""What a search says of where it stands, as each trial ends: counts, the best so far and the time left are those of now."""

from __future__ import annotations

from pathlib import Path

import pytest
from fast_search import fast_file, scored, scored_in

from heddle.search import pareto
from heddle.search.progress import Silent, Status
from heddle.search.record import REFERENCE, Trial, read_run
from heddle.search.run import search

pytestmark = pytest.mark.usefixtures("workers")


class Heard(Silent):
    """Keeps each status, and with each trial the one before it."""

    def __init__(self) -> None:
        self.statuses, self.ended = list[Status](), list[tuple[Trial, Status]]()

    def status(self, status: Status) -> None:
        self.statuses.append(status)

    def trial_finished(self, trial: Trial) -> None:
        if trial.number != REFERENCE:
            self.ended.append((trial, self.statuses[-1]))


def test_each_trial_that_ends_is_counted_and_may_be_the_best_so_far(tmp_path: Path) -> None:
    heard = Heard()
    search(fast_file(trials=8, round=4), tmp_path / "run", evaluate=scored, progress=heard)
    assert [status.done for _, status in heard.ended] == list(range(1, 9))
    told = list[Trial]()
    for trial, status in heard.ended:
        told.append(trial)
        best = pareto.best(told)
        assert best is not None
        assert status.best is not None
        assert status.best.number == best.number


def test_a_search_that_goes_on_counts_what_ended_before(tmp_path: Path) -> None:
    search(fast_file(trials=8, round=4), tmp_path / "run", evaluate=scored, trials=4)
    heard = Heard()
    search(
        fast_file(trials=8, round=4), tmp_path / "run", evaluate=scored, resume=True, trials=8, progress=heard
    )
    assert heard.statuses[0].done >= 4
    assert [status.done for _, status in heard.ended] == [5, 6, 7, 8]
    assert read_run(tmp_path / "run").count("complete") == 8


def test_time_left_is_that_of_the_limit_where_it_comes_before_the_trials(tmp_path: Path) -> None:
    heard = Heard()
    search(
        fast_file(trials=1000, round=4),
        tmp_path / "run",
        evaluate=scored_in(0.3),
        time=4.0,
        progress=heard,
    )
    rounds = [one for one in heard.statuses if one.phase in ("ask", "timing", "training")]
    # Also before the first trial has ended, when nothing is known of the pace.
    assert rounds[0].done == 0
    assert all(one.seconds_left is not None for one in rounds)
    for one in rounds:
        assert one.seconds_left is not None
        assert one.seconds_left <= max(0.0, 4.0 - one.elapsed_s) + 0.1
