"""Several trainings side by side on one device: on CUDA a step of all of them is one graph, with a branch for each.

Models that are small leave most of a GPU idle: a kernel of theirs fills a few of its multiprocessors, and the next one waits
for it. Branches of a graph need not wait for each other.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from heddle.compose.memory import memory_told
from heddle.compose.train import (
    GRAPH_WARMUP,
    MEMORY_HINT,
    READ_EVERY,
    Batches,
    Fit,
    Recipe,
    Told,
    Trainer,
    labelled_positions,
)
from heddle.errors import HeddleError

# Inputs [B, T] and targets [B, T] of a step.
Batch = tuple[Tensor, Tensor]


def fit_many(
    models: Sequence[nn.Module],
    batches: Sequence[Batches],
    recipes: Sequence[Recipe],
    *,
    launch: Literal["eager", "graph"] = "eager",
) -> list[Fit | HeddleError]:
    """Trains each of `models` in place, as `fit` does, with batches and a recipe of its own.

    All take the same number of steps: their recipes and first batches must ask for as many. Eagerly each training is what
    `fit` makes of it, to the last bit on a CPU. `launch="graph"` (CUDA only) replays a step of all of them as one graph; a batch
    may then not change its shape from step to step, and the head computes all positions, also those where nothing is asked.

    A training whose loss is no number any more ends with its error ("loss-not-finite") in place of a `Fit`; the others go on.
    `wall_s` is that of all.

    Raises:
        HeddleError: "out-of-memory", for all of them.
    """
    device = next(models[0].parameters()).device
    assert launch == "eager" or device.type == "cuda"
    first = [draw(0) for draw in batches]
    steps = {max(1, round(r.tokens / b[0].numel())) for r, b in zip(recipes, first, strict=True)}
    assert len(steps) == 1, f"all trainings take the same number of steps, not {sorted(steps)}"
    run = _Many(models, recipes, steps.pop(), device, launch=launch)
    for model in models:
        model.train()
    for step in range(run.steps):
        with memory_told(f"training ran out of memory at step {step + 1} of {run.steps}", MEMORY_HINT):
            run.step(step, first if step == 0 else [draw(step) for draw in batches])
    for model in models:
        model.eval()
    return run.ended()


class _Many:
    """The trainings, and the graph of their step once it is captured."""

    def __init__(
        self,
        models: Sequence[nn.Module],
        recipes: Sequence[Recipe],
        steps: int,
        device: torch.device,
        *,
        launch: Literal["eager", "graph"],
    ) -> None:
        self.steps, self.launch = steps, launch
        self.trainers = [
            Trainer(model, recipe, steps, device) for model, recipe in zip(models, recipes, strict=True)
        ]
        self.every = READ_EVERY if device.type == "cuda" else 1
        self.errors: dict[int, HeddleError] = {}
        self.tokens = [0] * len(self.trainers)
        self.graph: _StepGraph | None = None
        self.streams = [torch.cuda.Stream() for _ in models] if launch == "graph" else []  # type: ignore[no-untyped-call]
        self.started = time.perf_counter()

    def step(self, step: int, data: Sequence[Batch]) -> None:
        for trainer in self.trainers:
            trainer.set_rate(step)
        if self.launch == "eager":
            told = [_alone(trainer, batch) for trainer, batch in zip(self.trainers, data, strict=True)]
        elif step < GRAPH_WARMUP:
            told = _branches(self.trainers, self.streams, [_flat(batch) for batch in data])
        else:
            self.graph = self.graph or _StepGraph(self.trainers, self.streams, data)
            told = self.graph.replay(data)
        for index, (trainer, one) in enumerate(zip(self.trainers, told, strict=True)):
            trainer.keep(step, one)
            self.tokens[index] += data[index][0].numel()
        if (step + 1) % self.every == 0 or step + 1 == self.steps:
            self._check(step)

    def _check(self, step: int) -> None:
        for index, trainer in enumerate(self.trainers):
            if index in self.errors:
                continue
            try:
                trainer.check(step)
            except HeddleError as error:
                self.errors[index] = error

    def ended(self) -> list[Fit | HeddleError]:
        wall = time.perf_counter() - self.started
        return [
            self.errors.get(index) or trainer.fitted(self.tokens[index], wall, self.launch)
            for index, trainer in enumerate(self.trainers)
        ]


class _StepGraph:
    """One step of all trainings, captured: batches are copied into fixed buffers, then it is replayed."""

    def __init__(
        self, trainers: Sequence[Trainer], streams: Sequence[torch.cuda.Stream], data: Sequence[Batch]
    ) -> None:
        self.held = [(inputs.clone(), labels.clone()) for inputs, labels in map(_flat, data)]
        self.graph = torch.cuda.CUDAGraph()
        for trainer in trainers:
            trainer.optimizer.zero_grad(set_to_none=True)
        with torch.cuda.graph(self.graph):
            self.told = _branches(trainers, streams, self.held)

    def replay(self, data: Sequence[Batch]) -> list[Told]:
        for (inputs, labels), batch in zip(self.held, map(_flat, data), strict=True):
            assert batch[0].shape == inputs.shape, "a captured step takes batches of one shape"
            inputs.copy_(batch[0])
            labels.copy_(batch[1])
        self.graph.replay()
        return self.told


def _alone(trainer: Trainer, batch: Batch) -> Told:
    inputs, targets = batch
    positions = labelled_positions(targets)
    flat = targets.reshape(-1)
    return trainer.update(inputs, positions, flat if positions is None else flat.index_select(0, positions))


def _flat(batch: Batch) -> Batch:
    """Inputs [B, T], and the targets as the labels of all its positions. [B T]"""
    return batch[0], batch[1].reshape(-1)


def _branches(
    trainers: Sequence[Trainer], streams: Sequence[torch.cuda.Stream], data: Sequence[Batch]
) -> list[Told]:
    """A step of each training on its own stream, all between what came before and what comes after."""
    current, told = torch.cuda.current_stream(), []
    for trainer, stream, (inputs, labels) in zip(trainers, streams, data, strict=True):
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            told.append(trainer.update(inputs, None, labels))
    for stream in streams:
        current.wait_stream(stream)
    return told
