"""Landmark attention: a key for each block of tokens, which gates what is read of the block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from heddle.specs.attention_mixer import AttentionMixer
from heddle.specs.cost import FLOAT32_BYTES, State
from heddle.specs.kinds import head_dim_of
from heddle.specs.layer import Site
from heddle.specs.rope import Rope
from heddle.specs.selection import Selection
from heddle.specs.sight import Sight


class Landmark(AttentionMixer):
    """Landmark attention (arXiv 2305.16300): a softmax over landmarks and the own block, and one inside each block.

        l_b = W_l mean_{j in b} x_j,   gate_i = softmax over {landmarks l_b of earlier blocks, keys k_j of the own block}
        o_i = sum_{j in own block} gate_i(j) v_j + sum_b gate_i(l_b) sum_{j in b} softmax_{j in b}(q_i · k_j) v_j

    Training reads all blocks. Evaluation reads the `top` blocks whose landmarks have the largest logits, for each token and
    query head. In the paper a landmark is a token of its own after each block; here it is a key that the block's tokens make, so
    that text, labels and generation stay as they are.
    """

    ops: ClassVar[tuple[str, ...]] = ("landmark_attention",)
    cases: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"heads": 4, "block": 7, "top": None},
        {
            "heads": 4,
            "kv_heads": 2,
            "head_dim": 6,
            "rope": {"theta": 500.0},
            "qk_norm": True,
            "block": 5,
            "top": 2,
        },
    )
    routes: ClassVar[bool] = True
    kind: Literal["landmark"] = "landmark"
    heads: Annotated[int, Field(ge=1, le=4096, description="Query heads (a count).")]
    kv_heads: Annotated[
        int | None, Field(ge=1, le=4096, description="Key and value heads (a count); null: as many as heads.")
    ] = None
    head_dim: Annotated[
        int | None, Field(ge=1, le=65_536, description="Dimensions of a head; null: hidden_size / heads.")
    ] = None
    rope: Annotated[
        Rope | None, Field(description="Rotary positions; a landmark stands at its block's end; null: none.")
    ] = Field(default_factory=Rope)
    qk_norm: Annotated[
        bool, Field(description="RMSNorm of each head's query, key and landmark, before the rotation.")
    ] = False
    block: Annotated[
        int, Field(ge=1, le=65_536, description="Tokens of a block, which has one landmark.")
    ] = 64
    top: Annotated[
        int | None,
        Field(
            ge=1,
            le=10**6,
            description="Earlier blocks that a token reads in evaluation (a count); null: all, as in training.",
        ),
    ] = 32

    def params(self, site: Site) -> int:
        return self._attention().params(site) + self._landmark_weights(site)

    def flops(self, site: Site, context: int) -> int:
        tokens, read = context + 1, self._read()
        before = read.blocks_before(tokens)
        return self._outside(site) + self._core(site) * (2 * read.keys_read(tokens) + before)

    def prefill_flops(self, site: Site, length: int) -> float:
        read = self._read()
        seen = 2 * read.mean_keys_read(length) + read.mean_blocks_before(length)
        return self._outside(site) + self._core(site) * seen

    def sights(self, site: Site) -> tuple[Sight, ...]:  # noqa: ARG002
        # Of an own block that has just begun there is one token.
        return (Sight(),) if self.top is None else (Sight(1), Sight(is_certain=False))

    def states(self, site: Site) -> tuple[State, ...]:
        heads, dim = self.kv_heads or self.heads, head_dim_of(self, site)
        return (
            *self._attention().states(site),
            State("landmarks", (heads, dim), grows=True, every=self.block),
            # The sum over the open block and the number of its tokens.
            State("open", (heads, dim + 1), element=FLOAT32_BYTES),
        )

    def read_bytes(self, site: Site, context: int, element: int) -> int:
        """Landmarks, and keys and values of the blocks that are read, the token's own left out."""
        read, (keys, _, marks, opened) = self._read(), self.states(site)
        rows = min(read.keys_read(context + 1) - 1, context)
        held = marks.bytes(context, element) + opened.bytes(context, element)
        return 2 * keys.bytes(rows, element) + held

    def _read(self) -> Selection:
        """How many blocks are read: the own one and `top` before it."""
        return Selection(
            block=self.block, count=10**6 if self.top is None else self.top + 1, sink=0, recent=1
        )

    def _landmark_weights(self, site: Site) -> int:
        return site.hidden_size * (self.kv_heads or self.heads) * head_dim_of(self, site)

    def _core(self, site: Site) -> int:
        """FLOPs of one query against one key or landmark, or of one weight on its value."""
        return 2 * self.heads * head_dim_of(self, site)

    def _outside(self, site: Site) -> int:
        heads = 2 * self.heads + 2 * (self.kv_heads or self.heads)
        projected = site.hidden_size * head_dim_of(self, site) * heads
        return 2 * (projected + self._landmark_weights(site))
