"""What a schema cannot say of several learning rates of a task: that they rise, stand alone, and that something is trained."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from heddle.specs.explain import Finding
from heddle.specs.search import SearchSpec

# Evaluators that train with the recipe of a task.
TRAINING = ("train", "supernet")


def rate_findings(search: SearchSpec) -> Iterator[Finding]:
    """Lists of learning rates that say nothing, by path below `search`."""
    groups = [(("tasks",), search.tasks)]
    for at, rung in enumerate(search.rungs.before if search.rungs else ()):
        groups.append((("rungs", "before", at, "tasks"), rung.tasks))  # type: ignore[arg-type]
    for path, tasks in groups:
        for index, task in enumerate(tasks):
            if task.learning_rates is None:
                continue
            place = (*path, index, "learning_rates")
            if task.learning_rate is not None:
                what = f"{task.kind} has a learning_rate and learning_rates: one of the two"
                yield Finding("conflicting-fields", what, place, "learning_rates alone", key=True)
            if any(low >= high for low, high in pairwise(task.learning_rates)):
                rising = ", ".join(f"{rate:g}" for rate in sorted(set(task.learning_rates)))
                what = (
                    "learning rates must rise, so that it can be told whether the best is an end of the list"
                )
                yield Finding("out-of-range", what, place, f"[{rising}]")
            if search.evaluator not in TRAINING:
                what = f"evaluator {search.evaluator} is given no learning rate, and {task.kind} has several"
                yield Finding("conflicting-fields", what, place, "evaluator: train", key=True)
