"""What a report and a trial's page say of several learning rates of a task: which was best, and is it an end of its list?"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from heddle.dashboards import words
from heddle.dashboards.html import Html, element, table
from heddle.dashboards.sections import note, section

if TYPE_CHECKING:
    from heddle.search.record import Run, Trial

HEADER = ["Task", "Learning rate", "Best of its list in", "Failed in"]
OF_TRIAL = ["Task", "Learning rate", "Score ± standard error", "Normalised", "Took", ""]
SAID = "Each learning rate is a training of its own, and the best score counts."


def rows(run: Run) -> list[list[object]]:
    """A row for each task, of every rung, and each of its learning rates: how often it was best; none without several."""
    specs = {trial.hash: trial for trial in run.trials if trial.rates}
    best, failed, seen = Counter[tuple[str, float]](), Counter[tuple[str, float]](), Counter[str]()
    for trial in specs.values():
        for stage, rates in trial.rates.items():
            seen[stage] += 1
            for one in rates:
                best[stage, one.learning_rate] += one.is_best and one.score is not None
                failed[stage, one.learning_rate] += one.score is None
    return [
        [stage, f"{rate:g}", f"{best[stage, rate]} of {seen[stage]} specs", failed[stage, rate]]
        for stage, rate in sorted(best)
    ]


def sentences(run: Run) -> list[str]:
    """Of which tasks the winner's best rate is an end of the list."""
    best = run.best_trial
    ends = [] if best is None else [(stage, end) for stage in best.rates if (end := best.best_is_at(stage))]
    return [
        f"{stage}: the winner's best rate is the {end} of the list, so a better one may lie "
        f"{'above' if end == 'last' else 'below'} it. Search again with a longer list before you believe the score."
        for stage, end in ends
    ]


def learning_rates(run: Run) -> Html | None:
    """Which rate was best how often."""
    found = rows(run)
    told = [element("p", line) for line in sentences(run)]
    return (
        section("Learning rates", note(SAID), *told, table(HEADER, found, numeric=(1, 3))) if found else None
    )


def of_trial(trial: Trial) -> Html | None:
    """Every rate of a trial with its score."""
    found: list[list[object]] = []
    for stage, rates in trial.rates.items():
        for one in rates:
            end = trial.best_is_at(stage)
            mark = "" if not one.is_best else "best" if end is None else f"best, the {end} of the list"
            told: list[object] = ["failed", "–", "–"]
            if one.score is not None:
                took = words.duration_text(one.score.wall_s)
                told = [words.score_text(one.score), f"{one.score.normalised:.4f}", took]
            found.append([stage, f"{one.learning_rate:g}", *told, mark])
    return (
        section("Learning rates", note(SAID), table(OF_TRIAL, found, numeric=range(1, 5))) if found else None
    )
