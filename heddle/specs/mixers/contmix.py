"""ContMix: short kernels over the last tokens, made for each token from what came before."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from heddle.specs.base import Schema
from heddle.specs.cost import CHUNK, FLOAT32_BYTES, State
from heddle.specs.kinds import Contract, HeadedMixer, Problem, head_dim_of, heads_problems
from heddle.specs.layer import Site
from heddle.specs.sight import Sight

_BOTH_SIDES = "it sees later tokens: outputs depend on all of them, and nothing can be decoded"


class ContMixGrid(Schema):
    """Tokens row by row as an image, of which kernels see both sides; there are as many rows as the tokens fill."""

    width: Annotated[int, Field(ge=1, le=10**6, description="Tokens of a row.")]
    small_taps: Annotated[
        int,
        Field(
            ge=1,
            le=63,
            description="Side of the kernel over the second half of a head's channels, in tokens; odd.",
        ),
    ] = 5


class ContMix(HeadedMixer):
    """OverLoCK's context-mixing dynamic convolution (arXiv 2502.20087), on images, and in a causal form in one dimension, ours.

        c_s = g_s c_s + (1 - g_s) W_k x,   g_s = 1 - 2^-s,   s = 1 … summaries
        a_s = q · c_s / sqrt(query_dim),   w = softmax over taps of (P a + r)
        y_t = W_o (silu(W_g x_t) * (sum_j (w_tj + u_j) v_(t-j)))

    P is one for all heads, r one number for each head and tap, u a kernel that is the same for every token. What is further
    back than the kernels has a say in weights alone.

    With `grid` it is the paper's form: c_s are the means of W_k x over summaries x summaries regions of the image, the kernels
    are squares around the token, `taps` wide for the first half of a head's channels and `small_taps` for the others, each
    with a softmax of its own, and the image is 0 beyond its edges. Batch norms, squeeze-and-excite and the dilated branches
    of the released network are left out.
    """

    ops: ClassVar[tuple[str, ...]] = ("dynamic_conv",)
    cases: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"heads": 4},
        {"heads": 3, "head_dim": 10, "query_dim": 6, "taps": 5, "summaries": 3, "static_taps": 0},
        {"heads": 2, "head_dim": 5, "taps": 5, "summaries": 2, "grid": {"width": 4, "small_taps": 3}},
    )
    kind: Literal["contmix"] = "contmix"
    heads: Annotated[int, Field(ge=1, le=4096, description="Heads, each with kernels of its own (a count).")]
    head_dim: Annotated[
        int | None, Field(ge=1, le=65_536, description="Channels of a head; null: hidden_size / heads.")
    ] = None
    query_dim: Annotated[
        int | None,
        Field(ge=1, le=65_536, description="Dimensions of a head's query and summaries; null: head_dim / 2."),
    ] = None
    taps: Annotated[
        int,
        Field(
            ge=1,
            le=1024,
            description="Tokens that a kernel mixes, the own one included; with grid the side of its square, odd.",
        ),
    ] = 16
    summaries: Annotated[
        int,
        Field(
            ge=1,
            le=32,
            description="Running means that kernels are made from, over some 2, 4, 8, … tokens; with grid the regions on "
            "each side of the image (7 in the paper).",
        ),
    ] = 8
    static_taps: Annotated[
        int | None,
        Field(
            ge=0,
            le=1024,
            description="Tokens that the kernel beside them mixes, the same everywhere; null: as taps; 0: none; with grid the "
            "side of its square, odd.",
        ),
    ] = None
    grid: Annotated[
        ContMixGrid | None,
        Field(description="Tokens as an image, for encoders: kernels look to all sides; null: a line."),
    ] = None

    @property
    def is_causal(self) -> bool:
        return self.grid is None

    def exemptions(self) -> Mapping[Contract, str]:
        if self.grid is None:
            return self.exempt
        return {"causality": _BOTH_SIDES, "step": _BOTH_SIDES, "chunks": _BOTH_SIDES}

    def resolved(self, site: Site) -> ContMix:
        sizes = {
            "head_dim": head_dim_of(self, site),
            "query_dim": self._query(site),
            "static_taps": self._static,
        }
        return self.model_copy(update=sizes)

    def runtime(self, site: Site) -> dict[str, Any]:
        data = self.resolved(site).plain()
        # What came later is not there where it says nothing: hashes stay.
        return data if self.grid is not None else {name: one for name, one in data.items() if name != "grid"}

    def problems(self, site: Site) -> list[Problem]:
        found = heads_problems(self, site)
        if self.grid is None:
            return found
        if not found and head_dim_of(self, site) < 2:
            name = "heads" if self.head_dim is None else "head_dim"
            found.append(Problem(name, "a head of one channel has no two halves", "a head_dim of at least 2"))
        sides = {"taps": self.taps, "static_taps": self._static, "grid.small_taps": self.grid.small_taps}
        even = [name for name, side in sides.items() if side and side % 2 == 0]
        if self.static_taps is None and "static_taps" in even:
            even.remove("static_taps")
        what = "a square around a token has an odd side"
        return found + [Problem(name, what, f"{sides[name] - 1} or {sides[name] + 1}") for name in even]

    def params(self, site: Site) -> int:
        single = self._made * (self._means + self.heads) + self._fixed * self._width(site)
        return self._weights(site) + single

    def flops(self, site: Site, context: int) -> int:
        """FLOPs of decoding a token; with `grid`, which cannot decode, of a token in a pass over as many."""
        if self.grid is not None:
            return round(self.prefill_flops(site, context + 1))
        # A mean fades and takes a key: 3; it meets the query: 2.
        return self._outside(site) + 5 * self.heads * self.summaries * self._query(site)

    def prefill_flops(self, site: Site, length: int) -> float:
        if self.grid is not None:
            # A key joins the mean of its region, and a query meets all means.
            return self._outside(site) + 2 * self.heads * self._query(site) * (1 + self._means)
        C, S, query = min(CHUNK, length), self.summaries, self._query(site)
        # Queries and keys of a chunk, what the means make of that, and the means at its ends.
        return self._outside(site) + 2 * self.heads * (C * (query + S) + 2 * S * query)

    def sights(self, site: Site) -> tuple[Sight, ...]:  # noqa: ARG002
        if self.grid is not None:
            return (Sight(is_causal=False),)
        # Through the weights everything has a say, which fades.
        return (Sight(max(self.taps, self._static)), Sight(log_decay=math.log1p(-(2.0**-self.summaries))))

    def states(self, site: Site) -> tuple[State, ...]:
        if self.grid is not None:
            return ()
        means = State("means", (self.heads, self.summaries, self._query(site)), element=FLOAT32_BYTES)
        return means, State("values", (max(self.taps, self._static) - 1, self._width(site)))

    @property
    def _static(self) -> int:
        return self.taps if self.static_taps is None else self.static_taps

    @property
    def _means(self) -> int:
        """Means that kernels are made from."""
        return self.summaries if self.grid is None else self.summaries**2

    @property
    def _made(self) -> int:
        """Taps that each token makes for a head."""
        return self.taps if self.grid is None else self.taps**2 + self.grid.small_taps**2

    @property
    def _fixed(self) -> int:
        """Taps of the kernel that is the same everywhere."""
        return self._static if self.grid is None else self._static**2

    def _query(self, site: Site) -> int:
        return self.query_dim or max(1, head_dim_of(self, site) // 2)

    def _width(self, site: Site) -> int:
        return self.heads * head_dim_of(self, site)

    def _weights(self, site: Site) -> int:
        return site.hidden_size * (2 * self.heads * self._query(site) + 3 * self._width(site))

    def _outside(self, site: Site) -> int:
        """Projections, weights of taps, and taps."""
        dim = head_dim_of(self, site)
        taps = self.taps * dim
        if self.grid is not None:
            taps = self.taps**2 * (dim // 2) + self.grid.small_taps**2 * (dim - dim // 2)
        mixed = self.heads * (self._means * self._made + taps + self._fixed * dim)
        return 2 * (self._weights(site) + mixed)
