"""Liger: a softmax attention's own weights as a gated linear recurrence beside a short window."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from heddle.specs.attention_mixer import AttentionMixer
from heddle.specs.cost import CHUNK, FLOAT32_BYTES, State
from heddle.specs.kinds import FROM_MIDDLE, Contract, Problem, head_dim_of
from heddle.specs.layer import Site
from heddle.specs.rope import Rope
from heddle.specs.sight import Sight

# A key of 0 has the gate 1/2 to the power of 1/16.
GATE = math.log(2.0) / 16.0


class Liger(AttentionMixer):
    """Liger attention (arXiv 2503.01496): gates are made from keys, so it has the weights of softmax attention and no others.

        S_t = diag(a_t) S_{t-1} + softmax(k_t) v_tᵀ,   r_t = S_tᵀ softmax(q_t),   a_t = sigmoid(k_t)^(1/16)
        w_t = softmax attention of q_t over the last `window` tokens and the first `sink_tokens`, q and k turned by RoPE
        y = W_o (share · r + (1 - share) · w)

    Both softmaxes of the recurrence are over a head's dimensions, and nothing turns there. Each query head has a state.

    On a GPU it is causal but for rounding, where equal bits are the rule: an output may move by rounding when a later token of
    its chunk (of at most 64) changes, since kernels take decays from the chunk's middle. Earlier chunks keep their bits.
    """

    rounded: ClassVar[Mapping[Contract, str]] = {"causality": FROM_MIDDLE}
    ops: ClassVar[tuple[str, ...]] = ("gla",)
    cases: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {
            "heads": 4,
            "kv_heads": 2,
            "head_dim": 6,
            "rope": {"theta": 500.0},
            "qk_norm": True,
            "bias": "qkv",
            "window": 7,
            "share": 0.4,
        },
        {"heads": 2, "kv_heads": 1, "window": 5, "sink_tokens": 3},
    )
    of_attention: ClassVar[tuple[str, ...]] = (*AttentionMixer.of_attention, "bias", "window", "sink_tokens")
    kind: Literal["liger"] = "liger"
    heads: Annotated[int, Field(ge=1, le=4096, description="Query heads (a count).")]
    kv_heads: Annotated[
        int | None, Field(ge=1, le=4096, description="Key and value heads (a count); null: as many as heads.")
    ] = None
    head_dim: Annotated[
        int | None, Field(ge=1, le=65_536, description="Dimensions of a head; null: hidden_size / heads.")
    ] = None
    rope: Annotated[Rope | None, Field(description="Rotary positions of the window; null: none.")] = Field(
        default_factory=Rope
    )
    qk_norm: Annotated[
        bool, Field(description="RMSNorm of each head's query and key, before gate, softmax and rotation.")
    ] = False
    bias: Annotated[
        Literal["none", "qkv", "all"],
        Field(
            description="Which projections have a bias: none, those of q, k and v (Qwen2), or the output's, too."
        ),
    ] = "none"
    window: Annotated[
        int | None,
        Field(ge=1, le=10**8, description="Tokens that the softmax sees, the own one included; null: all."),
    ] = 64
    sink_tokens: Annotated[
        int,
        Field(ge=0, le=10**6, description="First tokens that the softmax sees beside its window (a count)."),
    ] = 0
    share: Annotated[
        float,
        Field(
            gt=0,
            le=1,
            description="Share of the recurrence in the output, the rest is the window's; 1: there is no window.",
        ),
    ] = 0.5

    def canonical(self, site: Site) -> dict[str, Any]:
        data = super().canonical(site)
        # Without a window nothing turns.
        return data if self._has_window else {**data, "rope": None, "window": None}

    def problems(self, site: Site) -> list[Problem]:
        found = super().problems(site)
        if self.sink_tokens and not self._has_window:
            hint = "a share below 1, or sink_tokens: 0"
            found.append(
                Problem("sink_tokens", "with share 1 there is no softmax", hint, "conflicting-fields")
            )
        return found

    def runtime(self, site: Site) -> dict[str, Any]:
        data = super().runtime(site)
        # A later field of the language: at its default it is left out, as if it did not exist.
        return (
            data if self.sink_tokens else {name: one for name, one in data.items() if name != "sink_tokens"}
        )

    def params(self, site: Site) -> int:
        return self._attention().params(site)

    def flops(self, site: Site, context: int) -> int:
        dim = head_dim_of(self, site)
        seen = self._attention().flops(site, context) if self._has_window else self._projections(site)
        return seen + 5 * self.heads * dim**2

    def prefill_flops(self, site: Site, length: int) -> float:
        dim, C = head_dim_of(self, site), min(CHUNK, length)
        seen = self._attention().prefill_flops(site, length) if self._has_window else self._projections(site)
        return seen + self.heads * 4 * (C * dim + dim**2)

    def sights(self, site: Site) -> tuple[Sight, ...]:  # noqa: ARG002
        gated = Sight(log_decay=-GATE)
        return (gated, Sight(self.window, sinks=self.sink_tokens)) if self._has_window else (gated,)

    def states(self, site: Site) -> tuple[State, ...]:
        dim = head_dim_of(self, site)
        memory = State("memory", (self.heads, dim, dim), element=FLOAT32_BYTES)
        return (memory, *self._attention().states(site)) if self._has_window else (memory,)

    @property
    def _has_window(self) -> bool:
        return self.share < 1

    def _projections(self, site: Site) -> int:
        heads = 2 * self.heads + 2 * (self.kv_heads or self.heads)
        return 2 * site.hidden_size * head_dim_of(self, site) * heads
