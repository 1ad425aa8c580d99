"""One training loop for every model and every task: batches in, a trained model and its loss curve out.

It knows no task and no spec. A model is anything with `.model(input_ids=...)` that gives `last_hidden_state`
(and `aux_loss` and `aux_losses`, if its layers add something to the loss), and `.logits(hidden)`; or, where sequences are of
classes, `.classified(input_ids=...)`, which gives scores of classes and that output. A module with a method `after_step` has it
called after each step of the optimizer, and one with `before_training` is told before the first step how many there will be.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from heddle.compose.memory import memory_told
from heddle.errors import HeddleError

IGNORE = -100
# The learning rate ends at this share of its peak.
FINAL_SHARE = 0.1
# On CUDA the loss is read back only every so many steps: a read waits for the device.
READ_EVERY = 25
# Steps run one by one before a CUDA graph is captured: kernels compile and the optimizer makes its state in
# them.
GRAPH_WARMUP = 3
# Shapes of batches that get a graph each; steps of others run one by one.
MOST_GRAPHS = 8
MEMORY_HINT = "a smaller train.batch_tokens or data.sequence_length needs less"

Batches = Callable[[int], tuple[Tensor, Tensor]]
OnStep = Callable[[int, int, float], None]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a model is trained: part of the key under which a result is remembered.

    `warmup` is a share of the steps. `precision` "auto" is bfloat16 autocast on CUDA and float32 on a CPU.
    """

    tokens: int
    batch_tokens: int = 4096
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    warmup: float = 0.1
    grad_clip: float = 1.0
    seed: int = 0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    betas: tuple[float, float] = (0.9, 0.98)

    def rows(self, sequence_length: int) -> int:
        """Sequences in one batch; at least one."""
        return max(1, self.batch_tokens // sequence_length)


@dataclass(frozen=True, slots=True)
class Fit:
    """What a training did: `losses` holds the loss of the task (in nats a label) of each step.

    What the layers add to it in training is not in there: `aux` holds that for each step by its names, without its factors.
    """

    steps: int
    tokens: int
    losses: tuple[float, ...]
    wall_s: float
    launch: Literal["eager", "graph"]
    aux: dict[str, tuple[float, ...]] = field(default_factory=dict)


def fit(
    model: nn.Module,
    batches: Batches,
    recipe: Recipe,
    *,
    on_step: OnStep | None = None,
    launch: Literal["eager", "graph"] = "eager",
) -> Fit:
    """Trains `model` in place with AdamW, linear warm-up and a cosine to 10 %.

    `batches(step)` gives inputs and targets, int64 [B, T], -100 where nothing is asked; targets that are classes of whole
    sequences are [B, 1]. The number of steps follows from the first batch: `recipe.tokens` over its size. On a CPU two runs from
    equal weights and batches are bit-equal.

    The loss that is told is that of the task; what is trained is that and the `aux_loss` of the model.

    `on_step(done, steps, loss)` is called after each step, on CUDA after every 25th and the last; what it
    raises stops the run. `launch="graph"` replays each step as one CUDA graph, one for each of the first shapes of batches
    (CUDA only; the model must not wait for the device in its forward).

    Raises `loss-not-finite` and `out-of-memory`, each naming the step.
    """
    device = next(model.parameters()).device
    assert launch == "eager" or device.type == "cuda"
    first = batches(0)
    steps = max(1, round(recipe.tokens / first[0].numel()))
    run = Trainer(model, recipe, steps, device)
    every = READ_EVERY if device.type == "cuda" else 1
    tokens, started = 0, time.perf_counter()
    model.train()
    for step in range(steps):
        with memory_told(f"training ran out of memory at step {step + 1} of {steps}", MEMORY_HINT):
            inputs, targets = first if step == 0 else batches(step)
            run.step(step, inputs, targets, graph=launch == "graph")
        tokens += inputs.numel()
        if (step + 1) % every == 0 or step + 1 == steps:
            loss = run.check(step)
            if on_step is not None:
                on_step(step + 1, steps, loss)
    model.eval()
    return run.fitted(tokens, time.perf_counter() - started, launch)


def learning_rate_at(step: int, steps: int, recipe: Recipe) -> float:
    """The learning rate of one step: a line up to the peak, then a cosine down to 10 % of it at the end."""
    warmup = round(recipe.warmup * steps)
    if step < warmup:
        return recipe.learning_rate * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return recipe.learning_rate * (FINAL_SHARE + (1.0 - FINAL_SHARE) * cosine)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices, which decay, and the rest, which must not.

    The rest is every vector (norm gains, biases, the gates' A_log and dt_bias), every embedding – a tied
    output head with it – and every parameter that carries `_no_weight_decay`.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        exempt = parameter.ndim < 2 or id(parameter) in embeddings or hasattr(parameter, "_no_weight_decay")
        (kept if exempt else decayed).append(parameter)
    groups = ({"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


def labelled_positions(targets: Tensor) -> Tensor | None:
    """Flat indices [N] of the labelled positions of `targets` [B, T], or None if all are."""
    positions = (targets.reshape(-1) != IGNORE).nonzero().squeeze(1)
    return None if positions.numel() == targets.numel() else positions


def labelled_logits(model: nn.Module, inputs: Tensor, positions: Tensor | None) -> Tensor:
    """Logits [N, vocab] at the flat `positions` alone (all of them for None): the head never sees the others.

    At a large vocabulary the head would otherwise cost more than the layers. Of a model with a readout: scores of the classes of
    the sequences at `positions`, [N, classes].
    """
    return _forward(model, inputs, positions)[0]


def _forward(model: nn.Module, inputs: Tensor, positions: Tensor | None) -> tuple[Tensor, Any]:
    """The labelled logits, and the output of the model behind them."""
    if callable(classified := getattr(model, "classified", None)):
        scores, found = classified(input_ids=inputs)
        return (scores if positions is None else scores.index_select(0, positions)), found
    backbone, head = cast(Callable[..., Any], model.model), cast(Callable[[Tensor], Tensor], model.logits)
    found = backbone(input_ids=inputs, use_cache=False)
    hidden: Tensor = found.last_hidden_state
    flat = hidden.reshape(-1, hidden.shape[-1])
    logits = head(flat if positions is None else flat.index_select(0, positions))
    return logits, found


def labelled_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats over the labelled positions; float32, whatever the model computes in.

    What the layers add to the loss in training is not in it.
    """
    positions = labelled_positions(targets)
    return _losses(model, inputs, positions, _labels(targets, positions)).task


def trained_loss(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """What training makes smaller: the loss of the task, all positions labelled, and what the layers add to it.

    Shapes:  inputs: [B, T];  labels: [B T];  out: [], float32.
    """
    return _losses(model, inputs, None, labels).trained


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """The context in which a forward runs at `precision` ("auto", "float32" or "bfloat16") on `device`."""
    if precision == "bfloat16" or (precision == "auto" and device.type == "cuda"):
        # Weights change every step, so cached casts would be stale under a CUDA graph.
        return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False)
    return nullcontext()


def _labels(targets: Tensor, positions: Tensor | None) -> Tensor:
    flat = targets.reshape(-1)
    return flat if positions is None else flat.index_select(0, positions)


@dataclass(frozen=True, slots=True)
class _Losses:
    """Of one batch: the loss of the task, what the layers add to it, and what that is made of, by name."""

    task: Tensor
    added: Tensor | None
    aux: dict[str, Tensor]

    @property
    def trained(self) -> Tensor:
        return self.task if self.added is None else self.task + self.added


def _losses(model: nn.Module, inputs: Tensor, positions: Tensor | None, labels: Tensor) -> _Losses:
    logits, found = _forward(model, inputs, positions)
    aux = getattr(found, "aux_losses", None) or {}
    return _Losses(F.cross_entropy(logits.float(), labels), getattr(found, "aux_loss", None), aux)


@dataclass(frozen=True, slots=True)
class Told:
    """What one step leaves on the device: its loss, the gradient's norm before clipping, the auxiliary losses."""

    loss: Tensor
    norm: Tensor
    aux: dict[str, Tensor]


class Trainer:
    """The state of one training: optimizer, curve on the device, captured step if there is one."""

    def __init__(self, model: nn.Module, recipe: Recipe, steps: int, device: torch.device) -> None:
        self.model, self.recipe, self.steps, self.device = model, recipe, steps, device
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        on_cuda = device.type == "cuda"
        # A CUDA graph reads the learning rate from the device, so there it is a tensor.
        self.rate: Tensor | float = torch.zeros((), device=device) if on_cuda else 0.0
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, recipe.weight_decay),
            lr=self.rate,
            betas=recipe.betas,
            fused=True,
            capturable=on_cuda,
        )
        self.losses = torch.zeros(steps, device=device)
        self.norms = torch.zeros(steps, device=device)
        self.aux: dict[str, Tensor] = {}
        acts = (getattr(module, "after_step", None) for module in model.modules())
        self.after_step: list[Callable[[], None]] = [act for act in acts if callable(act)]
        for module in model.modules():
            if callable(told := getattr(module, "before_training", None)):
                told(steps)
        self.checked = 0
        # A graph for each shape of batches, and how many steps of each shape there were.
        self.captured: dict[tuple[torch.Size, int], _Captured] = {}
        self.met: Counter[tuple[torch.Size, int]] = Counter()
        self.side: Any = torch.cuda.Stream() if on_cuda else None  # type: ignore[no-untyped-call]

    def step(self, step: int, inputs: Tensor, targets: Tensor, *, graph: bool) -> None:
        self.set_rate(step)
        positions = labelled_positions(targets)
        labels = _labels(targets, positions)
        told = (self._replayed if graph else self.update)(inputs, positions, labels)
        self.keep(step, told)

    def _replayed(self, inputs: Tensor, positions: Tensor | None, labels: Tensor) -> Told:
        """A step by the graph of its shape; one by one until that is captured."""
        shape = inputs.shape, labels.numel()
        if shape not in self.captured:
            if len(self.captured) == MOST_GRAPHS:
                return self.update(inputs, positions, labels)
            if self.met[shape] < GRAPH_WARMUP:
                self.met[shape] += 1
                return on_side_stream(lambda: self.update(inputs, positions, labels), self.side)
            self.captured[shape] = _Captured(self, inputs, positions, labels)
        return self.captured[shape].replay(inputs, positions, labels)

    def keep(self, step: int, told: Told) -> None:
        """Write down what a step has told."""
        self.losses[step], self.norms[step] = told.loss, told.norm
        if step == 0:
            self.aux = {name: torch.zeros_like(self.losses) for name in told.aux}
        assert told.aux.keys() == self.aux.keys(), "a model tells the same auxiliary losses at every step"
        for name, value in told.aux.items():
            self.aux[name][step] = value

    def update(self, inputs: Tensor, positions: Tensor | None, labels: Tensor) -> Told:
        """One forward, backward and optimizer step."""
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.device, self.recipe.precision):
            found = _losses(self.model, inputs, positions, labels)
        found.trained.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.parameters, self.recipe.grad_clip)
        self.optimizer.step()
        for act in self.after_step:
            act()
        return Told(found.task.detach(), norm, found.aux)

    def check(self, step: int) -> float:
        """The loss of `step`, after making sure that it and all before it are finite."""
        losses, norms = (
            self.losses[self.checked : step + 1].tolist(),
            self.norms[self.checked : step + 1].tolist(),
        )
        for offset, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise not_finite(self.checked + offset, self.steps, loss, norm)
        self.checked = step + 1
        return float(losses[-1])

    def fitted(self, tokens: int, wall_s: float, launch: Literal["eager", "graph"]) -> Fit:
        """What the training did, once its last step is done."""
        aux = {name: tuple(held.tolist()) for name, held in self.aux.items()}
        return Fit(self.steps, tokens, tuple(self.losses.tolist()), wall_s, launch, aux)

    def set_rate(self, step: int) -> None:
        """Give the optimizer the learning rate of `step`."""
        rate = learning_rate_at(step, self.steps, self.recipe)
        if isinstance(self.rate, Tensor):
            self.rate.fill_(rate)
        else:
            for group in self.optimizer.param_groups:
                group["lr"] = rate


