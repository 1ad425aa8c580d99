"""The supernets of a search: trained before its first round, kept in its folder, handed to its workers."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

from heddle.compose.train import Recipe
from heddle.errors import HeddleError
from heddle.search.driver import Driver
from heddle.search.evaluate import Training
from heddle.search.evaluations import SHARED_WEIGHTS, Request, weights_path
from heddle.search.evaluators.supernet_evaluator import SupernetEvaluator, train_supernet
from heddle.search.ledger import key_of
from heddle.search.lock import deterministically
from heddle.search.setting import Objective

# In the events, where trials have numbers from 0 and the reference is -1.
NUMBER = -2


def prepare(driver: Driver) -> None:
    """Trains the supernets of a search that is scored by them, unless its folder has them, and hands them to the workers.

    Weights are weights/supernet-<digest>.safetensors of the run; the ledger's entry of the training is written after them, so a
    search that was stopped takes up what was finished.

    Raises the reason of a training that failed: nothing can be scored then.
    """
    evaluator = driver.setting.evaluate
    if not isinstance(evaluator, SupernetEvaluator):
        return
    requests = {
        evaluator.key(recipe, one.task): _request(driver, evaluator, one, recipe)
        for one in driver.setting.objectives
        for recipe in one.recipes
    }
    new = {key for key, request in requests.items() if driver.evaluations.get(request) is None}
    driver.enter("training", f"{len(requests)} supernets")
    driver.evaluations.train_all(requests.values())
    for key, request in requests.items():
        entry = driver.evaluations.get(request)
        if entry is None:
            return
        if entry.result is None:
            reason = entry.reason or {}
            raise HeddleError(reason["code"], f"the supernet: {reason['message']}")
        path = weights_path(driver.setting.folder, request.spec)
        if not path.exists():
            hint = "begin the search anew in another folder"
            raise HeddleError("no-weights", f"{path} is gone, with the weights that specs share", hint=hint)
        evaluator.tickets[key] = driver.evaluations.share(path.read_bytes())
        if key in new:
            driver.tell(_told(entry.result), "info")


def _request(driver: Driver, evaluator: SupernetEvaluator, objective: Objective, recipe: Recipe) -> Request:
    setting = driver.setting
    inputs = {
        "space": evaluator.space,
        "data": objective.task.digest,
        "recipe": asdict(recipe),
        "environment": setting.environment,
        **({"deterministic": True} if setting.deterministic else {}),
    }
    call = partial(train_supernet, evaluator.paths)
    training = Training(evaluator.paths.columns[0], recipe, setting.device, keep_weights=True)
    return Request(
        NUMBER,
        f"{SHARED_WEIGHTS}{key_of(inputs)}",
        objective.stage,
        inputs,
        partial(deterministically, call) if setting.deterministic else call,
        (training, objective.shared),
    )


def _told(result: dict[str, Any]) -> str:
    kinds, wall = sum(result["kinds"]), result["wall_s"]
    peak = result["peak_bytes"] or result["training_bytes"]
    return (
        f"{result['task']}: {result['models']:,} models share {result['parameters']:,} parameters in {kinds} kinds of layers, "
        f"trained for {result['tokens']:,} tokens in {wall:.0f} s and {peak / 1e6:,.0f} MB"
    )
