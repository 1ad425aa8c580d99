"""Stacked models layer by layer, each kind of layer compiled once for all models of a process.

A whole model as one graph would be compiled anew for every placement of its layers; placements of two kinds share two graphs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

from heddle.compose.cache import Call
from heddle.compose.modules.layer import HeddleLayer
from heddle.compose.modules.site import Site

Weights = Mapping[str, Tensor]
BACKEND = "inductor"


class CompiledLayers:
    """The function of models that differ in their weights alone, whose layers take nothing from each other.

    The first call with layers of a kind, or with inputs of another shape, compiles.
    """

    def __init__(self, model: nn.Module) -> None:
        net: Any = model.model
        taken = [
            *net.handed_on,
            *net.wanted,
            *net.constant_readers,
            *(layer.get("weights_of") for layer in net.config.layers),
        ]
        assert net.lower_bounds is None, "layers with a common table of bounds are not alone"
        assert not any(each is not None for each in taken), "layers that take from each other are not alone"
        self.model, self.config, self.end = model, net.config, _End(model)
        sizes = (net.config.hidden_size, len(net.layers), net.config.norm_eps, net.config.context_length)
        self.layers = [_layer(json.dumps(layer, sort_keys=True), *sizes) for layer in net.config.layers]

    def logits(self, weights: Weights, inputs: Tensor) -> Tensor:
        """Of all models at all positions; `weights` are their parameters and buffers by name, stacked.

        Shapes:  inputs: [models, B, T];  out: [models, B T, vocabulary]
        """
        x = vmap(F.embedding)(inputs, weights["model.embed_tokens.weight"])
        x = x * self.config.embedding_multiplier
        positions = torch.arange(inputs.shape[2], device=inputs.device).expand(inputs.shape[1:])
        for index, layer in enumerate(self.layers):
            x = layer(_below(f"model.layers.{index}.", weights), x, positions)
        held = {f"model.{name}": one for name, one in weights.items()}
        called = {name: held[name] for name, _ in self.end.named_parameters() if name in held}
        out: Tensor = vmap(lambda own, hidden: functional_call(self.end, own, (hidden,)))(called, x)
        return out


class _End(nn.Module):
    """What comes after the layers. x: [B, T, D];  out: [B T, vocabulary]"""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.model.logits(self.model.model.norm(x).flatten(0, 1))
        return out


def _below(prefix: str, weights: Weights) -> Weights:
    return {name.removeprefix(prefix): one for name, one in weights.items() if name.startswith(prefix)}


@cache
def _layer(data: str, width: int, layers: int, eps: float, context: int) -> Callable[..., Tensor]:
    """The compiled function of a kind of layer: (weights by name, stacked; x [models, B, T, D]; positions [B, T]) to x."""
    with torch.device("meta"):
        module = HeddleLayer(Site(width, 0, layers, eps, context), json.loads(data))

    def one(weights: Weights, x: Tensor, positions: Tensor) -> Tensor:
        out = functional_call(module, dict(weights), (x, Call(positions, None, None)))
        assert isinstance(out, Tensor), "losses that layers add are not stacked"
        return out

    return torch.compile(vmap(one, in_dims=(0, 0, None)), dynamic=False, backend=BACKEND)
