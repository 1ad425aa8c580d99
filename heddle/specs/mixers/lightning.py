"""Lightning attention: linear attention with a fixed decay for each head and layer, as MiniMax-01 has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from heddle.specs.cost import CHUNK, FLOAT32_BYTES, State
from heddle.specs.kinds import HeadedMixer, Problem, head_dim_of
from heddle.specs.layer import Site
from heddle.specs.mixers.attention import Attention
from heddle.specs.rope import Rope
from heddle.specs.sight import Sight

# Fields of the language that came later: at their defaults they are left out of the data, as if they did not exist.
LATER = ("activation", "qk_norm", "rope")


class Lightning(HeadedMixer):
    """Linear attention whose memory fades at a rate fixed for each head and layer.        (arXiv 2401.04658, 2501.08313)

        S_t = exp(-s) S_{t-1} + k_t v_tᵀ,   o_t = S_tᵀ q_t,   q, k, v = silu(W x)
        y = W_o (rms over all heads(o) * sigmoid(W_g x))

    Two tables of slopes s are published, of head h (from 0) of H in layer l (from 0) of L:

        geometric   2^(-8 (h+1) / H) (1 - l / (L - 1 + 1e-5) + 1e-5)        MiniMax-Text-01, OpenNLPLab
        linear      (8 h / H) (1 - l / L)        TransNormerLLM (arXiv 2307.14995), flash-linear-attention
        alibi       2^(-8 (h+1) / H), the same in every layer        HypeNet (arXiv 2601.22156)

    HypeNet's layer has `activation: none`, `qk_norm`, `rope` and these slopes.
    """

    ops: ClassVar[tuple[str, ...]] = ("decay_attention",)
    cases: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"heads": 4},
        {"heads": 3, "head_dim": 8, "slopes": "linear", "short_conv": 4, "norm_eps": 1e-5},
        {"heads": 4, "slopes": "alibi", "activation": "none", "qk_norm": True, "rope": {"theta": 500.0}},
    )
    kind: Literal["lightning"] = "lightning"
    heads: Annotated[int, Field(ge=1, le=4096, description="Heads (a count).")]
    head_dim: Annotated[
        int | None, Field(ge=1, le=65_536, description="Dimensions of a head; null: hidden_size / heads.")
    ] = None
    slopes: Annotated[
        Literal["geometric", "linear", "alibi"],
        Field(
            description="The table of decay rates: that of MiniMax-01, of TransNormerLLM's text, or of HypeNet, which has no "
            "layers."
        ),
    ] = "geometric"
    short_conv: Annotated[
        int | None,
        Field(ge=2, le=64, description="Taps of a causal convolution on q, k and v, in tokens; null: none."),
    ] = None
    norm_eps: Annotated[
        float | None,
        Field(
            gt=0,
            le=0.1,
            description="Added under the root of the output norm; null: as the model's (MiniMax-Text-01 has 1e-6 here).",
        ),
    ] = None

    activation: Annotated[
        Literal["silu", "none"], Field(description="What q, k and v pass after projection and convolution.")
    ] = "silu"
    qk_norm: Annotated[
        bool, Field(description="RMSNorm of each head's query and key, after the activation.")
    ] = False
    rope: Annotated[Rope | None, Field(description="Rotary positions; null: none.")] = None

    def resolved(self, site: Site) -> Lightning:
        sizes = {"head_dim": head_dim_of(self, site), "norm_eps": self.norm_eps or site.norm_eps}
        return self.model_copy(update=sizes)

    def problems(self, site: Site) -> list[Problem]:
        if self.activation == "none" and self.short_conv is not None:
            what = "the convolution ends in a SiLU"
            return [
                Problem("activation", what, "activation: silu, or short_conv: null", "conflicting-fields")
            ]
        return self._turned().problems(site)

    def runtime(self, site: Site) -> dict[str, Any]:
        data = {**self.resolved(site).plain(), "rope": None if self.rope is None else self.rope.runtime()}
        defaults = {name: type(self).model_fields[name].default for name in LATER}
        return {name: value for name, value in data.items() if name not in LATER or value != defaults[name]}

    def canonical(self, site: Site) -> dict[str, Any]:
        turned = {} if self.rope is None else {"rope": self._turned().canonical(site)["rope"]}
        return {**self.runtime(site), **turned}

    def kernels(self) -> tuple[str, ...]:
        return self.ops if self.short_conv is None else (*self.ops, "causal_conv1d")

    def params(self, site: Site) -> int:
        width = self._width(site)
        normed = 2 * head_dim_of(self, site) if self.qk_norm else 0
        return 5 * site.hidden_size * width + (self.short_conv or 0) * 3 * width + width + normed

    def flops(self, site: Site, context: int) -> int:  # noqa: ARG002 - the state does not grow
        return self._outside(site) + 5 * self._width(site) * head_dim_of(self, site)

    def prefill_flops(self, site: Site, length: int) -> float:
        K, C = head_dim_of(self, site), min(CHUNK, length)
        # q kᵀ and P v: C K each; q S and kᵀ v: K² each.
        return self._outside(site) + self.heads * 2 * (2 * C * K + 2 * K * K)

    def sights(self, site: Site) -> tuple[Sight, ...]:
        head, layer, last = range(self.heads), site.layer_index, site.layer_count - 1
        if self.slopes == "linear":
            depth = 1.0 - layer / (last + 1)
            return tuple(Sight(log_decay=-8.0 * h / self.heads * depth) for h in head)
        depth = 1.0 if self.slopes == "alibi" else 1.0 - layer / (last + 1e-5) + 1e-5
        return tuple(Sight(log_decay=-(2.0 ** (-8.0 * (h + 1) / self.heads)) * depth) for h in head)

    def states(self, site: Site) -> tuple[State, ...]:
        K = head_dim_of(self, site)
        memory = State("memory", (self.heads, K, K), element=FLOAT32_BYTES)
        if self.short_conv is None:
            return (memory,)
        return memory, State("conv", (3 * self._width(site), self.short_conv - 1))

    def _turned(self) -> Attention:
        """The attention whose heads and rotation it has."""
        return Attention(heads=self.heads, head_dim=self.head_dim, rope=self.rope)

    def _width(self, site: Site) -> int:
        return self.heads * head_dim_of(self, site)

    def _outside(self, site: Site) -> int:
        width = self._width(site)
        return 2 * 5 * site.hidden_size * width + 2 * (self.short_conv or 0) * 3 * width