class _Captured:
    """One training step as a CUDA graph: batches are copied into fixed buffers, then the step is replayed."""

    def __init__(self, run: Trainer, inputs: Tensor, positions: Tensor | None, labels: Tensor) -> None:
        self.inputs, self.labels = inputs.clone(), labels.clone()
        self.positions = None if positions is None else positions.clone()
        self.graph = torch.cuda.CUDAGraph()
        run.optimizer.zero_grad(set_to_none=True)
        # Graphs are replayed one after the other, and what one tells is read before the next: they share their memory.
        pool = next((one.graph.pool() for one in run.captured.values()), None)
        with torch.cuda.graph(self.graph, pool=pool):
            self.told = run.update(self.inputs, self.positions, self.labels)

    def replay(self, inputs: Tensor, positions: Tensor | None, labels: Tensor) -> Told:
        self.inputs.copy_(inputs)
        self.labels.copy_(labels)
        if positions is not None and self.positions is not None:
            self.positions.copy_(positions)
        self.graph.replay()
        return self.told


def on_side_stream(update: Callable[[], T], side: Any = None) -> T:
    """A step as it is run before its capture, on `side` or a new stream."""
    # torch asks that what is captured later runs a few times on a stream of its own first:
    # https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
    side = torch.cuda.Stream() if side is None else side  # type: ignore[no-untyped-call]
    current = torch.cuda.current_stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        result = update()
    current.wait_stream(side)
    return result


def not_finite(step: int, steps: int, loss: float, norm: float) -> HeddleError:
    """What ends a training whose loss or gradient is no number any more."""
    what = (
        f"the loss is {loss}"
        if not math.isfinite(loss)
        else f"the loss is {loss:.4g} but its gradient's norm is {norm}"
    )
    return HeddleError(
        "loss-not-finite",
        f"{what} at step {step + 1} of {steps}",
        hint="a lower train.learning_rate, a longer train.warmup, or train.precision: float32",
    )
