"""The report's section on rungs: how many specs each let through, and how far it agrees with the one after it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from heddle.dashboards.words import count_text

if TYPE_CHECKING:
    from heddle.search.record import RankCorrelation, Run

HEADER = ["Rung", "Tasks (tokens)", "Specs scored", "Left there"]
RANKS_HEADER = ["Rungs", "Score", "Specs", "Kendall's tau-b", "95 % interval"]


def rows(run: Run) -> list[list[object]]:
    """A row for each rung, the last one included; none for a run without rungs."""
    if not run.has_rungs:
        return []
    found: list[list[object]] = []
    before = run.meta["rungs"]["before"]
    for at, rung in enumerate(before):
        tasks = zip(rung["tasks"], rung["tokens"], strict=True)
        told = ", ".join(f"{task['name']} ({count_text(tokens)})" for task, tokens in tasks)
        here = {trial.hash for trial in run.trials if len(trial.rungs) > at}
        left = {trial.hash for trial in run.trials if trial.state == "pruned" and len(trial.rungs) == at + 1}
        found.append([at + 1, told, len(here), len(left)])
    whole = {trial.hash for trial in run.trials if trial.state == "complete"}
    return [*found, [len(before) + 1, ", ".join(task.name for task in run.tasks), len(whole), "–"]]


def rank_rows(run: Run) -> list[list[object]]:
    """A row for each correlation."""
    return [
        [f"{one.rung} and {one.rung + 1}", one.task or "mean normalised score", one.n, *_told(one)]
        for one in run.ranks
    ]


def _told(one: RankCorrelation) -> list[str]:
    if one.tau is None:
        return ["too few specs, or all alike", "–"]
    return [
        f"{one.tau:.2f}",
        "–" if one.low is None or one.high is None else f"{one.low:.2f} to {one.high:.2f}",
    ]
