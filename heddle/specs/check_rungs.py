"""What a schema cannot say of rungs: that each is one thing, and longer than the one before."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from heddle.specs.explain import Finding
from heddle.specs.recipe import TrainSpec
from heddle.specs.search import SearchSpec
from heddle.specs.tasks import TaskSpec


def tokens_of(search: SearchSpec, train: TrainSpec) -> list[float]:
    """Tokens of each rung, those of all its tasks added up; the last is that of `search.tasks`."""
    assert search.rungs is not None
    last = _total(search.tasks, train)
    shorter = [
        _total(rung.tasks, train) if rung.share is None else rung.share * last for rung in search.rungs.before
    ]
    return [*shorter, last]


def _total(tasks: list[TaskSpec], train: TrainSpec) -> float:
    return float(sum(train.tokens if task.tokens is None else task.tokens for task in tasks))


def rung_findings(search: SearchSpec, train: TrainSpec) -> Iterator[Finding]:
    """Rungs that say nothing, or that do not grow, by path below `search`."""
    if search.rungs is None:
        return
    if search.evaluator != "train":
        trains = "no spec alone" if search.evaluator == "supernet" else "nothing"
        what = f"a rung is a shorter training, and evaluator {search.evaluator} trains {trains}"
        yield Finding("conflicting-fields", what, ("rungs",), "evaluator: train, or no rungs", key=True)
    unclear = False
    for index, rung in enumerate(search.rungs.before):
        if (rung.share is None) == (not rung.tasks):
            unclear = True
            what = "a rung has a share or tasks of its own, one of the two"
            yield Finding("conflicting-fields", what, ("rungs", "before", index), "share: 0.1")
    tokens = [] if unclear else tokens_of(search, train)
    for index, (mine, above) in enumerate(pairwise(tokens)):
        if mine >= above:
            after = "search.tasks" if index == len(tokens) - 2 else f"rung {index + 2}"
            what = f"rung {index + 1} trains on {mine:,.0f} tokens, and {after} after it on {above:,.0f}: rungs must grow"
            yield Finding(
                "out-of-range", what, ("rungs", "before", index), "fewer tokens, or a smaller share"
            )
