"""Several learning rates of a task: a spec is trained with each, each is an evaluation of its own, and the best score counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from heddle.search.evaluations import Request
from heddle.search.ledger import Entry
from heddle.search.setting import Objective, Setting
from heddle.search.space import Candidate

# A rate that is too high for a spec says nothing about the others; what else fails would fail at every rate.
PASSED_OVER = "loss-not-finite"


@dataclass(frozen=True, slots=True)
class Found:
    """What the ledger has of a spec at an objective: an entry for each learning rate, in the order of the list."""

    objective: Objective
    entries: tuple[Entry, ...]

    @property
    def best(self) -> Entry:
        """The entry that counts: the best score, of equals the first; or the failure, if it is the spec's."""
        broken = [entry for entry in self.entries if entry.reason and entry.reason["code"] != PASSED_OVER]
        whole = [entry for entry in self.entries if entry.result is not None]
        if broken or not whole:
            return (broken or list(self.entries))[0]
        sign = 1 if self.objective.info.higher_is_better else -1
        return max(whole, key=lambda entry: sign * (entry.result or {})["value"])

    @property
    def keys(self) -> list[tuple[float, str]]:
        """Each learning rate with the key of its entry."""
        rates = [recipe.learning_rate for recipe in self.objective.recipes]
        return [(rate, entry.key) for rate, entry in zip(rates, self.entries, strict=True)]


def requests(
    setting: Setting, number: int, one: Candidate, objectives: Iterable[Objective]
) -> dict[str, tuple[Request, ...]]:
    """The trainings of `one` at each task, by its name: one with each learning rate."""
    return {
        each.info.name: tuple(setting.training(number, one, each, recipe=recipe) for recipe in each.recipes)
        for each in objectives
    }


def found(
    get: Callable[[Request], Entry | None],
    objectives: Iterable[Objective],
    asked: Mapping[str, Sequence[Request]],
) -> dict[str, Found] | None:
    """What `get` has of the trainings that were `asked` for, by the task's name; None while one of them is not finished."""
    told: dict[str, Found] = {}
    for each in objectives:
        entries = [get(request) for request in asked.get(each.info.name, ())]
        if any(entry is None for entry in entries):
            return None
        if entries:
            told[each.info.name] = Found(each, tuple(entry for entry in entries if entry is not None))
    return told


def fields(told: Iterable[Found]) -> dict[str, Any]:
    """What "trial_finished" says of the learning rates, by the stage in the ledger; nothing where no task has several."""
    several = {one.objective.stage: one.keys for one in told if len(one.entries) > 1}
    return {"rates": several} if several else {}
