"""Softmax attention with grouped heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from heddle.specs.attention_rules import conflicts
from heddle.specs.cost import State
from heddle.specs.grid import Grid
from heddle.specs.kinds import (
    Contract,
    Handed,
    HeadedMixer,
    MixerSpec,
    Problem,
    Reference,
    divisors_near,
    head_dim_of,
    heads_problems,
    misfit_of,
)
from heddle.specs.layer import Reference as LayerName
from heddle.specs.layer import Site
from heddle.specs.rope import Rope
from heddle.specs.selection import Selection
from heddle.specs.sight import Sight

# Fields of the language that came later: at their defaults they are left out of the data, as if they did not exist.
LATER = (
    "sink_tokens",
    "causal",
    "boundary",
    "grid",
    "scale",
    "key_multiplier",
    "softcap",
    "sinks",
    "bias",
    "keys_from",
    "values_from",
    "qk_source",
    "selection",
)
_DECODE_ONLY = "several tokens at once read all keys, a single one chosen blocks"
_BOTH_SIDES = "its queries read later keys: every output depends on every token, and nothing can be decoded"


def _no_number(value: Any) -> Any:
    """1 and 0 equal true and false in Python, and are neither in YAML."""
    if value is True or value is False or value == "full":
        return value
    raise ValueError("expected true, false or full")


class Attention(HeadedMixer):
    """Softmax attention.

        o_i = sum_j softmax_j(scale · q_i · k_j) v_j,   j <= i,   i - j < window or j < sink_tokens

    Grouped heads: arXiv 2305.13245; output gate: 2505.06708; norm of q and k over all heads: OLMo 2, 2501.00656; soft-cap:
    Gemma 2, 2408.00118; keys and values of an earlier layer: CLA, 2405.12981, and YOCO, 2405.05254; value residual: 2410.17897;
    other sources of q and k: 2510.11602; sink tokens: 2309.17453.
    """

    kind: Literal["attention"] = "attention"
    heads: Annotated[int, Field(ge=1, le=4096, description="Query heads (a count).")]
    kv_heads: Annotated[
        int | None, Field(ge=1, le=4096, description="Key and value heads (a count); null: as many as heads.")
    ] = None
    head_dim: Annotated[
        int | None, Field(ge=1, le=65_536, description="Dimensions of a head; null: hidden_size / heads.")
    ] = None
    rope: Annotated[Rope | None, Field(description="Rotary positions; null: none (NoPE).")] = Field(
        default_factory=Rope
    )
    qk_norm: Annotated[
        Literal[False, True, "full"],
        BeforeValidator(_no_number),
        Field(
            description="RMSNorm of each head's query and key, before the rotation; full: over all heads together (OLMo 2)."
        ),
    ] = False
    gate: Annotated[bool, Field(description="Sigmoid gate on each head's output.")] = False
    window: Annotated[
        int | None,
        Field(ge=1, le=10**8, description="Tokens a query sees (on each side), its own included; null: all."),
    ] = None
    sink_tokens: Annotated[
        int,
        Field(ge=0, le=10**6, description="First tokens that every query sees beside its window (a count)."),
    ] = 0
    causal: Annotated[
        bool, Field(description="false: queries see later tokens, too; for encoders, without a cache.")
    ] = True
    boundary: Annotated[
        Literal["clip", "inward"],
        Field(
            description="What a window to both sides does at the ends: clip; or inward, it slides, and every query sees 2 · "
            "window - 1 tokens (FreeSwim)."
        ),
    ] = "clip"
    grid: Annotated[
        Grid | None,
        Field(description="Tokens as an image or a video, with windows along its axes; null: a line."),
    ] = None
    scale: Annotated[
        float | None, Field(gt=0, le=1e6, description="Factor of q · k; null: 1 / sqrt(head_dim).")
    ] = None
    key_multiplier: Annotated[
        float, Field(gt=0, le=1e6, description="Factor of the keys, before they turn (Falcon-H1).")
    ] = 1.0
    softcap: Annotated[
        float | None,
        Field(gt=0, le=1e6, description="c: attention logits become c · tanh(logits / c) (Gemma 2)."),
    ] = None
    sinks: Annotated[
        bool, Field(description="A learned logit for each head, in the softmax's denominator only (GPT-OSS).")
    ] = False
    bias: Annotated[
        Literal["none", "qkv", "all"],
        Field(
            description="Which projections have a bias: none, those of q, k and v (Qwen2), or the output's, too."
        ),
    ] = "none"
    keys_from: Annotated[
        LayerName | None,
        Field(
            description="The nearest earlier layer of this name or block, whose keys and values are read; null: own ones."
        ),
    ] = None
    values_from: Annotated[
        LayerName | None,
        Field(
            description="The nearest earlier layer of this name or block, whose values are mixed into the own ones by a "
            "learned share; null: none."
        ),
    ] = None
    qk_source: Annotated[
        Literal["hidden", "embedding", "position", "constant"],
        Field(
            description="What q (with its gate) and k are made of: the layer's input, the embedded tokens, a fixed random row "
            "for each position, or what the constant stream is there."
        ),
    ] = "hidden"
    selection: Annotated[
        Selection | None, Field(description="The blocks of keys that a query reads; null: all.")
    ] = None

    @property
    def is_causal(self) -> bool:
        return self.causal

    def exemptions(self) -> Mapping[Contract, str]:
        found = dict(super().exemptions())
        if not self.causal:
            found |= {"causality": _BOTH_SIDES, "step": _BOTH_SIDES, "chunks": _BOTH_SIDES}
        if self.keys_from is not None:
            found["written"] = "it reads the memory of another layer and has none of its own"
        if self.selection is not None and self.selection.decode_only:
            found |= {"step": _DECODE_ONLY, "chunks": _DECODE_ONLY}
        if self.boundary == "inward" or self.grid is not None:
            found["written"] = "the places of its window count every token"
        return found

    def is_routed(self) -> bool:
        return self.selection is not None

    def references(self) -> tuple[Reference, ...]:
        found = []
        if self.keys_from is not None:
            found.append(Reference("keys_from", self.keys_from, "keys"))
        if self.values_from is not None:
            found.append(Reference("values_from", self.values_from, "values"))
        if self.qk_source == "embedding":
            found.append(Reference("qk_source", "embedding", "stream"))
        if self.selection is not None and self.selection.source is not None:
            found.append(Reference("selection.source", self.selection.source, "indices"))
        return tuple(found)

    def offers(self, site: Site) -> Mapping[Handed, tuple[int, ...]]:
        """Keys and values that it caches, turned; the chosen blocks of each KV head. What it takes itself it does not offer."""
        shapes, found = self._handed(site), dict[Handed, tuple[int, ...]]()
        if self.keys_from is None:
            found |= {"keys": shapes["keys"], "values": shapes["values"]}
        if self.selection is not None and self.selection.source is None:
            found["indices"] = shapes["indices"]
        return found

    def _handed(self, site: Site) -> dict[Handed, tuple[int, ...]]:
        heads = self.kv_heads or self.heads
        count = 0 if self.selection is None else self.selection.count
        shape = (heads, head_dim_of(self, site))
        return {"keys": shape, "values": shape, "indices": (heads, count)}

    def misfit(self, reference: Reference, source: MixerSpec, site: Site) -> str | None:
        if isinstance(source, Attention):
            chain = self._chain(reference, source)
            if chain is not None:
                return chain
        wrong = misfit_of(self._handed(site), reference, source, site)
        if wrong is None and isinstance(source, Attention):
            if reference.what == "keys":
                wrong = self._keys_misfit(reference, source, site)
            elif self.selection is not None and source.selection is not None:
                wrong = self.selection.misfit(reference.name, source.selection)
        return wrong

    @staticmethod
    def _chain(reference: Reference, source: Attention) -> str | None:
        """A source that takes what is asked of it from a third layer."""
        if reference.what != "indices":
            taken, given = source.keys_from, "keys and values"
        else:
            taken, given = None if source.selection is None else source.selection.source, "blocks"
        if taken is None:
            return None
        return f"{reference.name} takes its own {given} from {taken}; name the layer that made them"

    def _keys_misfit(self, reference: Reference, source: Attention, site: Site) -> str | None:
        if self._rotation(site) != source._rotation(site):
            return f"the keys of {reference.name} are turned otherwise; both need the same rope"
        if source.window is not None and (self.window is None or self.window > source.window):
            wanted = "all tokens" if self.window is None else f"{self.window}"
            return f"{reference.name} keeps a window of {source.window}, and {wanted} are to be seen"
        if source.window is not None and self.sink_tokens not in (0, source.sink_tokens):
            kept = f"{reference.name} keeps {source.sink_tokens} first tokens beside its window"
            return f"{kept}, and {self.sink_tokens} are to be seen; 0 or as many do"
        return None

    def resolved(self, site: Site) -> Attention:
        dim = head_dim_of(self, site)
        sizes = {"kv_heads": self.kv_heads or self.heads, "head_dim": dim, "scale": self.scale or dim**-0.5}
        return self.model_copy(update=sizes)

    def sights(self, site: Site) -> tuple[Sight, ...]:  # noqa: ARG002
        if self.grid is not None:
            widest = self.grid.widest(slides=self.boundary == "inward")
            # In a window along the line there are tokens of other columns, too.
            return (Sight(1, is_causal=False), Sight(widest, is_causal=False, is_certain=False))
        if self.selection is None:
            widest = self.window if self.boundary == "clip" or self.window is None else 2 * self.window - 1
            return (Sight(widest, is_causal=self.causal, sinks=self.sink_tokens),)
        # A source's choice is not known here, but that its own block is in it.
        if self.selection.decode_only:
            return (Sight(),)
        recent = self.selection.recent if self.selection.source is None else 1
        return (Sight((recent - 1) * self.selection.block + 1), Sight(is_certain=False))

    def runtime(self, site: Site) -> dict[str, Any]:
        data = self.resolved(site).plain()
        data["rope"] = None if self.rope is None else self.rope.runtime()
        data["grid"] = None if self.grid is None else self.grid.runtime()
        data["selection"] = None if self.selection is None else self.selection.runtime()
        # Of one head, all together are each.
        data["qk_norm"] = self.qk_norm if self.heads > 1 else self.qk_norm is not False
        defaults = {name: type(self).model_fields[name].default for name in LATER}
        defaults["scale"] = data["head_dim"] ** -0.5
        return {name: value for name, value in data.items() if name not in LATER or value != defaults[name]}

    def canonical(self, site: Site) -> dict[str, Any]:
        data = {**self.runtime(site), "rope": self._rotation(site)}
        # What is false counts as absent, and this is no absence.
        return data if self.causal else {**data, "causal": "no"}

    def _rotation(self, site: Site) -> dict[str, Any] | None:
        """How keys turn, in one spelling."""
        if self.rope is None:
            return None
        data = self.rope.runtime()
        del data["fraction"]
        return {**data, "dims": self._turned(site)}

    def problems(self, site: Site) -> list[Problem]:
        found = heads_problems(self, site)
        if self.kv_heads is not None and self.heads % self.kv_heads:
            what = f"{self.kv_heads} does not divide heads {self.heads}"
            found.append(Problem("kv_heads", what, divisors_near(self.kv_heads, self.heads)))
        if not found and self.rope is not None:
            found += self._rope_problems(self.rope, site)
        if self.grid is not None:
            capped = self.softcap is not None or self.sinks
            found += self.grid.problems(causal=self.causal, window=self.window, capped=capped)
        return found + conflicts(self)

    def _rope_problems(self, rope: Rope, site: Site) -> list[Problem]:
        wrong = rope.problem()
        if wrong is not None:
            return [Problem(f"rope.{wrong[0]}", wrong[1], code="out-of-range")]
        dim, turned = head_dim_of(self, site), self._turned(site)
        if turned > 0 and turned % 2 == 0:
            return []
        if rope.fraction == 1:
            what = f"head_dim is {dim}, and RoPE turns pairs of dimensions"
            return [
                Problem(
                    "heads" if self.head_dim is None else "head_dim", what, "an even head_dim, or rope: null"
                )
            ]
        what = f"{rope.fraction:g} of head_dim {dim} is {turned} dimensions, and RoPE turns pairs"
        return [Problem("rope.fraction", what, "an even number of dimensions of at least 2, or rope: null")]

    def _turned(self, site: Site) -> int:
        return int(self.rope.fraction * head_dim_of(self, site)) if self.rope is not None else 0

    def params(self, site: Site) -> int:
        dim, queries, keys, values = head_dim_of(self, site), *self._projected()
        normed = {False: 0, True: 1 + (keys > 0), "full": self.heads + keys}[self.qk_norm]
        biases = 0 if self.bias == "none" else dim * (queries + keys + values)
        biases += site.hidden_size if self.bias == "all" else 0
        single = (self.heads if self.sinks else 0) + (self.values_from is not None)
        return self._weights(site) + dim * normed + biases + single

    def flops(self, site: Site, context: int) -> int:
        """FLOPs of decoding a token; without `causal`, which cannot decode, of a token in a pass over as many."""
        if not self.causal:
            return round(self.prefill_flops(site, context + 1))
        tokens = context + 1
        if self.selection is None:
            seen, before = self._visible(tokens), 0
        else:
            seen, before = self.selection.keys_read(tokens), self.selection.scored(tokens)
        return 2 * self._weights(site) + self._core(site) * seen + self._scoring(site) * before

    def prefill_flops(self, site: Site, length: int) -> float:
        if self.selection is not None:
            mean, before = self.selection.mean_keys_read(length), self.selection.mean_scored(length)
            return 2 * self._weights(site) + self._core(site) * mean + self._scoring(site) * before
        if self.grid is not None:
            seen_there = self.grid.mean_keys_seen(length, slides=self.boundary == "inward")
            return 2 * self._weights(site) + self._core(site) * seen_there
        seen = self._visible(length)
        if self.boundary == "inward":
            return 2 * self._weights(site) + self._core(site) * min(length, 2 * seen - 1)
        # The sum of min(t, what is in view) over t = 1 … length, over length; from both sides, a token's own counted once.
        mean = (seen * (seen + 1) / 2 + (length - seen) * seen) / max(length, 1)
        return 2 * self._weights(site) + self._core(site) * (mean if self.causal else 2 * mean - 1)

    def states(self, site: Site) -> tuple[State, ...]:
        if not self.causal:
            return ()
        shape = (self.kv_heads or self.heads, head_dim_of(self, site))
        # The next token sees itself and what is held.
        limit = None if self.window is None else self.sink_tokens + self.window - 1
        names = ("keys", "values") if self.keys_from is None else ()
        kept = tuple(State(name, shape, grows=True, limit=limit) for name in names)
        if self.selection is None or self.selection.source is not None:
            return kept
        return (*kept, self.selection.means(shape))

    def read_bytes(self, site: Site, context: int, element: int) -> int:
        """Keys and values that the token sees, its own left out, whoever caches them; to choose blocks also their means."""
        if not self.causal:
            return 0
        if self.selection is None:
            seen, means = self._visible(context + 1) - 1, 0
        else:
            seen = self.selection.keys_read(context + 1) - 1
            means = self.selection.scored(context + 1)
        row = (self.kv_heads or self.heads) * head_dim_of(self, site) * element
        return min(2 * seen + means, 2 * context) * row

    def _projected(self) -> tuple[int, int, int]:
        """Heads that the projections of q (with its gate), k and v give."""
        own = 0 if self.keys_from is not None else self.kv_heads or self.heads
        return self.heads * (2 if self.gate else 1), own, own

    def _weights(self, site: Site) -> int:
        return site.hidden_size * head_dim_of(self, site) * (sum(self._projected()) + self.heads)

    def _core(self, site: Site) -> int:
        """FLOPs of one query against one key, and of that weight on its value."""
        return 4 * self.heads * head_dim_of(self, site)

    def _scoring(self, site: Site) -> int:
        """FLOPs of one query against one mean, of all its heads or of the heads' mean."""
        is_split = self.selection is not None and self.selection.scores == "kernels"
        heads = self.heads if is_split else self.kv_heads or self.heads
        return 2 * heads * head_dim_of(self, site)

    def _visible(self, tokens: int) -> int:
        return tokens if self.window is None else min(tokens, self.sink_tokens + self.window)
