"""A whole RAT layer beside the same layer with dense attention: a part of rat_check.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from heddle.compose.cache import Call
from heddle.compose.init import initialise
from heddle.compose.mixers.rat import RatModule
from heddle.compose.modules.rope import Tables, rotary_tables, rotate
from heddle.compose.modules.site import Site
from heddle.kernels.dense_attention import dense_attention
from heddle.specs import Site as SpecSite
from heddle.specs.mixers import Rat

ROPE = {"theta": 10_000.0, "fraction": 1.0}
CHUNK = 16
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Dense(nn.Module):
    """Projections, rotation, softmax attention over all earlier tokens by `attend`, projection."""

    def __init__(self, width: int, heads: int, attend: Attend) -> None:
        super().__init__()
        self.heads, self.attend = heads, attend
        self.qkv_proj = nn.Linear(width, 3 * width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, u: Tensor, tables: Tables, cache: tuple[Tensor, Tensor] | None = None) -> Tensor:
        q, k, v = self.qkv_proj(u).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, k = (rotate(side.float(), tables).to(u.dtype) for side in (q, k))
        q, k, v = (side.transpose(1, 2) for side in (q, k, v))
        if cache is not None:
            for held, new in zip(cache, (k, v), strict=True):
                held[:, :, -1:] = new
            k, v = cache
        return self.o_proj(self.attend(q, k, v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def flex(length: int, device: torch.device) -> Attend:
    """FlexAttention, compiled on a GPU, causal over `length` tokens; a single query sees all keys."""
    run: Any = torch.compile(flex_attention, dynamic=False) if device.type == "cuda" else flex_attention

    def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG001
        return key <= query

    mask = None
    if length > 1:
        compiled = device.type == "cuda"
        mask = create_block_mask(seen, None, None, length, length, device=str(device), _compile=compiled)
    return lambda q, k, v: run(q, k, v, block_mask=mask)


def made(layer: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    for module in layer.modules():
        initialise(module, std=0.02)
    return layer.to(device, dtype)


def rat(width: int, heads: int) -> RatModule:
    size = width // heads
    return RatModule(Site(width, 0, 1), heads=heads, head_dim=size, groups=2, chunk=CHUNK, rope=ROPE)


class Bench:
    """The layers at one width, on one device; `dense` names how torch's attention is told of."""

    def __init__(self, width: int, heads: int, device: torch.device, dtype: torch.dtype) -> None:
        self.width, self.heads, self.device, self.dtype = width, heads, device, dtype
        self.spec, self.site = Rat(heads=heads, chunk=CHUNK), SpecSite(hidden_size=width)

    def layers(self, length: int) -> Iterator[tuple[str, nn.Module, Callable[..., Tensor]]]:
        """Name, layer, and what to call with the input; last the rival that compiles longest."""
        build = partial(made, device=self.device, dtype=self.dtype)
        ours = build(rat(self.width, self.heads))
        positions = torch.arange(length, device=self.device)[None]
        yield "heddle", ours, lambda u: ours(u, Call(positions))
        causal = build(Dense(self.width, self.heads, partial(dense_attention, is_causal=True)))
        tables = rotary_tables(positions, self.width // self.heads, ROPE["theta"])
        yield "torch", causal, lambda u: causal(u, tables)
        other = build(Dense(self.width, self.heads, flex(length, self.device)))
        yield "flex", other, lambda u: other(u, tables)

    def steps(self, batch: int, context: int) -> Iterator[tuple[str, Callable[[], Tensor]]]:
        """Name, and one decode step behind `context` tokens, which repeats."""
        build = partial(made, device=self.device, dtype=self.dtype)
        u = torch.randn(batch, 1, self.width, device=self.device, dtype=self.dtype)
        positions = torch.full((1, 1), context, device=self.device)
        ours = build(rat(self.width, self.heads))
        assert isinstance(ours, RatModule)
        # Tables are made once, as for all layers of a model.
        call = Call(positions, cache=ours.filled_cache(batch, context, u))
        yield "heddle", lambda: ours(u, call)
        size = self.width // self.heads
        held = (batch, self.heads, context + 1, size)
        cache = (
            torch.randn(held, device=self.device, dtype=self.dtype),
            torch.randn(held, device=self.device, dtype=self.dtype),
        )
        tables = rotary_tables(positions, size, ROPE["theta"])
        for name, attend in (("torch", dense_attention), ("flex", flex(1, self.device))):
            layer = build(Dense(self.width, self.heads, attend))
            yield name, partial(layer, u, tables, cache)

    def least(self, phase: str, tokens: int, context: int = 0) -> tuple[float, float]:
        """FLOPs and bytes of a RAT layer: projections and core as its spec counts; weights, input, output and summaries once."""
        weights, element = self.spec.params(self.site), self.dtype.itemsize
        if phase == "decode":
            held = tokens * self.spec.state_bytes(self.site, context, element)
            return tokens * self.spec.flops(self.site, context), element * (
                weights + 2 * tokens * self.width
            ) + held
        times = 3 if phase == "fwdbwd" else 1
        # The gradients of softmax attention take five products of which one is made anew, against two.
        projections = 2 * weights * tokens
        core = tokens * self.spec.prefill_flops(self.site, tokens) - projections
        bytes_ = times * element * (weights + 2 * tokens * self.width)
        return times * projections + (3.5 if times > 1 else 1) * core, bytes_


def both_ways(layer: nn.Module, run: Callable[..., Tensor], u: Tensor) -> dict[str, Callable[[], object]]:
    """A forward pass, and one with the gradients of the input and all weights."""
    there, upstream = u.detach().requires_grad_(), torch.randn_like(u)
    wanted = [there, *layer.parameters()]

    @torch.no_grad()
    def forward() -> Tensor:
        return run(u)

    return {"fwd": forward, "fwdbwd": lambda: torch.autograd.grad(run(there), wanted, upstream)}
