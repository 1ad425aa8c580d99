"""The stacks that layer_check.py times: models of a few mixers without channel blocks, and what they must compute and move."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from heddle.compose.build import build_causal_lm
from heddle.compose.cache import PreallocatedRecurrentLayer, StateLayer
from heddle.compose.hf.model import HeddleForCausalLM
from heddle.compose.mixers.layer_router import LayerRouterModule, RoutedLayer
from heddle.compose.mixers.nats_l import NatsLModule
from heddle.specs import ModelSpec, Site
from heddle.specs.mixers.nats_l import NatsL
from heddle.specs.pattern import layers_of

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
HALF = torch.bfloat16 if ON_GPU else torch.float32
ELEMENT = HALF.itemsize
FULL = "all full"
VOCABULARY = 4096
# Of a normal distribution the point that a quarter lies above.
UPPER_QUARTER = 0.6745


@dataclass(frozen=True)
class Sizes:
    """Shapes of all parts. `rounds`: runs of each call, at least and at most;  `step`: batch and context of HyLRA's step"""

    narrow: int
    wide: int
    heads: tuple[int, int]
    head_dim: int
    long: int
    step: tuple[int, int]
    block: int
    count: int
    window: int
    sinks: int
    checked: int
    rounds: tuple[int, int]

    def small(self) -> Sizes:
        """Those of a stack that float64 can follow: heads and blocks as they are."""
        heads = (2 * self.heads[0] // self.heads[1], 2) if ON_GPU else self.heads
        return replace(
            self, narrow=min(self.narrow, 256), wide=min(self.wide, 256), heads=heads, window=100, sinks=20
        )


def made(*, tiny: bool) -> Sizes:
    if tiny:
        return Sizes(32, 32, (4, 2), 8, 256, (2, 96), 8, 5, 24, 4, 150, (2, 2))
    return Sizes(1024, 4096, (32, 8), 128, 131072, (8, 65536), 128, 64, 2048, 128, 700, (5, 200))


@dataclass
class Stack:
    """A model of mixers alone; `picks`: the mixer that each layer router has picked;  `share`: of chunks kept by softmax"""

    model: HeddleForCausalLM
    spec: ModelSpec
    picks: tuple[int, ...] = ()
    share: float = 1.0
    vocabulary: int = VOCABULARY

    def double(self) -> Stack:
        return replace(self, model=copy.deepcopy(self.model).double())

    def mixers(self) -> list[Any]:
        return [self.model.model.layer_at(index).mixer for index in range(len(self.model.model.layers))]

    @contextmanager
    def routes(self) -> Iterator[list[Tensor]]:
        """The types of chunks that NAtS-L layers take inside."""
        seen: list[Tensor] = []
        hooks = [
            mixer.routes_out.register_forward_hook(lambda _, __, out: seen.append(out.detach()))
            for mixer in self.mixers()
            if isinstance(mixer, NatsLModule)
        ]
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()

    def _site(self) -> Site:
        return Site(hidden_size=self.spec.hidden_size)

    def _specs(self) -> list[Any]:
        """Of each layer the mixer that runs."""
        found = [layer.spec.mixer for layer in layers_of(self.spec)]
        for index, pick in enumerate(self.picks):
            found[index] = found[index].mixers[pick]
        return found

    def prefill_flops(self, tokens: int) -> float:
        site, total = self._site(), 0.0
        for mixer in self._specs():
            total += tokens * mixer.prefill_flops(site, tokens)
            if isinstance(mixer, NatsL):
                sizes = mixer.resolved(site)
                core = 2 * sizes.heads * (sizes.head_dim + sizes.value_dim)
                total -= tokens * core * (1.0 - self.share) * (tokens + 1) / 2
        return total

    def prefill_bytes(self, tokens: int) -> float:
        """Weights, and each layer's input and output."""
        site = self._site()
        weights = sum(mixer.params(site) for mixer in self._specs())
        return ELEMENT * (weights + 2.0 * tokens * site.hidden_size * len(self._specs()))

    def step_bytes(self, batch: int, context: int) -> float:
        """Weights once, and of each row what a step reads of its cache."""
        site = self._site()
        read = sum(mixer.read_bytes(site, context, ELEMENT) for mixer in self._specs())
        return float(ELEMENT * sum(mixer.params(site) for mixer in self._specs()) + batch * read)


def stack_of(width: int, blocks: dict[str, dict[str, Any]], layers: list[str], seed: int) -> Stack:
    held = {name: {"mixer": mixer, "channel": {"kind": "none"}} for name, mixer in blocks.items()}
    data = {"vocab_size": VOCABULARY, "hidden_size": width, "blocks": held, "layers": layers}
    spec = ModelSpec.model_validate(data)
    model = build_causal_lm(spec, seed=seed, device=DEVICE, dtype=HALF, draw="device" if ON_GPU else "cpu")
    return Stack(model.eval(), spec)


def nats_l(sizes: Sizes, seed: int) -> dict[str, Stack]:
    """The layer of the paper's 340M model, dense attention of equal width, and Gated DeltaNet of the same heads."""
    heads = (
        {"heads": 6, "head_dim": 128, "value_dim": 256}
        if ON_GPU
        else {"heads": 2, "head_dim": 8, "value_dim": 8}
    )
    chunk = 64 if ON_GPU else 16
    dense = {"heads": 8, "head_dim": 128} if ON_GPU else {"heads": 2, "head_dim": 8}
    kinds: dict[str, dict[str, Any]] = {
        "heddle": {"kind": "nats_l", **heads, "chunk": chunk},
        "dense": {"kind": "attention", **dense},
        "gated_deltanet": {"kind": "gated_deltanet", **heads},
    }
    stacks = {name: stack_of(sizes.narrow, {"it": mixer}, ["it"], seed) for name, mixer in kinds.items()}
    stacks["heddle"].share = 0.25
    quarter_softmax(stacks["heddle"], chunk, seed)
    return stacks


@torch.no_grad()
def quarter_softmax(stack: Stack, chunk: int, seed: int) -> None:
    """Router weights at random, and one feature that is the same for all tokens, so that a quarter of the chunks is softmax."""
    (mixer,) = stack.mixers()
    embedded = stack.model.model.embed_tokens.weight
    embedded.normal_(generator=torch.Generator(DEVICE).manual_seed(seed))
    embedded[:, 0] = 2.0
    router = torch.zeros(mixer.router.weight.shape, dtype=torch.float32)
    router[::2, 1:].normal_(generator=torch.Generator().manual_seed(seed))
    spread = router[::2, 1:].norm(dim=1) / chunk**0.5
    router[::2, 0] = -UPPER_QUARTER * spread / 2.0
    mixer.router.weight.copy_(router)


def hylra(sizes: Sizes, seed: int, *, everything: bool = False) -> dict[str, Stack]:
    """Four layers; `everything`: so many blocks are chosen that all are read."""
    heads, kv_heads = sizes.heads
    full: dict[str, Any] = {
        "kind": "attention",
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": sizes.head_dim,
    }
    count = 10**6 if everything else sizes.count
    chosen = {"block": sizes.block, "count": count, "decode_only": True}
    blocks = {
        "full": full,
        "pick": {**full, "selection": {**chosen, "sink": 1, "recent": 4 if count > 4 else 2}},
        "reuse": {**full, "selection": {**chosen, "source": "pick"}},
    }
    mixes = {
        FULL: ["full"] * 4,
        "choose, 3 reuse": ["pick", "reuse", "reuse", "reuse"],
        "full, choose, 2 reuse": ["full", "pick", "reuse", "reuse"],
    }
    return {
        name: stack_of(sizes.wide, {block: blocks[block] for block in layers}, layers, seed)
        for name, layers in mixes.items()
    }


def flux(sizes: Sizes, seed: int) -> dict[str, Stack]:
    """Four routed layers of which every second has picked its window, and four full ones without a router."""
    heads, kv_heads = sizes.heads
    full: dict[str, Any] = {
        "kind": "attention",
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": sizes.head_dim,
    }
    cheap = {**full, "window": sizes.window, "sink_tokens": sizes.sinks}
    routed = {"kind": "layer_router", "mixers": [full, cheap], "single": True}
    made = stack_of(sizes.wide, {"it": routed}, ["it"] * 4, seed)
    made.picks = (0, 1, 0, 1)
    with torch.no_grad():
        for mixer, pick in zip(made.mixers(), made.picks, strict=True):
            mixer.router.last_bias.copy_(torch.tensor([1.0 - pick, float(pick)]))
    return {FULL: stack_of(sizes.wide, {"it": full}, ["it"] * 4, seed), "half windows": made}


def stack_cache(stack: Stack, batch: int, context: int) -> Cache:
    """A cache of random contents whose step repeats, of a layer router those of the mixer that was picked."""
    like = stack.model.model.embed_tokens.weight
    picks = iter(stack.picks)
    return Cache(layers=[_layer_cache(mixer, picks, batch, context, like) for mixer in stack.mixers()])


@torch.no_grad()
def _layer_cache(mixer: Any, picks: Iterator[int], batch: int, context: int, like: Tensor) -> StateLayer:
    if not isinstance(mixer, LayerRouterModule):
        return mixer.filled_cache(batch, context, like)  # type: ignore[no-any-return]
    pick = next(picks)
    parts: dict[str, StateLayer] = {
        path: PreallocatedRecurrentLayer({}, context=context) for path in mixer.parts()
    }
    path = f"mixers.{pick}"
    parts[path] = mixer.parts()[path].filled_cache(batch, context, like)
    route = torch.zeros(batch, 1, 2, device=like.device)
    route[..., pick] = 1.0
    held = RoutedLayer(parts, PreallocatedRecurrentLayer({"route": route}, context=context))
    held.tokens, held.is_initialized, held.single = context, True, pick
    return held
