"""What a schema cannot say of how a search trains: rates rise, and what asks for a training gets one."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from heddle.specs.explain import Finding
from heddle.specs.search import SearchSpec

# Evaluators that train with the recipe of a task.
TRAINING = ("train", "supernet")


def training_findings(search: SearchSpec) -> Iterator[Finding]:
    """Lists of learning rates that say nothing, and a longer training of nothing, by path below `search`."""
    yield from _rate_findings(search)
    if search.confirm_longer is not None and search.evaluator not in TRAINING:
        what = f"confirm_longer trains specs for longer, and evaluator {search.evaluator} is not told for how long"
        hint = "evaluator: train, or no confirm_longer"
        yield Finding("conflicting-fields", what, ("confirm_longer",), hint, key=True)


def _rate_findings(search: SearchSpec) -> Iterator[Finding]:
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
