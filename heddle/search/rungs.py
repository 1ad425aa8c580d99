"""Successive halving over the rungs of a search, asynchronous and for any number of objectives.

A trial is trained at one rung after the other. It goes on from a rung if it is among the best 1 / eta of all specs that
were told there until then, those of its own round with it and nothing waited for (arXiv 1810.05934). That is decided once:
what is left at a rung stays there, with its scores. docs/decisions/0012-rungs.md gives the reasons.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from heddle.search import rates
from heddle.search.record import Trial

if TYPE_CHECKING:
    from heddle.search.driver import Driver
    from heddle.search.space import Candidate

Values = tuple[float, ...]


def promoted(scores: Sequence[Values], eta: float) -> list[int]:
    """Which of `scores` go on: the best ⌊n / eta⌋, and at least one; higher is better in every place of a score.

    By the rank of their non-dominated front, inside a front by the crowding distance of NSGA-II, the lonelier first, and at
    equals in the order given. For one objective that is the order of the scores.
    """
    most = max(1, math.floor(len(scores) / eta + 1e-9)) if scores else 0
    ranks = front_ranks(scores)
    order = sorted(range(len(scores)), key=lambda at: (ranks[at], at))
    chosen: list[int] = []
    for _, members in groupby(order, key=lambda at: ranks[at]):
        front = list(members)
        left = most - len(chosen)
        if left < len(front):
            distance = crowding([scores[at] for at in front])
            front = [at for _, at in sorted(zip([-one for one in distance], front, strict=True))][:left]
        chosen += front
        if len(chosen) == most:
            break
    return sorted(chosen)


def front_ranks(scores: Sequence[Values]) -> list[int]:
    """0 for a score that no other dominates, 1 for one that only those of rank 0 do, and so on.

    In falling order a score is dominated by earlier ones alone, and by none of a front where it is by none of the front before;
    so its front is found by bisection.
    """
    if scores and len(scores[0]) == 1:
        place = {
            value: rank for rank, value in enumerate(sorted({value for (value,) in scores}, reverse=True))
        }
        return [place[value] for (value,) in scores]
    ranks = [0] * len(scores)
    fronts: list[list[Values]] = []
    for at in sorted(range(len(scores)), key=lambda at: (*(-value for value in scores[at]), at)):
        mine = scores[at]
        rank = bisect_left(fronts, True, key=lambda front: not _is_dominated(mine, front))
        if rank == len(fronts):
            fronts.append([])
        fronts[rank].append(mine)
        ranks[at] = rank
    return ranks


def _is_dominated(mine: Values, front: Sequence[Values]) -> bool:
    # With two objectives the member added last has the most of the second: where it does not dominate, none does.
    members = front[-1:] if len(mine) <= 2 else front
    return any(
        one != mine and all(a >= b for a, b in zip(one, mine, strict=True)) for one in reversed(members)
    )


def crowding(front: Sequence[Values]) -> list[float]:
    """How far the neighbours of each member lie apart in shares of the front's extent, summed over objectives; ends: inf."""
    distance = [0.0] * len(front)
    for place in range(len(front[0])):
        order = sorted(range(len(front)), key=lambda at: front[at][place])
        extent = front[order[-1]][place] - front[order[0]][place]
        if extent == 0:
            continue
        distance[order[0]] = distance[order[-1]] = math.inf
        for before, at, after in zip(order, order[1:], order[2:], strict=False):
            distance[at] += (front[after][place] - front[before][place]) / extent
    return distance


def at_one_rung(trials: Iterable[Trial], rungs: int) -> list[tuple[Trial, float]]:
    """Trials with their quality at one rung, for whoever learns from them: scores of different rungs are never mixed.

    It is the highest rung that more trials reached than they have layers, or the lowest (as BOHB does, arXiv 1807.01774).
    """
    trials = list(trials)
    for rung in range(rungs, -1, -1):
        found = [
            (trial, quality)
            for trial in trials
            if (quality := trial.quality if rung == rungs else trial.quality_at(rung)) is not None
        ]
        if found and len(found) > len(found[0][0].layers):
            break
    return found


