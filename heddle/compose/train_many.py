"""Several trainings of one architecture as one: their parameters are stacked, and a step of all is a step of one model.

Models that are small leave most of a GPU idle, which waits for launches. Stacked, nine trainings launch as many kernels as one.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from heddle.compose.memory import memory_told
from heddle.compose.train import (
    GRAPH_WARMUP,
    MEMORY_HINT,
    READ_EVERY,
    Batches,
    Fit,
    Recipe,
    autocast,
    learning_rate_at,
    not_finite,
    on_side_stream,
    parameter_groups,
)
from heddle.compose.train_layers import CompiledLayers, compiled_pointwise, mean_losses
from heddle.errors import HeddleError

EPS = 1e-8
# What torch's clipping adds to a norm that it divides by.
CLIP_EPS = 1e-6


def fit_many(
    models: Sequence[nn.Module],
    batches: Sequence[Batches],
    recipes: Sequence[Recipe],
    *,
    launch: Literal["eager", "graph"] = "eager",
    compiled: bool = False,
) -> list[Fit | HeddleError]:
    """Trains each of `models` in place, as `fit` does, with batches of its own, a learning rate and a seed of its own.

    The models differ in nothing but their weights, and add no loss of their own; batches have one shape at a step. The head
    computes all positions, also those where nothing is asked. Results are those of `fit` but for rounding: products of
    stacked weights are summed in another order. `launch="graph"` (CUDA only) replays a step of all as one graph, one for
    each shape of batches. `compiled` has torch.compile make one function of each kind of
    layer and of what comes before and after the layers, once in a process however many models have such layers; it is for models
    whose layers take nothing from each other.

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
    run = _Many(models, recipes, steps.pop(), device, compiled=compiled)
    for model in models:
        model.train()
    for step in range(run.steps):
        drawn = first if step == 0 else [draw(step) for draw in batches]
        with memory_told(f"training ran out of memory at step {step + 1} of {run.steps}", MEMORY_HINT):
            run.step(step, *map(torch.stack, zip(*drawn, strict=True)), graph=launch == "graph")
    run.write_back()
    for model in models:
        model.eval()
    return run.ended(tokens=run.steps * first[0][0].numel(), launch=launch)


