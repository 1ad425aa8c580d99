"""What a run leaves open is told: budgets that nothing keeps, tasks at which nothing is above chance."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

from heddle.dashboards.doubts import at_chance, closest_text
from heddle.search.record import Run


def trial(number: int, constraints: dict[str, float], **normalised: float) -> SimpleNamespace:
    scores = {name: SimpleNamespace(normalised=one) for name, one in normalised.items()}
    return SimpleNamespace(number=number, state="complete", constraints=constraints, scores=scores)


def run_of(*trials: SimpleNamespace, least: tuple[int, ...] = ()) -> Run:
    budgets = [
        SimpleNamespace(label="decode_ms@1x64", at_most=0.01),
        SimpleNamespace(label="cache_bytes", at_most=2_000_000),
    ]
    tasks = [SimpleNamespace(name=name) for name in ("mqar", "text")]
    found = SimpleNamespace(
        trials=trials,
        budgets=budgets,
        tasks=tasks,
        least_violating=least,
        trial=lambda number: trials[number],
    )
    return cast("Run", found)


def test_the_budget_that_the_closest_trial_would_keep_is_told_rounded_up() -> None:
    over = {"decode_ms@1x64": 75.31, "cache_bytes": -0.5}
    assert closest_text(run_of(trial(0, over), least=(0,))) == ": decode_ms@1x64 to 0.764 for trial 0"
    assert closest_text(run_of(trial(0, over))) == ""
    bytes_over = {"decode_ms@1x64": -0.1, "cache_bytes": 0.2345675}
    assert closest_text(run_of(trial(0, bytes_over), least=(0,))) == ": cache_bytes to 2469135 for trial 0"


def test_a_task_at_which_no_trial_is_above_chance_is_told() -> None:
    first, second = trial(0, {}, mqar=-0.2, text=0.6), trial(1, {}, mqar=0.0, text=0.5)
    assert at_chance(run_of(first, second)) == ["mqar"]
    assert at_chance(run_of(first, trial(1, {}, mqar=0.1, text=0.5))) == []
    assert at_chance(run_of()) == []