class Ladder:
    """Where the trials of this session stand on the rungs before the last."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._told: dict[int, list[dict[str, rates.Found]]] = {}
        # Trials that were left at a rung or failed there, and those of which nothing is decided yet.
        self._left, self._open = set[int](), set[int]()

    def climb(self, trials: Iterable[int], candidates: Mapping[int, Candidate]) -> list[int]:
        """Train trials at one rung after the other, and give those that are to be trained in full.

        After a stop in the middle of a rung nothing is decided there. The reference is trained in full alone.
        """
        driver, rungs, numbers = self._driver, self._driver.setting.rungs, list(trials)
        if not rungs:
            return numbers
        climbing = [number for number in numbers if number >= 0]
        self._open = set(climbing)
        for rung in range(len(rungs)):
            driver.enter("training", f"{len(climbing)} specs at rung {rung + 1} of {len(rungs) + 1}")
            told = self._train(rung, {number: candidates[number] for number in climbing})
            if told is None:
                return [number for number in numbers if number < 0]
            for number, entries in told.items():
                self._told.setdefault(number, []).append(entries)
            climbing = self._best(rung, told)
            self._left |= told.keys() - climbing
            self._open = set(climbing)
        self._open = set()
        return [number for number in numbers if number < 0 or number in climbing]

    def _train(self, rung: int, specs: Mapping[int, Candidate]) -> dict[int, dict[str, rates.Found]] | None:
        """What the ledger then has of each trial at the rung, by task; None where a stop left one unfinished."""
        setting, evaluations = self._driver.setting, self._driver.evaluations
        objectives = setting.rungs[rung]
        asked = {number: rates.requests(setting, number, one, objectives) for number, one in specs.items()}
        evaluations.train_all(
            request for tasks in asked.values() for each in tasks.values() for request in each
        )
        told = {}
        for number, requests in asked.items():
            found = rates.found(evaluations.get, objectives, requests)
            if found is None:
                return None
            told[number] = found
        return told

    def _best(self, rung: int, told: Mapping[int, Mapping[str, rates.Found]]) -> list[int]:
        """Those of `told` that go on, beside all that were told at the rung before."""
        names = [each.info.name for each in self._driver.setting.rungs[rung]]
        whole = {n: found for n, found in told.items() if all(one.best.ok for one in found.values())}
        scores: dict[str, Values] = {}
        for number, trial in sorted(self._driver.trials.items()):
            if number in whole:
                results = [whole[number][name].best.result or {} for name in names]
                scores.setdefault(trial.hash, tuple(result["normalised"] for result in results))
            elif number >= 0 and len(trial.rungs) > rung:
                earlier = trial.rungs[rung]
                scores.setdefault(trial.hash, tuple(earlier[name].normalised for name in names))
        specs = list(scores)
        on = {specs[at] for at in promoted(list(scores.values()), self._driver.setting.eta)}
        return [number for number in whole if self._driver.trials[number].hash in on]

    def is_left(self, number: int) -> bool:
        """Whether the trial ended before the last rung."""
        return number in self._left

    def is_open(self, number: int) -> bool:
        """Whether it is not decided how far the trial goes."""
        return number in self._open

    def found(self, number: int) -> dict[str, rates.Found]:
        """What the trial was told at the rungs before the last."""
        told = enumerate(self._told.get(number, []))
        return {f"rung {rung + 1} {name}": one for rung, each in told for name, one in each.items()}

    def fields(self, number: int) -> dict[str, Any]:
        """What "trial_finished" says of the rungs that the trial was scored at; nothing where there are none."""
        told = self._told.pop(number, [])
        whole = [
            {name: one.best.key for name, one in each.items()}
            for each in told
            if all(one.best.ok for one in each.values())
        ]
        return {"rungs": whole} if told else {}
