"""Softmax attention with grouped heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from heddle.compose.cache import (
    Call,
    CompositeLayer,
    PreallocatedKVLayer,
    PreallocatedRecurrentLayer,
    StateLayer,
    TokenCount,
)
from heddle.compose.init import Initialised, fill
from heddle.compose.means_cache import MeansLayer
from heddle.compose.modules.choice_loss import choice_loss
from heddle.compose.modules.chosen_heads import attend_chosen, has_routed_kernels, skips
from heddle.compose.modules.first_steps import first_steps
from heddle.compose.modules.grid_window import grid_attention, grid_keys
from heddle.compose.modules.head_mix import HeadMix
from heddle.compose.modules.in_view import attend_in_view, keys_so_far
from heddle.compose.modules.inward import inward_attention, inward_range
from heddle.compose.modules.masks import View, distances, key_mask, real_keys, sink_keys
from heddle.compose.modules.norm import RMSNorm
from heddle.compose.modules.precision import wide
from heddle.compose.modules.qk_source import EMBEDDED, qk_input
from heddle.compose.modules.rope import rotary_key, rotate
from heddle.compose.modules.rows import RowsOut
from heddle.compose.modules.selection import (
    Places,
    Rule,
    attend_blocks,
    attend_masked,
    choose_blocks,
    choose_for_step,
)
from heddle.compose.modules.site import Site
from heddle.compose.modules.sliding import attend_sliding, has_kernels, slides
from heddle.compose.modules.softmax import softmax_attention, softmax_weights
from heddle.compose.sink_cache import kept_tokens, new_layer
from heddle.errors import HeddleError
from heddle.kernels.grid_window_attention import grid_window_attention

# The parts of a cache of one that chooses blocks.
TOKENS, MEANS = "tokens", "means"
# Fields of a selection that do not say which blocks are chosen.
NOT_RULES = ("block", "decode_only", "dense_first", "distillation")


class AttentionModule(Initialised):
    """Softmax attention.        (GQA: arXiv 2305.13245; RoPE: 2104.09864; output gate: 2505.06708)

        o_i = sum_j softmax_j(scale · q_i · k_j) v_j,  j <= i,  i - j < window or j < sink_tokens
        y   = W_o (o * sigmoid(gate))

    `qk_norm` norms each head of q and k before the rotation, "full" all heads together. `rope` is `{"theta", "fraction"}` and
    perhaps "scaling", or None for no positions. With `gate`, each head of `q_proj` holds d query rows, then d gate rows. A
    window counts the current token; beside it each query sees the first `sink_tokens` tokens of its row. Without `causal` a
    query also sees later tokens, those less than a window ahead; there is nothing to decode then, and no cache. `softcap` and
    `sinks` are those of `softmax_attention`.

    With `boundary` "inward" such a window slides inward at the ends, and every query sees as many keys (arXiv 2511.14712). With
    `grid` tokens are those of an image or a video, and windows are along its axes; see `grid_keys`.

    `keys_from`: the keys and values are those of an earlier layer, and so is their cache (arXiv 2405.12981, 2405.05254).
    `values_from`: v = (1 - l) v + l v', v' those of an earlier layer, l learned from 1/2 on (arXiv 2410.17897).
    `qk_source`: what q (with its gate) and k are made of in the place of x; see `qk_input` (arXiv 2510.11602).
    `selection`: blocks of keys that a query reads; see `choose_blocks`. The means by which it chooses are cached beside the keys.
    In training's first steps it may read all, and the scores may be taught what all keys would be given; see `choice_loss`.
    Kernels read the chosen blocks alone, PyTorch computes all products, and masks them with a soft-cap or sinks.

    Shapes:  x, y: [B, T, D];  `heads_out` sees [B, T, H, d], `rows_out` [B, H, queries, S];
             handed on: keys, values: [B, KV heads, S, d];  indices: [B, KV heads, T, blocks] bool, of one token a list
             [B, KV heads, 1, L] int32, -1 for none

    Raises:
        HeddleError: "bad-argument" for a cache of earlier tokens without `causal`.
    """

    def __init__(
        self,
        site: Site,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        rope: Mapping[str, Any] | None,
        qk_norm: bool | str,
        gate: bool,
        window: int | None,
        sink_tokens: int = 0,
        causal: bool = True,
        boundary: str = "clip",
        grid: Mapping[str, int | None] | None = None,
        scale: float | None = None,
        key_multiplier: float = 1.0,
        softcap: float | None = None,
        sinks: bool = False,
        bias: str = "none",
        keys_from: int | None = None,
        values_from: int | None = None,
        qk_source: str = "hidden",
        selection: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.gate = heads, kv_heads, head_dim, gate
        self.view, self.scale, self.key_multiplier, self.softcap = (
            View(window, causal, sink_tokens),
            scale,
            key_multiplier,
            softcap,
        )
        self.boundary, self.grid = boundary, dict(grid or {})
        self.keys_from, self.values_from, self.selection = keys_from, values_from, dict(selection or {})
        self.rule = None if not self.selection or "source" in self.selection else _rule(self.selection, scale)
        self.first = first_steps(self.selection.get("dense_first"))
        self.distillation = self.selection.get("distillation")
        self.takes = _taken(keys_from, values_from, self.selection.get("source"))
        self.qk_source = qk_source
        if qk_source == "embedding":
            self.takes += (EMBEDDED,)
        self.rotary, self.norms_jointly = rotary_key(rope, head_dim), qk_norm == "full"
        self._make(site, queries=heads * (2 if gate else 1), bias=bias, norm=qk_norm is not False)
        self.sinks = nn.Parameter(torch.empty(heads)) if sinks else None
        self.value_share = nn.Parameter(torch.empty(1)) if values_from is not None else None
        self.heads_out, self.rows_out, self.head_mix = nn.Identity(), RowsOut(), HeadMix()

    def _make(self, site: Site, *, queries: int, bias: str, norm: bool) -> None:
        """Projections and norms; those of keys and values only where they are its own."""

        def projection(heads: int) -> nn.Linear:
            return nn.Linear(site.hidden_size, heads * self.head_dim, bias=bias != "none")

        def head_norm(heads: int) -> RMSNorm | None:
            size = self.head_dim * (heads if self.norms_jointly else 1)
            return RMSNorm(size, site.norm_eps) if norm else None

        own = self.keys_from is None
        self.q_proj = projection(queries)
        self.k_proj = projection(self.kv_heads) if own else None
        self.v_proj = projection(self.kv_heads) if own else None
        self.q_norm = head_norm(self.heads)
        self.k_norm = head_norm(self.kv_heads) if own else None
        self.o_proj = nn.Linear(self.heads * self.head_dim, site.hidden_size, bias=bias == "all")

    def initialise(self, std: float) -> None:  # noqa: ARG002 - a sink begins as a key whose logit is 0
        if self.sinks is not None:
            fill(self.sinks, torch.zeros(self.heads))
        if self.value_share is not None:
            fill(self.value_share, torch.tensor([0.5]))

    @property
    def takes_packed(self) -> bool:
        """Whether packed documents go through it together: not where blocks are chosen or places are those of a grid or ends."""
        own = self.selection or self.grid or self.boundary != "clip" or self.rows_out.queries is not None
        return not own

    def forward(self, x: Tensor, call: Call, route: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """`route` makes the factors of heads [B, T, H] of the queries [B, T, H, d] before their norm and rotation."""
        source = qk_input(self.qk_source, x, call)
        q = self.q_proj(source).unflatten(-1, (self.heads, -1))
        q, *gate = q.chunk(2, dim=-1) if self.gate else (q,)
        if route is not None:
            call.head_gates = route(q)
        q = self._place(q, self.q_norm, call).transpose(1, 2)
        if self.keys_from is None:
            k, v, written = self._remember(x, source, call)
        else:
            k, v, written = call.handed["keys", self.keys_from], call.handed["values", self.keys_from], None
        self._keep_means(k, written, call, q.shape[2])
        if self.rows_out.queries is not None:
            self.rows_out(self._rows(q, k, written, call))
        is_routed = self._is_routed(call, straight=route is not None) and skips(q, (k, v, written), self.view)
        if is_routed:
            o = attend_chosen(q, (k, v, written), call, self.view, self.scale)
        else:
            o = self.head_mix(self._attend(q, k, v, written, call), v)
        o = o.transpose(1, 2)
        if gate:
            o = o * torch.sigmoid(gate[0])
        y: Tensor = self.o_proj(self.heads_out(o if is_routed else call.gated(o)).flatten(2))
        return y

    def _place(self, x: Tensor, norm: nn.Module | None, call: Call, factor: float = 1.0) -> Tensor:
        """QK-norm, factor and rotation, all in float32, rounded once."""
        if norm is None and self.rotary is None and factor == 1.0:
            return x
        y = wide(x)
        if norm is not None:
            y = norm(y.flatten(2)).view_as(y) if self.norms_jointly else norm(y)
        y = y if factor == 1.0 else y * factor
        y = y if self.rotary is None else rotate(y, call.rotary_tables(*self.rotary))
        return y.to(x.dtype)

    def _remember(self, x: Tensor, source: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys, of `source`, and values, of `x`, of these and the earlier tokens, and which of them are written.

        Shapes:  x, source: [B, T, D];  out: twice [B, KV heads, S, d], and [B, S] of 0 and 1, or None for all
        """
        assert self.k_proj is not None
        assert self.v_proj is not None
        k = self.k_proj(source).unflatten(-1, (self.kv_heads, -1))
        k = self._place(k, self.k_norm, call, self.key_multiplier).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        if self.values_from is not None and self.value_share is not None:
            others = call.handed["values", self.values_from][:, :, -v.shape[2] :]
            v = torch.lerp(v, others, self.value_share.to(v.dtype))
        if not self.view.causal and call.cache is not None and call.cache.get_seq_length() > 0:
            raise HeddleError("bad-argument", "attention that sees later tokens cannot go on from a cache")
        k, v, written = keys_so_far(k, v, call if self.rule is None else call.part(TOKENS))
        call.hand(keys=k, values=v)
        return k, v, written

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, written: Tensor | None, call: Call) -> Tensor:
        """Shapes:  q, out: [B, H, T, d];  k, v: [B, KV heads, S, d];  written: [B, S] or None"""
        queries, keys = q.shape[2], k.shape[2]
        attend = partial(softmax_attention, scale=self.scale, softcap=self.softcap, sinks=self.sinks)
        if self.boundary == "inward" and self.view.window is not None:
            return inward_attention(q, k, v, call, window=self.view.window, scale=self.scale)
        if self.grid:
            return grid_attention(q, k, v, call, grid=self.grid, boundary=self.boundary, scale=self.scale)
        if not self._selects(queries):
            if self.softcap is None and self.sinks is None and slides(q, (k, v, written), self.view, call):
                return attend_sliding(q, (k, v, written), call, self.view, self.scale)
            return attend_in_view(q, (k, v, written), call, self.view, attend)
        places, blocks = self._choice(q, k, written, call)
        if self.training and self.rule is not None and call.cache is None and queries > 1:
            blocks = self._trained(blocks, (q, k, written), places, call)
            call.hand(indices=blocks)
        if self.softcap is None and self.sinks is None:
            return attend_blocks(q, (k, v, written), places, blocks, self.scale)
        real = real_keys(call, keys)
        return attend_masked(q, (k, v, written), places, blocks, real=real, view=self.view, attend=attend)

    def _selects(self, queries: int) -> bool:
        """Whether so many tokens read chosen blocks."""
        return bool(self.selection) and (queries == 1 or not self.selection.get("decode_only", False))

    def _rows(self, q: Tensor, k: Tensor, written: Tensor | None, call: Call) -> Tensor:
        """The weights of the queries that `rows_out` asks for, over all keys.  Shapes:  out: [B, H, queries, S]"""
        queries, keys = q.shape[2], k.shape[2]
        rows = self.rows_out.places(queries)
        distance = distances(queries, keys, q.device)[rows]
        chosen = None
        if self._selects(queries):
            places, blocks = self._choice(q, k, written, call)
            chosen = places.keys_of(blocks)[:, :, rows]
        marks, view = None if written is None else written[:, None, None], self.view
        if self.boundary == "inward" and view.window is not None:
            first, last = (one[:, None, rows, None] for one in inward_range(call, keys, view.window))
            place, view = torch.arange(keys, device=q.device), View(None, causal=False)
            chosen = (place >= first) & (place <= last)
        if self.grid:
            index = grid_keys(call, keys, self.grid, inward=self.boundary == "inward")[:, rows]
            chosen = torch.zeros(*index.shape[:2], keys + 1, dtype=torch.bool, device=q.device)
            # What is none falls on the place behind the last.
            chosen = chosen.scatter(-1, index % (keys + 1), True)[:, None, :, :keys]
        real, sinks = real_keys(call, keys, view.sinks), sink_keys(call, keys, view.sinks)
        mask = key_mask(distance, view, real, chosen, sinks=sinks, written=marks)
        mask = mask if mask.dim() == 4 else mask[None, None]
        p = softmax_weights(q[:, :, rows], k, mask, scale=self.scale, softcap=self.softcap, sinks=self.sinks)
        return p.flatten(1, 2)

    def _choice(self, q: Tensor, k: Tensor, written: Tensor | None, call: Call) -> tuple[Places, Tensor]:
        """The blocks of keys, and those that each query reads.

        Shapes:  out: [B, KV heads, T, blocks] bool, of one token a list [B, KV heads, 1, L] int32, -1 for none
        """
        places = self._places(k, call, q.shape[2])
        if self.rule is None:
            return places, call.handed["indices", self.selection["source"]]
        kept = call.part(MEANS).cache
        choose = choose_for_step if q.shape[2] == 1 else choose_blocks
        means = kept.means() if isinstance(kept, MeansLayer) else None
        chosen = choose(q, k, places, self.rule, weights=written, means=means)
        call.hand(indices=chosen)
        return places, chosen

    def _trained(
        self, chosen: Tensor, sides: tuple[Tensor, Tensor, Tensor | None], places: Places, call: Call
    ) -> Tensor:
        """What training reads of the chosen blocks: all in its first steps. Adds the loss of the choice, if one is asked for.

        Shapes:  chosen, out: [B, KV heads, T, blocks] bool;  sides: queries, keys, and which of them are written
        """
        assert self.rule is not None
        q, k, written = sides
        if self.distillation:
            call.add_loss("choice", choice_loss(q, k, places, self.rule, written), self.distillation)
        if self.first is None:
            return chosen
        place = places.first(q.shape[0], q.shape[2])[:, None] + torch.arange(q.shape[2], device=q.device)
        seen = torch.arange(places.blocks, device=q.device) <= (place // places.block)[:, None, :, None]
        return chosen | (seen & self.first.now())

    def _places(self, k: Tensor, call: Call, queries: int) -> Places:
        keys = k.shape[2]
        real = None if call.key_padding is None else call.key_padding[:, -keys:] > 0
        places = Places(self.selection["block"], keys, real, k.device)
        # As kernels read it, once for all layers of a step.
        start = call.once(("start", keys, queries), lambda: places.first(k.shape[0], queries).to(torch.int32))
        return replace(places, start=start)

    def _keep_means(self, k: Tensor, written: Tensor | None, call: Call, new: int) -> None:
        """Adds what the last `new` keys complete to the cache, if blocks are chosen here."""
        kept = None if self.rule is None else call.part(MEANS).cache
        if isinstance(kept, MeansLayer):
            kept.extend(k, self._places(k, call, new), weights=written, new=new)

    def new_cache(self) -> StateLayer:
        kept = new_layer(self.view) if self._keeps_keys() else TokenCount()
        if self.rule is None:
            return kept
        return CompositeLayer({TOKENS: kept, MEANS: MeansLayer(self.rule.parts(self.selection["block"]))})

    def filled_cache(self, batch: int, context: int, like: Tensor) -> StateLayer:
        """A cache of random keys and values after `context` tokens, whose step repeats in place."""
        kept = self._filled_tokens(batch, context, like)
        if self.rule is None:
            return kept
        parts, heads = self.rule.parts(self.selection["block"]), (batch, self.kv_heads)
        means = like.new_empty(*heads, parts.complete(context + 1), self.head_dim).normal_()
        made = CompositeLayer({TOKENS: kept, MEANS: MeansLayer.filled(parts, means, context)})
        made.tokens, made.is_initialized = context, True
        return made

    def _filled_tokens(self, batch: int, context: int, like: Tensor) -> StateLayer:
        if not self._keeps_keys():
            return PreallocatedRecurrentLayer({}, context=context)
        shape = (batch, self.kv_heads, kept_tokens(self.view, context) + 1, self.head_dim)
        keys, values = like.new_empty(shape).normal_(), like.new_empty(shape).normal_()
        return PreallocatedKVLayer(keys, values, context=context, window=self.view.window)

    def _keeps_keys(self) -> bool:
        return self.view.causal and self.keys_from is None

    def _is_fused(self) -> bool:
        """Whether it is softmax attention as it stands, over keys that are chosen by how far away they are."""
        plain = self.softcap is None and self.sinks is None and self.boundary == "clip"
        return plain and not self.selection and not self.grid

    def _is_routed(self, call: Call, *, straight: bool) -> bool:
        """Whether a head whose factor is 0 may be left out; with `straight` such a factor has a gradient, if any has one."""
        gates = call.head_gates
        asked = gates is None or (straight and gates.requires_grad)
        return not asked and self.head_mix.share is None and self._is_fused()

    def routed_path(self, device: torch.device, dtype: torch.dtype) -> str:
        """The name of the code that does the mixing where a router chooses heads and keys are those of no window."""
        routed = self._is_fused() and self.view == View()
        group = self.heads // self.kv_heads
        if routed and has_routed_kernels(device, dtype, self.head_dim, group):
            return "triton"
        return self.kernel_path(device, dtype)

    def kernel_path(self, device: torch.device, dtype: torch.dtype) -> str:
        """The name of the code that does the mixing."""
        if self.grid:
            return grid_window_attention.path(device, dtype, K=self.head_dim, V=self.head_dim)
        is_fused = self._is_fused()
        if is_fused and self.view.window is not None and self.view.causal:
            group = self.heads // self.kv_heads
            return "triton" if has_kernels(device, dtype, self.head_dim, group) else "sdpa"
        return "sdpa" if is_fused else "torch"


def _rule(selection: Mapping[str, Any], scale: float | None) -> Rule:
    return Rule(**{name: one for name, one in selection.items() if name not in NOT_RULES}, scale=scale)


def _taken(keys: int | None, values: int | None, indices: int | None) -> tuple[tuple[str, int], ...]:
    """What is taken of which earlier layers, as the keys of `Call.handed`."""
    taken = [("keys", keys), ("values", keys), ("values", values), ("indices", indices)]
    return tuple((what, layer) for what, layer in taken if layer is not None)
