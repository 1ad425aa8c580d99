"""Stacked models layer by layer, each kind of layer compiled once for all models of a process.

A whole model as one graph would be compiled anew for every placement of its layers; placements of two kinds share two graphs,
one of the embedding, and one of what comes after the layers.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Set
from functools import cache
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

from heddle.compose.cache import Call
from heddle.compose.hf.model import scaled_logits
from heddle.compose.joined_products import join_products
from heddle.compose.modules.layer import HeddleLayer
from heddle.compose.modules.norm import norm_module
from heddle.compose.modules.rope import rotary_tables
from heddle.compose.modules.site import Site
from heddle.compose.train import IGNORE

Weights = Mapping[str, Tensor]
Shapes = Mapping[str, torch.Size]
# Names and shapes of the parameters in a row of weights, in order.
Parts = tuple[tuple[str, torch.Size], ...]
BACKEND = "inductor"
# Torch before 2.12 counts compilations of a function for all that share its code.
_ISOLATES = "isolate_recompiles" in inspect.signature(torch.compile).parameters
RECOMPILES = 256


class CompiledLayers:
    """The function of models that differ in their weights alone, whose layers take nothing from each other.

    `shapes` names the parameters that lie in a row of their weights, in order. The first call with layers of a kind, or with
    inputs of another shape, compiles.
    """

    def __init__(self, model: nn.Module, shapes: Shapes) -> None:
        net: Any = model.model
        taken = [
            *net.handed_on,
            *net.wanted,
            *net.constant_readers,
            *(layer.get("weights_of") for layer in net.config.layers),
        ]
        assert net.lower_bounds is None, "layers with a common table of bounds are not alone"
        assert not any(each is not None for each in taken), "layers that take from each other are not alone"
        self.config, self.tied = net.config, "lm_head.weight" not in shapes
        groups = [
            (which, tuple(group)) for which, group in groupby(shapes.items(), lambda item: _place(item[0]))
        ]
        self.places = [which for which, _ in groups]
        assert len(set(self.places)) == len(self.places), "the weights of a layer lie side by side"
        self.sizes = [sum(shape.numel() for _, shape in group) for _, group in groups]
        parts = {
            which: tuple((name.removeprefix(which), shape) for name, shape in group)
            for which, group in groups
        }
        about = (net.config.hidden_size, len(net.layers), net.config.norm_eps, net.config.context_length)
        self.layers = [
            _layer(json.dumps(layer, sort_keys=True), parts[_layer_name(index)], about)
            for index, layer in enumerate(net.config.layers)
        ]
        self.rotations = [_rotations(layer) for layer in net.layers]
        self.tables: dict[Any, tuple[Tensor, Tensor]] = {}

    def losses(self, weights: Tensor, fixed: Weights, inputs: Tensor, labels: Tensor) -> Tensor:
        """The mean loss of each model where something is asked.

        `weights` are the parameters of each, `fixed` what is not trained of all by name, stacked.

        Shapes:  weights: [models, parameters];  inputs: [models, B, T];  labels: [models, B T];  out: [models], float32
        """
        # Rows of one stride whatever the model, also where there is one alone: compiled once.
        parts = (
            part.clone(memory_format=torch.contiguous_format)
            for part in torch.split(weights, self.sizes, dim=1)
        )
        held = dict(zip(self.places, parts, strict=True))
        table = held["model.embed_tokens.weight"].view(len(inputs), -1, self.config.hidden_size)
        x = _embedding()(inputs, table, self.config.embedding_multiplier)
        positions = torch.arange(inputs.shape[2], device=inputs.device).expand(inputs.shape[1:])
        for index, (layer, rotations) in enumerate(zip(self.layers, self.rotations, strict=True)):
            name = _layer_name(index)
            tables = self._rotary_tables(positions, rotations)
            x = layer(held[name], _below(name, fixed), x, positions, tables)
        head = table if self.tied else held["lm_head.weight"].view(table.shape)
        given = (self.config.norm_eps, self.config.logit_multiplier, self.config.logit_softcap)
        found: Tensor = _ending(self.config.hidden_size, *given)(held["model.norm.weight"], head, x, labels)
        return found

    def _rotary_tables(self, positions: Tensor, keys: Set[Any]) -> dict[Any, tuple[Tensor, Tensor]]:
        """As layers find them in the memo of a call: in their graphs each element would be worked out on its own."""
        rows, tokens = positions.shape
        made = {}
        for key in keys:
            if (tokens, key) not in self.tables:
                self.tables[tokens, key] = rotary_tables(positions[:1], *key)
            cos, sin = self.tables[tokens, key]
            made["rotary", *key] = (cos.expand(rows, *cos.shape[1:]), sin.expand(rows, *sin.shape[1:]))
        return made


def _rotations(layer: nn.Module) -> frozenset[Any]:
    """The arguments of `Call.rotary_tables` that parts of a layer ask for."""
    found = (getattr(module, "rotary", None) for module in layer.modules())
    return frozenset(each for each in found if isinstance(each, tuple))


def _layer_name(index: int) -> str:
    return f"model.layers.{index}."


def _place(name: str) -> str:
    """The layer that a parameter is of, and of the others their own names."""
    begins, _, rest = name.partition("model.layers.")
    return name if begins or not rest else f"model.layers.{rest.partition('.')[0]}."


def _below(prefix: str, weights: Weights) -> Weights:
    return {name.removeprefix(prefix): one for name, one in weights.items() if name.startswith(prefix)}


@cache
def compiled_pointwise(function: Callable[..., None]) -> Callable[..., None]:
    """The compiled form of a function that works element by element, of tensors of any size."""
    return _compiled(function, dynamic=True)


def _compiled(function: Callable[..., Any], *, dynamic: bool = False) -> Callable[..., Any]:
    # Kinds of layers share their code, by which torch counts how often it compiles before it gives up, and without a word.
    compiler: Any = torch.compile
    alone = {"isolate_recompiles": True} if _ISOLATES else {}
    made: Callable[..., Any] = compiler(function, fullgraph=True, dynamic=dynamic, backend=_backend, **alone)
    return made if _ISOLATES else torch._dynamo.config.patch(recompile_limit=RECOMPILES)(made)


def _backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """The compiler, after products with one input are one."""
    compiler: Any = torch._dynamo.lookup_backend(BACKEND)
    made: Callable[..., Any] = compiler(join_products(module), inputs)
    return made


@cache
def _layer(data: str, parts: Parts, about: tuple[int, int, float, int]) -> Callable[..., Tensor]:
    """The compiled function of a kind of layer: (its rows of weights [models, parameters]; what is not trained by name, stacked;
    x [models, B, T, D]; positions [B, T]; tables of rotations) to x.

    `about`: width and number of layers of the model, the eps of its norms, and its context.
    """
    width, layers, eps, context = about
    with torch.device("meta"):
        module = HeddleLayer(Site(width, 0, layers, eps, context), json.loads(data))
    sizes = [shape.numel() for _, shape in parts]

    def one(row: Tensor, fixed: Weights, x: Tensor, positions: Tensor, tables: dict[Any, Any]) -> Tensor:
        pieces = torch.split(row, sizes)
        weights = {name: piece.view(shape) for (name, shape), piece in zip(parts, pieces, strict=True)}
        call = Call(positions, None, None, memo=dict(tables))
        out = functional_call(module, {**weights, **fixed}, (x, call))
        assert isinstance(out, Tensor), "losses that layers add are not stacked"
        return out

    return _compiled(vmap(one, in_dims=(0, 0, 0, None, None)))


@cache
def _embedding() -> Callable[..., Tensor]:
    """The compiled function (tokens [models, B, T]; tables [models, vocabulary, D]; a factor) to x [models, B, T, D]."""

    def embedded(inputs: Tensor, tables: Tensor, factor: float) -> Tensor:
        first = torch.arange(len(tables), device=inputs.device)[:, None, None] * tables.shape[1]
        return F.embedding(inputs + first, tables.flatten(0, 1)) * factor

    return _compiled(embedded)


class _End(nn.Module):
    """What comes after the layers. x: [B, T, D];  out: [B T, vocabulary]"""

    def __init__(self, width: int, eps: float, multiplier: float, softcap: float | None) -> None:
        super().__init__()
        self.norm = norm_module("rmsnorm", width, eps)
        self.logit_multiplier, self.logit_softcap = multiplier, softcap

    def forward(self, x: Tensor, head: Tensor) -> Tensor:
        config: Any = self
        return scaled_logits(config, F.linear(self.norm(x).flatten(0, 1), head))


@cache
def _ending(width: int, eps: float, multiplier: float, softcap: float | None) -> Callable[..., Tensor]:
    """The compiled function (gains [models, D]; heads [models, vocabulary, D]; x [models, B, T, D]; labels [models, B T]) to the
    losses [models]."""
    with torch.device("meta"):
        end = _End(width, eps, multiplier, softcap)

    def one(gain: Tensor, head: Tensor, x: Tensor) -> Tensor:
        out: Tensor = functional_call(end, {"norm.weight": gain}, (x, head))
        return out

    def losses(gains: Tensor, heads: Tensor, x: Tensor, labels: Tensor) -> Tensor:
        return mean_losses(vmap(one)(gains, heads, x), labels)

    return _compiled(losses)


def mean_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean cross-entropy of each model where something is asked.

    Shapes:  logits: [models, tokens, vocabulary];  labels: [models, tokens];  out: [models], float32
    """
    each = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none")
    return each.view(labels.shape).sum(dim=1) / (labels != IGNORE).sum(dim=1)
