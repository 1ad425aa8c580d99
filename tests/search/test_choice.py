"""What is chosen of a search's trials: the front, the best, the nearest misses, and whether the winner is
confirmed."""

from __future__ import annotations

import math
from typing import Any

import pytest

from heddle.search import pareto
from heddle.search.confirm import paired_difference, t_quantile, unseen_seeds
from heddle.search.record import BudgetInfo, Latency, Score, TaskInfo, Trial

MQAR = TaskInfo("mqar", "accuracy", True, 0.0, 1.0)
TEXT = TaskInfo("text", "bits_per_byte", False, 8.0, 0.0)
TASKS = (MQAR, TEXT)


def score(task: TaskInfo, value: float) -> Score:
    normalised = (value - task.chance) / (task.best - task.chance)
    return Score(task.name, task.metric, value, 0.01, 100, normalised, 0, 10, 1000, 1.0, ((10, 0.5),))


def trial(number: int, accuracy: float, bits: float, **fields: Any) -> Trial:
    plain: dict[str, Any] = {
        "number": number,
        "state": "complete",
        "params": {},
        "layers": (),
        "hash": f"{number:016x}",
        "round": 0,
        "spec": "",
        "parameters": 10,
        "scores": {"mqar": score(MQAR, accuracy), "text": score(TEXT, bits)},
        "latency": {},
        "constraints": {"decode_ms@1x64": -0.1},
        "reason": None,
        "attempts": 1,
        "wall_s": 1.0,
        "duplicate_of": None,
    }
    return Trial(**{**plain, **fields})


def latency(median: float, ratio: float | None) -> Latency:
    figures = {"median_ms": median, "low_ms": median, "high_ms": median, "p10_ms": median, "p90_ms": median}
    return Latency(
        label="decode_ms@1x64",
        phase="decode",
        batch=1,
        context=64,
        **figures,
        n=10,
        reference=None if ratio is None else "all-full",
        reference_ms=None if ratio is None else median / ratio,
        ratio=ratio,
        ratio_low=ratio,
        ratio_high=ratio,
        device="cpu",
        driver=None,
        dtype="float32",
        method="cpu-timer",
        threads=2,
        paths={},
        foreign=None,
    )


def test_the_front_respects_the_direction_of_each_task() -> None:
    trials = [trial(0, 0.9, 3.0), trial(1, 0.5, 2.0), trial(2, 0.5, 3.0), trial(3, 0.4, 4.0)]
    assert [one.number for one in pareto.front(trials, TASKS)] == [0, 1]


def test_neither_infeasible_nor_failed_nor_running_trials_are_on_the_front() -> None:
    over = trial(0, 1.0, 0.1, constraints={"decode_ms@1x64": 0.2})
    failed, running = trial(1, 1.0, 0.1, state="failed"), trial(2, 1.0, 0.1, state="running")
    assert pareto.front([over, failed, running, trial(3, 0.2, 5.0)], TASKS)[0].number == 3


def test_a_duplicate_stands_on_the_front_once() -> None:
    twins = [trial(0, 0.9, 3.0, hash="a"), trial(1, 0.9, 3.0, hash="a"), trial(2, 0.9, 3.0, hash="b")]
    assert [one.number for one in pareto.front(twins, TASKS)] == [0, 2]


def test_the_best_has_the_highest_mean_normalised_score() -> None:
    chosen = pareto.best([trial(0, 0.9, 6.0), trial(1, 0.5, 2.0), trial(2, 0.6, 2.5)])
    assert chosen is not None
    assert chosen.number == 2
    assert pareto.best([]) is None


def test_of_equal_scores_the_faster_is_best() -> None:
    slow = trial(0, 0.5, 2.0, latency={"decode_ms@1x64": latency(2.0, 0.8)})
    fast = trial(1, 0.5, 2.0, latency={"decode_ms@1x64": latency(1.0, 0.4)})
    chosen = pareto.best([slow, fast])
    assert chosen is not None
    assert chosen.number == 1


def test_violations_are_shares_of_the_budget() -> None:
    relative = BudgetInfo("decode_ms@1x64", "decode", 0.5, "all-full", 1, 64)
    absolute = BudgetInfo("decode_ms@1x64", "decode", 4.0, None, 1, 64)
    rows = {"decode_ms@1x64": latency(2.0, 0.75)}
    assert pareto.violations(rows, [relative]) == {"decode_ms@1x64": pytest.approx(0.5)}
    assert pareto.violations(rows, [absolute]) == {"decode_ms@1x64": pytest.approx(-0.5)}


def test_the_nearest_misses_come_first_and_each_spec_once() -> None:
    over = [
        trial(number, 0, 8, state="infeasible", constraints={"a": far, "b": -1.0}, hash=spec)
        for number, far, spec in [(0, 0.5, "x"), (1, 0.1, "y"), (2, 0.1, "y"), (3, 0.3, "z")]
    ]
    assert [one.number for one in pareto.least_violating([*over, trial(4, 1, 1)], most=2)] == [1, 3]


def test_seeds_of_the_confirmation_are_not_the_searchs() -> None:
    assert 5 not in unseen_seeds(5, 3)
    assert len(set(unseen_seeds(5, 3))) == 3


@pytest.mark.parametrize(
    ("degrees", "expected"), [(1, 12.706), (2, 4.303), (10, 2.228), (40, 2.021), (120, 1.980)]
)
def test_the_t_quantile_is_the_tables(degrees: int, expected: float) -> None:
    assert t_quantile(degrees) == pytest.approx(expected, abs=1e-3)


def test_the_paired_difference_cancels_what_a_seed_does_to_both() -> None:
    winner, uniform = (0.50, 0.70, 0.90), (0.48, 0.69, 0.87)
    found = paired_difference(MQAR, winner, uniform)
    half = 4.3027 * 0.01 / math.sqrt(3)
    assert found.mean == pytest.approx(0.02)
    assert found.low == pytest.approx(0.02 - half, abs=1e-4)
    assert found.high == pytest.approx(0.02 + half, abs=1e-4)
    assert found.verdict == "no difference shown"


def test_the_verdict_follows_the_interval_and_the_direction() -> None:
    lower = ((1.00, 1.11, 1.21), (1.10, 1.20, 1.30))
    assert paired_difference(TEXT, *lower).verdict == "better"
    assert paired_difference(MQAR, *lower).verdict == "worse"
