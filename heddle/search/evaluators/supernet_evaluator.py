"""A search whose specs are scored by the weights that they share: one supernet for each task, trained before the first round."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from heddle.compose.memory import memory_told
from heddle.compose.plan import plan
from heddle.compose.train import MEMORY_HINT, Recipe
from heddle.search.evaluate import Evaluation, Training, thinned, train_and_score
from heddle.search.evaluators.supernet import Path, Supernet, fit_supernet, memory_of
from heddle.search.evaluators.supernet_paths import Paths, paths_of
from heddle.search.learned_share import learned_shares
from heddle.search.ledger import key_of
from heddle.search.tasks import Task, batches
from heddle.specs import SpecFile

# The supernets that this process has at hand; a worker scores many specs with each.
MOST_HELD = 2
_held: dict[str, Supernet] = {}


def made(paths: Paths, *, seed: int, device: str) -> Supernet:
    """The supernet of all `paths`, untrained."""
    return Supernet(paths.columns, seed=seed, device=device)


def recipe_of(net: Supernet, recipe: Recipe) -> Recipe:
    """The recipe of one training with so many times the tokens that a kind sees as many as in a training of its own."""
    return replace(recipe, tokens=recipe.tokens * net.most_kinds)


def drawn(net: Supernet, paths: Paths, *, seed: int, step: int) -> Path:
    """The path of a step: all models of the space are equally likely (uniform path sampling)."""
    return tuple(net.columns[column][layer] for layer, column in enumerate(paths.draw(seed=seed, step=step)))


def train_supernet(paths: Paths, training: Training, task: Task) -> Evaluation:
    """A supernet of `paths` trained for a task with the recipe of `training`, and its weights: on a CPU the same bits for a seed.

    Raises `loss-not-finite`, `out-of-memory`, and what making the supernet raises.
    """
    recipe, device, started = training.recipe, training.device, time.perf_counter()
    on_cuda = device == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    with memory_told("no memory for the supernet", MEMORY_HINT):
        net = made(paths, seed=recipe.seed, device=device)
        fitted = fit_supernet(
            net,
            lambda step: drawn(net, paths, seed=recipe.seed, step=step),
            batches(task, recipe, device),
            recipe_of(net, recipe),
        )
    result = {
        "task": task.name,
        "seed": recipe.seed,
        "models": paths.count,
        "kinds": [len(net.kinds[index]) for index in range(len(net.kinds))],  # type: ignore[arg-type]
        **memory_of(net),
        "peak_bytes": torch.cuda.max_memory_allocated() if on_cuda else None,
        "steps": fitted.steps,
        "tokens": fitted.tokens,
        "losses": thinned(fitted.losses),
        "wall_s": time.perf_counter() - started,
    }
    return Evaluation(result, net.saved())


@dataclass(slots=True)
class SupernetEvaluator:
    """Scores a spec by its path through a supernet that was trained for the task with the search's seed and recipe.

    A training with another seed is one of its own, from scratch: so the winner is confirmed. `tickets` are of the
    weights that the driver has trained, by `key`; without one a process trains the supernet itself, and keeps it.
    """

    paths: Paths
    seed: int
    space: str
    tickets: dict[str, Any] = field(default_factory=dict)

    def __call__(self, training: Training, task: Task) -> Evaluation:
        if training.recipe.seed != self.seed:
            return train_and_score(training, task)
        started, net = time.perf_counter(), self._net(training, task)
        path = net.select(net.path_of(training.model))
        with learned_shares(path) as shares:
            score = task.evaluate(path, device=training.device)
        result = {
            "task": task.name,
            "metric": task.metric,
            "value": score.value,
            "se": score.se,
            "n": score.n,
            "normalised": task.normalised(score),
            "seed": training.recipe.seed,
            "steps": 0,
            "tokens": 0,
            "wall_s": time.perf_counter() - started,
            "losses": [],
            "aux": {},
            "extras": dict(score.extras),
            "learned_share": shares,
            "parameters": plan(training.model).parameters,
        }
        return Evaluation(result)

    def key(self, recipe: Recipe, task: Task) -> str:
        """Names the supernet of a task and a recipe."""
        return key_of({"space": self.space, "data": task.digest, "recipe": asdict(recipe)})

    def _net(self, training: Training, task: Task) -> Supernet:
        key = self.key(training.recipe, task)
        held = f"{key} {training.device}"
        if held not in _held:
            weights = self._weights(key, training, task)
            net = made(self.paths, seed=self.seed, device=training.device)
            net.load(weights)
            net.eval()
            while len(_held) >= MOST_HELD:
                _held.pop(next(iter(_held)))
            _held[held] = net
        return _held[held]

    def _weights(self, key: str, training: Training, task: Task) -> bytes:
        if key not in self.tickets:
            found = train_supernet(self.paths, training, task).weights
            assert found is not None
            return found
        # Heavy, and here in a worker of its.
        import ray

        weights: bytes = ray.get(self.tickets[key])
        return weights


def supernet_evaluator(file: SpecFile) -> SupernetEvaluator:
    """The evaluator of a search of `file`. Raises what `paths_of` raises."""
    paths = paths_of(file)
    return SupernetEvaluator(paths, file.spec.train.seed, paths.digest())
