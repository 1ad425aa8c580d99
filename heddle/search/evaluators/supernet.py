"""A supernet: all models of a space in one module, whose weights they share."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from heddle.compose.build import build_causal_lm, config_for
from heddle.compose.constant_stream import readers_of
from heddle.compose.hf.config import HeddleConfig
from heddle.compose.hf.model import HeddleForCausalLM, HeddleModel
from heddle.compose.memory import memory_told
from heddle.compose.train import (
    MEMORY_HINT,
    READ_EVERY,
    Batches,
    Fit,
    OnStep,
    Recipe,
    Trainer,
    labelled_positions,
)
from heddle.errors import HeddleError
from heddle.search.training import weights_of
from heddle.specs import ModelSpec

# Which of the kinds of each layer a model has.
Path = tuple[int, ...]
# What may differ between the models of a supernet.
OWN_FIELDS = ("layers", "lower_bounds_width", "spec")
BOUNDS = "lower_bounds"


class Supernet(nn.Module):
    """Each kind of layer that some model has at each place, with one embedding, last norm and head for all.

        f_p = head ∘ kind(p_L at L) ∘ … ∘ kind(p_1 at 1) ∘ embedding        (arXiv 1904.00420; of hybrids, 2508.15884)

    Two models share the layers that are the same kind at the same place, and the ends; each kind has weights of its own, of
    whatever shapes. Equal plain data make an equal kind. `columns[m]` is the path of the m-th of `models`, `kinds[i]` what
    stands at layer i.

    Raises `bad-argument` for models that differ in more than their layers, and for a shared block.
    """

    def __init__(
        self, models: Sequence[ModelSpec], *, seed: int = 0, device: str | torch.device = "cpu"
    ) -> None:
        super().__init__()
        built = [build_causal_lm(model, seed=seed) for model in models]
        for one in built:
            _check_alike(built[0].config, one.config)
        self.kinds = nn.ModuleList(nn.ModuleList() for _ in built[0].config.layers)
        self._data: list[dict[str, tuple[int, dict[str, Any]]]] = [{} for _ in self.kinds]
        # Whether a kind asks for lower bounds, by layer.
        self._bounded: list[list[bool]] = [[] for _ in self.kinds]
        self.columns = [self._taken(one) for one in built]
        widest = max(built, key=lambda one: one.config.lower_bounds_width)
        self.bounds: nn.Parameter | None = widest.model.lower_bounds
        self.net: HeddleForCausalLM = built[0]
        self.select(self.columns[0])
        self.to(device)

    def _taken(self, built: HeddleForCausalLM) -> Path:
        """The path of a model; its layers of new kinds become those of the supernet."""
        path = []
        for index, data in enumerate(built.config.layers):
            known, key = self._data[index], json.dumps(data, sort_keys=True)
            if key not in known:
                known[key] = (len(known), data)
                self._at(index).append(built.model.layers[index])
                self._bounded[index].append(built.config.lower_bounds_width > 0)
            path.append(known[key][0])
        return tuple(path)

    def _at(self, index: int) -> nn.ModuleList:
        return cast(nn.ModuleList, self.kinds[index])

    @property
    def most_kinds(self) -> int:
        """The kinds of the layer that has most."""
        return max(len(self._at(index)) for index in range(len(self.kinds)))

    @property
    def model(self) -> HeddleModel:
        """The model of the selected path without its head, as training asks for it."""
        return self.net.model

    def logits(self, hidden: Tensor) -> Tensor:
        """As `HeddleForCausalLM.logits`."""
        return self.net.logits(hidden)

    def path_of(self, model: ModelSpec) -> Path:
        """Raises `bad-argument` for a model with a layer that the supernet does not have."""
        config = config_for(model)
        _check_alike(self.net.config, config)
        found = []
        for index, (known, data) in enumerate(zip(self._data, config.layers, strict=True)):
            kind = known.get(json.dumps(data, sort_keys=True))
            if kind is None:
                what = (
                    f"layer {index} of this model, {data['mixer']['kind']}, is none of those of the supernet"
                )
                raise HeddleError("bad-argument", what)
            found.append(kind[0])
        return tuple(found)

    def select(self, path: Path) -> HeddleForCausalLM:
        """The model of `path` with the shared weights: one object for all paths, which the next call makes another of."""
        chosen = [self._at(index)[kind] for index, kind in enumerate(path)]
        backbone = self.net.model
        backbone.layers = nn.ModuleList(chosen)
        layers = [list(known.values())[kind][1] for known, kind in zip(self._data, path, strict=True)]
        backbone.config.layers = layers
        backbone.handed_on = {layer["skip"]["source"] for layer in layers if layer.get("skip")}
        backbone.wanted = frozenset(
            taken for one in backbone.layers.modules() for taken in getattr(one, "takes", ())
        )
        backbone.constant_readers = readers_of(layers)
        asks = any(self._bounded[index][kind] for index, kind in enumerate(path))
        backbone.lower_bounds = self.bounds if asks else None
        return self.net

    @torch.no_grad()
    def copied(self, model: ModelSpec) -> HeddleForCausalLM:
        """A model of its own that begins with the weights of its path."""
        alone = build_causal_lm(model, device=self.net.device)
        alone.train(self.training)
        held = self.select(self.path_of(model)).state_dict()
        for name, tensor in alone.state_dict().items():
            # A gate narrower than the table of bounds has the first of its columns.
            tensor.copy_(held[name][:, : tensor.shape[1]] if name.endswith(BOUNDS) else held[name])
        return alone

    def saved(self) -> bytes:
        """The weights as safetensors, each once."""
        return bytes(save(weights_of(self), metadata={"format": "pt"}))

    @torch.no_grad()
    def load(self, weights: bytes) -> None:
        """Takes what `saved` gave. Raises `no-weights` for those of another supernet."""
        given, own = load(weights), self.state_dict()
        shapes = {name: tensor.shape for name, tensor in weights_of(self).items()}
        if shapes != {name: tensor.shape for name, tensor in given.items()}:
            raise HeddleError("no-weights", "these are the weights of another supernet")
        for name, tensor in given.items():
            own[name].copy_(tensor)


def _check_alike(one: HeddleConfig, other: HeddleConfig) -> None:
    first, second = (config.to_dict() for config in (one, other))
    differ = [name for name in first if name not in OWN_FIELDS and first[name] != second[name]]
    if differ or len(one.layers) != len(other.layers):
        what = f"models that share weights differ in their layers alone, these in {differ[0] if differ else 'their number'}"
        raise HeddleError("bad-argument", what)
    if any(layer.get("weights_of") is not None for layer in other.layers):
        raise HeddleError(
            "bad-argument", "a supernet has each layer's own weights, and this model has a shared block"
        )


def fit_supernet(
    net: Supernet,
    paths: Callable[[int], Path],
    batches: Batches,
    recipe: Recipe,
    *,
    on_step: OnStep | None = None,
) -> Fit:
    """Trains the weights of `net`, step by step those of one path, `paths(step)`: the others keep theirs, and their moments.

    Else as `heddle.compose.train.fit`, step by step from Python; auxiliary losses, which not every path has, are not told.

    Raises `loss-not-finite` and `out-of-memory`.
    """
    device = next(net.parameters()).device
    first = batches(0)
    steps = max(1, round(recipe.tokens / first[0].numel()))
    run, tokens, started = Trainer(net, recipe, steps, device), 0, time.perf_counter()
    every = READ_EVERY if device.type == "cuda" else 1
    net.train()
    for step in range(steps):
        with memory_told(f"the supernet ran out of memory at step {step + 1} of {steps}", MEMORY_HINT):
            inputs, targets = first if step == 0 else batches(step)
            net.select(paths(step))
            _step(run, step, inputs, targets)
        tokens += inputs.numel()
        if (step + 1) % every == 0 or step + 1 == steps:
            loss = run.check(step)
            if on_step is not None:
                on_step(step + 1, steps, loss)
    net.eval()
    return run.fitted(tokens, time.perf_counter() - started, "eager")


def _step(run: Trainer, step: int, inputs: Tensor, targets: Tensor) -> None:
    run.set_rate(step)
    positions, flat = labelled_positions(targets), targets.reshape(-1)
    told = run.update(inputs, positions, flat if positions is None else flat.index_select(0, positions))
    run.losses[step], run.norms[step] = told.loss, told.norm


def memory_of(net: Supernet) -> Mapping[str, int]:
    """Parameters, how many of them one path has at most, and bytes of weights, gradients and Adam's two moments in float32.

    Activations are those of one path.
    """
    count = sum(parameter.numel() for parameter in net.parameters())
    ends = count - sum(parameter.numel() for parameter in net.kinds.parameters())
    largest = ends + sum(
        max(sum(parameter.numel() for parameter in kind.parameters()) for kind in cast(nn.ModuleList, kinds))
        for kinds in net.kinds
    )
    return {"parameters": count, "of_one_path": largest, "training_bytes": 16 * count}
