"""The end of a search: the front timed again, the winner confirmed on fresh seeds, and put where it can be
used."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from functools import partial
from itertools import product
from math import inf

from heddle.compose.hf.native import AUTO
from heddle.compose.plan import plan
from heddle.compose.targets.demand import meeting
from heddle.compose.train import Recipe
from heddle.search import pareto, space
from heddle.search.confirm import paired_difference, unseen_seeds
from heddle.search.driver import Driver
from heddle.search.durable import write_json, write_whole
from heddle.search.evaluations import Request, weights_path
from heddle.search.export import export_run
from heddle.search.record import (
    BEST_FOLDER,
    CONFIRM_FILE,
    EXPORT_FOLDER,
    BudgetInfo,
    Confirm,
    Difference,
    Trial,
    assemble,
)
from heddle.search.setting import Objective
from heddle.search.timing_subject import routes
from heddle.specs import loads

# Phases of the model in use, which the front is timed in also where no budget asks for them.
IN_USE = ("decode", "prefill")
# A prefill that no budget asks for is timed at a budget's context, up to these tokens: it costs the search
# time.
PREFILL_AT_MOST = {"cpu": 2048, "cuda": 32_768}


def remeasure_front(driver: Driver, best: int) -> int:
    """Time the front and the reference again, in both phases of use too; gives the number of the best, until now `best`.

    The best is the first in quality that keeps its budgets this time too: of many measured specs those that
    seem fast were partly lucky. When none keeps them the best stays, and the record shows it.
    """
    driver.enter("remeasure")
    of_front = _front(driver)
    members = [number for number in driver.trials if number in of_front or number < 0]
    requests = {number: _again(driver, number) for number in members}
    driver.evaluations.time_all(request for each in requests.values() for request in each.values())
    for number, each in requests.items():
        _record_again(driver, number, each)
    front = [driver.trials[number] for number in members if number >= 0]
    kept = [trial for trial in front if all(v <= 0 for v in again_violations(driver, trial).values())]
    chosen = pareto.best(kept)
    if chosen is None:
        driver.warn("no member of the Pareto front kept its budgets when timed again; see the report")
        return best
    return chosen.number


def again_violations(driver: Driver, trial: Trial) -> dict[str, float]:
    """The constraints of `trial` by its second timing; a budget that could not be timed again is not kept."""
    missing = {one.timing: inf for one in driver.setting.timed if one.timing not in trial.remeasured}
    return missing or pareto.violations(trial.remeasured, driver.setting.budgets, trial.figures)


def _front(driver: Driver) -> set[int]:
    return {trial.number for trial in pareto.front(_own(driver), driver.setting.infos)}


def _own(driver: Driver) -> list[Trial]:
    return [trial for number, trial in driver.trials.items() if number >= 0]


def _again(driver: Driver, number: int) -> dict[str, Request]:
    """Requests for a fresh timing at every budget, and of a phase that has none at the same places."""
    one = _candidate(driver, driver.trials[number])
    budgets = driver.setting.timed
    places = {(b.batch, b.context, b.relative_to) for b in budgets if b.phase in IN_USE}
    wanted = list(budgets)
    for (batch, context, beside), phase in product(sorted(places, key=repr), IN_USE):
        tokens = min(context, PREFILL_AT_MOST[driver.setting.device]) if phase == "prefill" else context
        label = f"{phase}_ms@{batch}x{tokens}"
        if all(budget.phase != phase for budget in budgets) and all(b.timing != label for b in wanted):
            wanted.append(BudgetInfo(label, phase, inf, beside, batch, tokens))
    # The reference is as fresh as it was beside every other model.
    weights = driver.evaluations.kept_weights(one.hash) if number >= 0 and routes(one.model) else None
    timing = partial(driver.setting.timing, purpose="again", weights=weights)
    return {each.timing: timing(number, one, each) for each in wanted}


def _record_again(driver: Driver, number: int, requests: dict[str, Request]) -> None:
    entries = {label: driver.evaluations.get(request) for label, request in requests.items()}
    keys = {label: entry.key for label, entry in entries.items() if entry is not None and entry.ok}
    event = driver.log.write("remeasured", number=number, latency=keys)
    asked, told = driver.events_of(number)
    driver.trials[number] = assemble(driver.evaluations.ledger.folder, asked, told, event)


def _candidate(driver: Driver, trial: Trial) -> space.Candidate:
    return space.candidate(driver.setting.file, trial.params, trial.layers)


def confirm(driver: Driver, number: int) -> None:
    """Train the winner and the uniform placement of its counts with fresh seeds, and write confirm.json.

    Where a task has several learning rates, both are trained with the one that was best for the winner.
    When the winner is the uniform placement only it is trained: a difference would be zero by construction.
    """
    setting, trial = driver.setting, driver.trials[number]
    if setting.file.space.placement is None or setting.confirm_seeds < 1:
        return
    winner = _candidate(driver, trial)
    evenly = setting.file.placed_as(winner.layers, winner.values)
    uniform = space.candidate(setting.file, winner.values, evenly)
    same = uniform.hash == winner.hash
    seeds = unseen_seeds(setting.objectives[0].recipe.seed, setting.confirm_seeds)
    sides = [winner] if same else [winner, uniform]
    driver.enter("confirm", f"{len(sides)} placements, {len(seeds)} seeds")
    requests = {
        (one.hash, each.info.name, seed): setting.training(
            number, one, each, recipe=_best_recipe(trial, each), seed=seed
        )
        for seed, one, each in product(seeds, sides, setting.objectives)
    }
    driver.evaluations.train_all(requests.values())
    if driver.stopping:
        return
    scores, failures = _scores(driver, requests)
    result = Confirm(
        number=number,
        hash=winner.hash,
        layers=winner.layers,
        uniform_hash=uniform.hash,
        uniform_layers=uniform.layers,
        same=same,
        seeds=seeds,
        scores={o.info.name: _values(scores, winner.hash, o, seeds) for o in setting.objectives},
        differences=() if same else _differences(driver, scores, (winner.hash, uniform.hash), seeds),
        failures=failures,
        learning_rates={
            o.info.name: rate for o in setting.objectives if (rate := trial.best_rate(o.stage)) is not None
        },
    )
    write_json(setting.folder / CONFIRM_FILE, asdict(result))
    driver.log.write("confirm_finished", number=number, same=same)


def _best_recipe(trial: Trial, objective: Objective) -> Recipe:
    """The recipe of the learning rate that counts."""
    rate = trial.best_rate(objective.stage)
    return next((one for one in objective.recipes if one.learning_rate == rate), objective.recipe)


Scores = dict[tuple[str, str, int], float]


def _scores(driver: Driver, requests: dict[tuple[str, str, int], Request]) -> tuple[Scores, tuple[str, ...]]:
    scores, failures = {}, []
    for (spec, task, seed), request in requests.items():
        entry = driver.evaluations.get(request)
        assert entry is not None
        if entry.result is not None:
            scores[spec, task, seed] = float(entry.result["value"])
        elif entry.reason is not None:
            failures.append(f"{spec} {task} seed {seed}: {entry.reason['code']}: {entry.reason['message']}")
    return scores, tuple(failures)


def _values(scores: Scores, spec: str, objective: Objective, seeds: tuple[int, ...]) -> tuple[float, ...]:
    places = [(spec, objective.info.name, seed) for seed in seeds]
    return tuple(scores[place] for place in places if place in scores)


def _differences(
    driver: Driver, scores: Scores, pair: tuple[str, str], seeds: tuple[int, ...]
) -> tuple[Difference, ...]:
    """One difference a task, over the seeds with which both sides were trained to the end; at least two."""
    found = []
    for objective in driver.setting.objectives:
        task = objective.info.name
        both = tuple(seed for seed in seeds if all((spec, task, seed) in scores for spec in pair))
        if len(both) >= 2:
            sides = (_values(scores, spec, objective, both) for spec in pair)
            found.append(paired_difference(objective.info, *sides))
    return tuple(found)


def keep_best(driver: Driver, number: int, *, export: bool) -> None:
    """Write best/: spec.yaml, model.safetensors, and with `export` a folder that plain transformers loads."""
    trial, folder = driver.trials[number], driver.setting.folder
    best = folder / BEST_FOLDER
    spec, exported = best / "spec.yaml", best / EXPORT_FOLDER
    unchanged = spec.exists() and spec.read_text() == trial.spec
    if exported.exists() and not unchanged:
        shutil.rmtree(exported)
    # What a driver was writing when it was killed.
    for half in best.glob(f".{EXPORT_FOLDER}.*"):
        shutil.rmtree(half)
    write_whole(spec, trial.spec.encode())
    weights = weights_path(folder, trial.hash)
    if not weights.exists():
        # An evaluator of the caller's need not give any.
        driver.warn(f"trial {number} has no weights to export")
        return
    write_whole(best / "model.safetensors", weights.read_bytes())
    if export and not exported.exists():
        driver.enter("export")
        runtime = plan(loads(trial.spec).spec.model).runtime()
        target = meeting(driver.setting.must_fit, runtime)
        export_run(folder, exported, trial=number, target=AUTO if target is None else target.name)
