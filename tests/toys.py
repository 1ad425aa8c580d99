"""What many tests build: noise, tokens, calls, and mixers and models in float64 whose weights make every term count."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from heddle.compose.build import build
from heddle.compose.cache import Call
from heddle.compose.init import initialise
from heddle.compose.modules.layer import make_mixer
from heddle.compose.modules.site import Site
from heddle.specs import MIXERS, ModelSpec, load
from heddle.specs import Site as SpecSite
from heddle.specs.layer import Repeat
from heddle.specs.pattern import layers_of

ROOT = Path(__file__).parents[1]
EXAMPLES = {path.stem: path for path in sorted((ROOT / "examples" / "specs").glob("*.yaml"))}
# Float64 on a CPU: sums may be taken in another order, and nothing else.
EXACT = 1e-9
# A spec of every form of layer, whose lines and columns errors are told at.
FORMS = """\
version: 1
name: forms
model:
  vocab_size: 256
  hidden_size: 64
  blocks:
    full: {mixer: {kind: attention, heads: 4}, channel: {kind: swiglu}}
    both:
      mixer: {kind: parallel, mixers: [{kind: attention, heads: 4}, {kind: gated_deltanet, heads: 2}]}
      channel: {kind: gelu}
    once: {mixer: {kind: attention, heads: 4}, channel: {kind: none}, shared: true}
    late: {mixer: {kind: attention, heads: 4}, channel: {kind: none}, skip: {source: first}}
  layers: [{block: full, name: first}, both, once, late, {block: full, override: {mixer: {window: 8}}}]
tokenizer: own
"""


def noise(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def tokens(length: int, batch: int = 2, *, vocabulary: int = 256, seed: int = 2) -> Tensor:
    """Ids without the 0 that padding has."""
    return torch.randint(1, vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))


def call_at(start: int, length: int, cache: Any = None, *, rows: int = 2, **fields: Any) -> Call:
    """What a layer is told of `length` tokens after `start` others, none of them padding."""
    positions = torch.arange(start, start + length)[None].expand(rows, length)
    return Call(positions, cache=cache, **fields)


def padded_call(real: Tensor) -> Call:
    """What a layer is told of a whole sequence with padding.  Shapes:  real: [B, T] bool"""
    return Call((real.long().cumsum(-1) - 1).clamp(min=0), real, real)


def shaken(module: Any) -> Any:
    """The module in float64, its weights large enough for every part to count; rates of decay stay as they began."""
    module = module.double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith(("A_log", "dt_bias")):
                continue
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
            else:
                parameter.uniform_(0.5, 1.5, generator=generator)
    return module


def mixer_of(hidden_size: int, kind: str, **fields: Any) -> Any:
    """A mixer of the second of three layers, in float64: as it begins, but for wider weights and norms that differ."""
    torch.manual_seed(3)
    spec = MIXERS[kind].model_validate({"kind": kind, **fields})
    made = make_mixer(Site(hidden_size, 1, 3), spec.runtime(SpecSite(hidden_size, 1, 3)))
    for module in made.modules():
        initialise(module, std=hidden_size**-0.5)
    for name, parameter in made.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return made.double().eval()


def model_with(mixer: dict[str, Any], hidden_size: int, *, layers: int = 1, **fields: Any) -> ModelSpec:
    """A model of equal layers of the mixer alone."""
    block = {"mixer": mixer, "channel": {"kind": "none"}}
    sizes = {"vocab_size": 9, "hidden_size": hidden_size, "blocks": {"it": block}}
    return ModelSpec.model_validate(sizes | {"layers": ["it"] * layers} | fields)


def small_example(name: str) -> ModelSpec:
    """The model of an example with one layer of each kind that it has, and of a shared block two."""
    model = load(EXAMPLES[name]).spec.model
    items = [
        one
        for item in model.layers
        for one in (item.pattern * item.repeat if isinstance(item, Repeat) else [item])
    ]
    kept: list[Any] = []
    for item, layer in zip(items, layers_of(model), strict=True):
        if kept.count(item) < 1 + layer.spec.shared:
            kept.append(item)
    return model.model_copy(update={"layers": kept})


def every_layer(names: Iterable[str] | None = None) -> ModelSpec:
    """One model of the layers of these examples, or of all that decode, with factors at both of its ends."""
    blocks: dict[str, Any] = {}
    layers: list[Any] = []
    for name in EXAMPLES if names is None else names:
        model = small_example(name)
        if model.kind != "causal_lm":
            continue
        blocks |= {f"{name}_{key}": _renamed(block.written(), name) for key, block in model.blocks.items()}
        for item in model.layers:
            held = {"block": item} if isinstance(item, str) else item.written()
            layers.append(held | {key: f"{name}_{held[key]}" for key in ("block", "name") if key in held})
    factors = {"embedding_multiplier": 2.0, "logit_multiplier": 0.5, "logit_softcap": 20.0}
    sizes = {"vocab_size": 256, "hidden_size": 128, "blocks": blocks, "layers": layers}
    return ModelSpec.model_validate(sizes | factors)


def _renamed(data: Any, example: str) -> Any:
    """What a block is, with the names of layers that it takes from as they are in the joint model."""
    if isinstance(data, list):
        return [_renamed(one, example) for one in data]
    if not isinstance(data, dict):
        return data
    names = {
        key: data[key]
        for key in ("keys_from", "values_from", "source")
        if data.get(key) not in (None, "embedding")
    }
    return {key: _renamed(one, example) for key, one in data.items()} | {
        key: f"{example}_{name}" for key, name in names.items()
    }


def example_of(name: str) -> Any:
    """The small example as a model in float64."""
    return shaken(build(small_example(name)))


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    """A gradient for each weight that has one."""
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


class Largest(TorchDispatchMode):
    """The most numbers, and the most bytes, that any result has."""

    numbers, bytes = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else (out,):
            if isinstance(one, Tensor):
                self.numbers = max(self.numbers, one.numel())
                self.bytes = max(self.bytes, one.numel() * one.element_size())
        return out


def checkpoint(model: Any) -> None:
    """Turns activation checkpointing on."""
    # The old name warns in later versions of transformers, the new one is not in earlier ones.
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()


def in_pieces(model: Any, ids: Tensor, ends: list[int]) -> tuple[Tensor, Any]:
    """Logits of ids that come in pieces, and the cache after the last.  Shapes:  ids: [B, T];  out: [B, T, vocab]"""
    pieces, cache, start = [], None, 0
    for end in ends:
        out = model(ids[:, start:end], past_key_values=cache, use_cache=True)
        cache, start = out.past_key_values, end
        pieces.append(out.logits)
    return torch.cat(pieces, dim=1), cache


def left_padded(ids: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The ids behind `width` of padding, and the mask."""
    padded = torch.cat((ids.new_zeros(ids.shape[0], width), ids), dim=1)
    return padded, (torch.arange(padded.shape[1]) >= width).long().expand_as(padded)
