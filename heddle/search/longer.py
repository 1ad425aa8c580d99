"""The best trials trained again for longer, and their placements in reverse order: does the ranking of the search hold?

Short trainings lie: where a linear layer comes first, a softmax layer behind it may not be used within a short budget. What is
found here is told beside the search's own ranking and never changes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING

from heddle.compose.train import Recipe
from heddle.errors import HeddleError
from heddle.search import space
from heddle.search.confirm import unseen_seeds
from heddle.search.durable import write_json
from heddle.search.evaluations import Request
from heddle.search.longer_results import LONGER_FILE, Longer, LongerRow
from heddle.search.record import Trial
from heddle.search.setting import Objective, Setting
from heddle.specs.search_longer import LongerSpec

if TYPE_CHECKING:
    from heddle.search.driver import Driver

# By (task, learning rate, seed).
Requests = dict[tuple[str, float, int], Request]
# A learning rate, and the results of a task with it by seed.
Best = tuple[float, list[Mapping[str, float]]]


@dataclass(frozen=True, slots=True)
class Side:
    """What is trained for longer: a trial, or its layers the other way round."""

    trial: Trial
    is_reversed: bool
    one: space.Candidate


def asked_of(setting: Setting) -> LongerSpec | None:
    """What the spec asks for."""
    search = setting.file.spec.search
    return None if search is None else search.confirm_longer


def cost(setting: Setting, done: int = 0) -> int:
    """As much as about so many trainings of the search is left after `done` longer ones, to tell how long it takes."""
    asked = asked_of(setting)
    if asked is None:
        return 0
    placements = asked.best * (1 if setting.file.space.placement is None else 2)
    trainings = asked.seeds * placements * sum(len(one.recipes) for one in setting.objectives)
    return round(asked.times * max(0, trainings - done))


def confirm_longer(driver: Driver, best: int) -> None:
    """Train the best trials, and what they are in reverse order, for longer with new seeds, and write longer.json.

    At each learning rate of a task, the best of which in the mean over the seeds counts. `best`, the winner, is one of them.
    """
    setting = driver.setting
    asked = asked_of(setting)
    if asked is None:
        return
    sides, left_out = _sides(setting, _ranked(driver, asked.best, best))
    seeds = unseen_seeds(setting.objectives[0].recipe.seed, asked.seeds)
    objectives = [_longer(each, asked.times) for each in setting.objectives]
    driver.enter("longer", f"{len(sides)} placements, {asked.times:g} times as long")
    requests = [_requests(setting, side, objectives, seeds, times=asked.times) for side in sides]
    driver.evaluations.train_all(request for each in requests for request in each.values())
    if driver.stopping:
        return
    told = [_row(driver, side, each, objectives) for side, each in zip(sides, requests, strict=True)]
    failures = [failure for _, failed in told for failure in failed]
    rows = tuple(row for row, _ in told)
    found = Longer(best, asked.times, seeds, rows, tuple(failures), tuple(left_out))
    write_json(setting.folder / LONGER_FILE, asdict(found))
    driver.log.write("longer_finished", number=best, holds=found.holds)
    if ahead := found.ahead:
        names = " and ".join(row.name for row in ahead)
        what = f"trained {asked.times:g} times as long, {names} came out ahead of the winner, trial {best}"
        driver.warn(f"{what}; the winner stays, see the report")


def _ranked(driver: Driver, most: int, best: int) -> list[Trial]:
    """The best trials in the order of the search, each spec once; the winner stands for its spec."""
    own = [trial for number, trial in driver.trials.items() if number >= 0 and trial.feasible]
    order = sorted(own, key=lambda trial: (-_quality(trial), trial.number != best, trial.number))
    first: dict[str, Trial] = {}
    for trial in order:
        first.setdefault(trial.hash, trial)
    ranked = list(first.values())
    winner = next(trial for trial in ranked if trial.hash == driver.trials[best].hash)
    return ranked[:most] if winner in ranked[:most] else [*ranked[: most - 1], winner]


def _quality(trial: Trial) -> float:
    return -math.inf if trial.quality is None else trial.quality


def _sides(setting: Setting, trials: list[Trial]) -> tuple[list[Side], list[str]]:
    """The trials, each followed by its reverse if it is a placement of two kinds and no palindrome; why a reverse is no model."""
    sides, left_out = [], []
    hashes = {trial.hash for trial in trials}
    for trial in trials:
        one = space.candidate(setting.file, trial.params, trial.layers)
        sides.append(Side(trial, False, one))
        if setting.file.space.placement is None or len(set(trial.layers)) != 2:
            continue
        try:
            other = space.candidate(setting.file, trial.params, trial.layers[::-1])
        except HeddleError as error:
            left_out.append(f"trial {trial.number} in reverse order: {error.code}: {error.what}")
            continue
        if other.hash not in hashes:
            hashes.add(other.hash)
            sides.append(Side(trial, True, other))
    return sides, left_out


def _longer(objective: Objective, times: float) -> Objective:
    recipes = (replace(one, tokens=round(times * one.tokens)) for one in objective.recipes)
    return replace(objective, recipes=tuple(recipes), is_longer=True)


def _requests(
    setting: Setting, side: Side, objectives: list[Objective], seeds: tuple[int, ...], *, times: float
) -> Requests:
    def request(each: Objective, recipe: Recipe, seed: int) -> Request:
        made = setting.training(side.trial.number, side.one, each, recipe=recipe, seed=seed)
        return replace(made, times=times)

    return {
        (each.info.name, recipe.learning_rate, seed): request(each, recipe, seed)
        for each in objectives
        for recipe in each.recipes
        for seed in seeds
    }


def _row(
    driver: Driver, side: Side, requests: Requests, objectives: list[Objective]
) -> tuple[LongerRow, list[str]]:
    """What came of one placement, and which of its trainings failed."""
    results: dict[str, dict[float, list[Mapping[str, float]]]] = {each.info.name: {} for each in objectives}
    failures = []
    for (task, rate, seed), request in requests.items():
        entry = driver.evaluations.get(request)
        assert entry is not None
        held = results[task].setdefault(rate, [])
        if entry.result is not None:
            held.append(entry.result)
        elif entry.reason is not None:
            name = f"trial {side.trial.number}{' in reverse order' * side.is_reversed}"
            where = f"{name}, {task}, learning rate {rate:g}, seed {seed}"
            failures.append(f"{where}: {entry.reason['code']}: {entry.reason['message']}")
    count = len(requests) // sum(len(each.recipes) for each in objectives)
    best = {each.info.name: _best(each, results[each.info.name], count) for each in objectives}
    values = {task: tuple(one["value"] for one in found[1]) for task, found in best.items() if found}
    normalised = [[one["normalised"] for one in found[1]] for found in best.values() if found]
    whole = len(normalised) == len(objectives)
    row = LongerRow(
        number=side.trial.number,
        is_reversed=side.is_reversed,
        hash=side.one.hash,
        layers=side.one.layers,
        before=None if side.is_reversed else side.trial.quality,
        qualities=tuple(fmean(each) for each in zip(*normalised, strict=True)) if whole else (),
        values=values,
        learning_rates={task: found[0] for task, found in best.items() if found},
        se=_error(objectives, best) if whole else 0.0,
    )
    return row, failures


def _error(objectives: list[Objective], best: Mapping[str, Best | None]) -> float:
    """The standard error of the mean normalised score over tasks and seeds, from those of the scores."""
    errors = []
    for each in objectives:
        found = best[each.info.name]
        scale = abs(each.info.best - each.info.chance)
        errors += [one["se"] / scale / len(found[1]) for one in found[1]] if found and scale else []
    return math.hypot(*errors) / len(objectives)


def _best(
    objective: Objective, by_rate: Mapping[float, list[Mapping[str, float]]], count: int
) -> Best | None:
    """The learning rate that is best in the mean over all `count` seeds, with its results; None where none has them all."""
    sign = 1 if objective.info.higher_is_better else -1
    whole = [(rate, held) for rate, held in by_rate.items() if len(held) == count]
    return max(whole, key=lambda one: sign * fmean(each["value"] for each in one[1]), default=None)
