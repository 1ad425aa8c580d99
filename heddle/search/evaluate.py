"""One evaluation: a spec is built, trained at a task with one seed, and scored. Runs in a worker."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from safetensors.torch import save

from heddle.compose.build import build
from heddle.compose.memory import memory_told
from heddle.compose.train import MEMORY_HINT, Recipe, fit
from heddle.search.learned_share import learned_shares
from heddle.search.results import Evaluation
from heddle.search.tasks import Task, batches
from heddle.search.training import weights_of
from heddle.specs import ModelSpec

__all__ = ["Evaluate", "Evaluation", "Training", "thinned", "train_and_score"]

CURVE_POINTS = 64


@dataclass(frozen=True, slots=True)
class Training:
    """What to train besides the task: with it, everything that decides the result."""

    model: ModelSpec
    recipe: Recipe
    device: str
    keep_weights: bool = False


# How a search evaluates: `train_and_score`, or a function of the caller's that keeps its promise. It must be
# one that cloudpickle can send to a worker.
Evaluate = Callable[[Training, Task], Evaluation]


def train_and_score(training: Training, task: Task) -> Evaluation:
    """Build, train and score one model.

    Raises:
        HeddleError: "loss-not-finite", "out-of-memory".
    """
    recipe, started = training.recipe, time.perf_counter()
    with memory_told("no memory for the model and its evaluation", MEMORY_HINT):
        model = build(training.model, seed=recipe.seed, device=training.device)
        fitted = fit(model, batches(task, recipe, training.device), recipe)
        with learned_shares(model) as shares:
            score = task.evaluate(model, device=training.device)
    result = {
        "task": task.name,
        "metric": task.metric,
        "value": score.value,
        "se": score.se,
        "n": score.n,
        "normalised": task.normalised(score),
        "seed": recipe.seed,
        "steps": fitted.steps,
        "tokens": fitted.tokens,
        "wall_s": time.perf_counter() - started,
        "losses": thinned(fitted.losses),
        "aux": {name: thinned(values) for name, values in fitted.aux.items()},
        "extras": dict(score.extras),
        "learned_share": shares,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    weights = save(weights_of(model), metadata={"format": "pt"}) if training.keep_weights else None
    return Evaluation(result, weights)


def thinned(losses: Sequence[float], points: int = CURVE_POINTS) -> list[tuple[int, float]]:
    """(step, mean loss since the point before) at `points` evenly spread steps at most, counted from 1."""
    count = min(points, len(losses))
    ends = [(index + 1) * len(losses) // count for index in range(count)]
    starts = [0, *ends[:-1]]
    return [(end, sum(losses[start:end]) / (end - start)) for start, end in zip(starts, ends, strict=True)]
