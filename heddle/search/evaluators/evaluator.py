"""How a candidate is judged: by training it, by rung 0, or by a function of the user's."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from heddle.compose.plan import plan
from heddle.errors import HeddleError, Where
from heddle.search.evaluate import Evaluate, Evaluation, Training, train_and_score
from heddle.search.evaluators.random_features import random_feature_score
from heddle.search.evaluators.reach import reach_score
from heddle.search.evaluators.supernet_evaluator import supernet_evaluator
from heddle.search.tasks import Score, Task
from heddle.specs import ModelSpec, SpecFile

# Judges a model at a task, in the task's metric: `scorer(model, task, seed=…, device=…)`.
Scorer = Callable[..., Score]
FIELD = "search.evaluator"


def _reach(model: ModelSpec, task: Task, *, seed: int, device: str) -> Score:  # noqa: ARG001
    return reach_score(model, task)


@dataclass(frozen=True, slots=True)
class Scored:
    """Evaluates by a scorer: the score is recorded as one of a training of no steps, which leaves no weights."""

    scorer: Scorer
    name: str

    def __call__(self, training: Training, task: Task) -> Evaluation:
        started, seed = time.perf_counter(), training.recipe.seed
        score: object = self.scorer(training.model, task, seed=seed, device=training.device)
        if not isinstance(score, Score):
            what = f"{self.name} gave {type(score).__name__}, not a heddle.search.tasks.Score"
            raise HeddleError("bad-argument", what, where=Where(path=FIELD))
        result = {
            "task": task.name,
            "metric": task.metric,
            "value": score.value,
            "se": score.se,
            "n": score.n,
            "normalised": task.normalised(score),
            "seed": seed,
            "steps": 0,
            "tokens": 0,
            "wall_s": time.perf_counter() - started,
            "losses": [],
            "aux": {},
            "extras": dict(score.extras),
            "parameters": plan(training.model).parameters,
        }
        return Evaluation(result)


NAMED: dict[str, Evaluate] = {
    "train": train_and_score,
    "random_features": Scored(random_feature_score, "random_features"),
    "reach": Scored(_reach, "reach"),
}


def evaluator_of(file: SpecFile) -> Evaluate:
    """How the search of `file` evaluates. Raises `bad-argument`, located, for a function that cannot be imported, and for a space
    whose models cannot share weights."""
    assert file.spec.search is not None
    name = file.spec.search.evaluator
    if name == "supernet":
        return supernet_evaluator(file)
    return NAMED.get(name) or own_evaluator(name, where=file.where(FIELD))


def own_evaluator(name: str, *, where: Where | None = None) -> Evaluate:
    """The user's function `module:function`, called as `function(model, task, seed=…, device=…)`; it gives a
    `heddle.search.tasks.Score` in the task's metric.

    The module is sent to the workers by its code, so they need no copy of it; what it imports they must have.

    Raises:
        HeddleError: "bad-argument" where it cannot be imported or is no function.
    """
    refuse = partial(HeddleError, "bad-argument", where=where or Where(path=FIELD))
    module_name, _, function = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        hint = "the folder of the module must be on PYTHONPATH"
        raise refuse(f"cannot import {module_name}: {type(error).__name__}: {error}", hint=hint) from error
    scorer = getattr(module, function, None)
    if not callable(scorer):
        what = f"{module_name} has no function {function!r}"
        raise refuse(what if scorer is None else f"{name} is no function")
    if not module_name.startswith("heddle."):
        # Heavy, and only needed here.
        from ray import cloudpickle

        cloudpickle.register_pickle_by_value(module)
    return Scored(scorer, name)