class _Many:
    """The stacked trainings: weights in one matrix with a row for each model, and the state of AdamW beside them.

    Shapes:  weights, their gradient and moments: [models, parameters of one];  what is told: [steps, models]
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        recipes: Sequence[Recipe],
        steps: int,
        device: torch.device,
        *,
        compiled: bool = False,
    ) -> None:
        self.models, self.recipes, self.steps, self.device = models, recipes, steps, device
        self.recipe = recipes[0]
        alike = {replace(each, learning_rate=0.0, seed=0) for each in recipes}
        assert len(alike) == 1, "the recipes differ in nothing but their learning rates and seeds"
        self.stacked = _Stacked(models)
        self.layers = CompiledLayers(models[0], self.stacked.shapes) if compiled else None
        self.adamw = compiled_pointwise(_adamw) if compiled else _adamw
        self.weights = self.stacked.weights
        self.mean, self.square = torch.zeros_like(self.weights), torch.zeros_like(self.weights)
        self.decay = self.stacked.decay(self.recipe.weight_decay)
        rates = [[learning_rate_at(step, steps, each) for each in recipes] for step in range(steps)]
        self.rates = torch.tensor(rates, device=device)[..., None]
        first, second = self.recipe.betas
        unbiased = [
            [1.0 - first ** (step + 1), math.sqrt(1.0 - second ** (step + 1))] for step in range(steps)
        ]
        self.unbiased = torch.tensor(unbiased, device=device)
        # A captured step finds its rates where each step puts them.
        self.rate, self.bias = self.rates[0].clone(), self.unbiased[0].clone()
        self.losses, self.norms = (torch.zeros(steps, len(models), device=device) for _ in range(2))
        self.errors: dict[int, HeddleError] = {}
        self.every, self.checked = READ_EVERY if device.type == "cuda" else 1, 0
        # A graph for each shape of batches, and how many steps of each shape there were.
        self.captured: dict[torch.Size, _Captured] = {}
        self.met: Counter[torch.Size] = Counter()
        self.started = time.perf_counter()

    def step(self, step: int, inputs: Tensor, targets: Tensor, *, graph: bool) -> None:
        self.rate.copy_(self.rates[step])
        self.bias.copy_(self.unbiased[step])
        labels = targets.flatten(1)
        if not graph:
            told = self.update(inputs, labels)
        elif self.met[inputs.shape] < GRAPH_WARMUP:
            told = on_side_stream(lambda: self.update(inputs, labels))
            self.met[inputs.shape] += 1
        else:
            if inputs.shape not in self.captured:
                self.captured[inputs.shape] = _Captured(self, inputs, labels)
            told = self.captured[inputs.shape].replay(inputs, labels)
        self.losses[step], self.norms[step] = told
        if (step + 1) % self.every == 0 or step + 1 == self.steps:
            self._check(step + 1)

    def update(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """One forward, backward and optimizer step of all; their losses, and the norms of their gradients."""
        with autocast(self.device, self.recipe.precision):
            losses = self._losses(inputs, labels)
        (gradient,) = torch.autograd.grad(losses.sum(), self.weights)
        norms: Tensor = torch.linalg.vector_norm(gradient, dim=1)
        with torch.no_grad():
            state = (self.weights.detach(), self.mean, self.square)
            clip = (self.recipe.grad_clip / (norms + CLIP_EPS)).clamp(max=1.0)[:, None]
            self.adamw(state, gradient, (clip, self.rate, self.bias), self.decay, self.recipe.betas)
        return losses.detach(), norms

    def _losses(self, inputs: Tensor, labels: Tensor) -> Tensor:
        if self.layers is None:
            return mean_losses(self.stacked.logits(inputs), labels)
        return self.layers.losses(self.weights, self.stacked.fixed, inputs, labels)

    def _check(self, done: int) -> None:
        told = zip(
            self.losses[self.checked : done].tolist(), self.norms[self.checked : done].tolist(), strict=True
        )
        for step, (losses, norms) in enumerate(told, start=self.checked):
            for index, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
                if index not in self.errors and not (math.isfinite(loss) and math.isfinite(norm)):
                    self.errors[index] = not_finite(step, self.steps, loss, norm)
        self.checked = done

    @torch.no_grad()
    def write_back(self) -> None:
        """Gives each model its weights."""
        for name, stacked in self.stacked.pieces().items():
            for model, one in zip(self.models, stacked, strict=True):
                model.get_parameter(name).copy_(one)

    def ended(self, *, tokens: int, launch: Literal["eager", "graph"]) -> list[Fit | HeddleError]:
        wall = time.perf_counter() - self.started
        return [
            self.errors.get(index) or Fit(self.steps, tokens, tuple(losses), wall, launch)
            for index, losses in enumerate(self.losses.T.tolist())
        ]


def _adamw(
    state: tuple[Tensor, Tensor, Tensor],
    gradient: Tensor,
    factors: tuple[Tensor, Tensor, Tensor],
    decay: Tensor,
    betas: tuple[float, float],
) -> None:
    """The update of torch.optim.AdamW, in place, of each row at its own rate, after clipping.

    Shapes:  state (weights and moments), gradient: [models, parameters];  decay: [parameters]
             factors: of the gradient [models, 1], the rate [models, 1], and what takes the bias of the moments away [2]
    """
    (weights, mean, square), (clip, rate, unbiased), (first, second) = state, factors, betas
    gradient = gradient * clip
    mean.lerp_(gradient, 1.0 - first)
    square.mul_(second).addcmul_(gradient, gradient, value=1.0 - second)
    root = (square.sqrt() / unbiased[1]).add_(EPS)
    weights.mul_(1.0 - rate * decay)
    weights.sub_(mean / root * (rate / unbiased[0]))


class _Stacked:
    """Models of one architecture as one: `weights` holds what is trained, a row for each model.

    The parameters are views of it, whose gradients come back as one.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self.model = models[0]
        self.shapes = {name: p.shape for name, p in self.model.named_parameters() if p.requires_grad}
        rows = [
            torch.cat([model.get_parameter(name).detach().flatten() for name in self.shapes])
            for model in models
        ]
        self.weights = torch.stack(rows).requires_grad_()
        held = [[*model.named_parameters(), *model.named_buffers()] for model in models]
        fixed = [{name: one.detach() for name, one in each if name not in self.shapes} for each in held]
        self.fixed = {name: torch.stack([each[name] for each in fixed]) for name in fixed[0]}
        acts = [module for module in self.model.modules() if callable(getattr(module, "after_step", None))]
        assert not acts, "modules that act after a step are not stacked"

    def decay(self, weight_decay: float) -> Tensor:
        """The weight decay of each weight. [parameters of one]"""
        of = {
            id(p): group["weight_decay"]
            for group in parameter_groups(self.model, weight_decay)
            for p in group["params"]
        }
        sizes = [
            (of[id(self.model.get_parameter(name))], shape.numel()) for name, shape in self.shapes.items()
        ]
        return torch.cat([torch.full((size,), decay, device=self.weights.device) for decay, size in sizes])

    def pieces(self) -> dict[str, Tensor]:
        """The parameters of all models by name, stacked: views of `weights`."""
        split = torch.split(self.weights, [shape.numel() for shape in self.shapes.values()], dim=1)
        return {
            name: piece.reshape(len(piece), *shape)
            for (name, shape), piece in zip(self.shapes.items(), split, strict=True)
        }

    def logits(self, inputs: Tensor) -> Tensor:
        """Of all models at all positions. inputs: [models, B, T];  out: [models, B T, vocabulary]"""
        return vmap(self._logits)(self.pieces(), self.fixed, inputs)

    def _logits(self, trained: dict[str, Tensor], fixed: dict[str, Tensor], inputs: Tensor) -> Tensor:
        weights = {f"model.{name}": one for name, one in (trained | fixed).items()}
        return functional_call(_Logits(self.model), weights, (inputs,))  # type: ignore[no-any-return]


class _Logits(nn.Module):
    """A model as one function of its inputs. inputs: [B, T];  out: [B T, vocabulary]"""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        found = self.model.model(input_ids=inputs, use_cache=False)  # type: ignore[operator]
        assert getattr(found, "aux_loss", None) is None, "losses that layers add are not stacked"
        return self.model.logits(found.last_hidden_state.flatten(0, 1))  # type: ignore[no-any-return, operator]


class _Captured:
    """One step of all trainings as a CUDA graph: batches are copied into fixed buffers, then it is replayed."""

    def __init__(self, run: _Many, inputs: Tensor, labels: Tensor) -> None:
        self.inputs, self.labels = inputs.clone(), labels.clone()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.told = run.update(self.inputs, self.labels)

    def replay(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        assert inputs.shape == self.inputs.shape, "a captured step takes batches of one shape"
        self.inputs.copy_(inputs)
        self.labels.copy_(labels)
        self.graph.replay()
        return self.told
