"""What mixers with the projections of softmax attention have in common: sizes, positions and what cannot be built."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

from heddle.specs.kinds import HeadedMixer, Problem, head_dim_of
from heddle.specs.layer import Site
from heddle.specs.mixers.attention import Attention
from heddle.specs.rope import Rope


class AttentionMixer(HeadedMixer):
    """Queries, keys and values of some softmax attention, of which the kind makes something else.

    A kind declares `kv_heads` and `rope` with what it has beside them, and names in `of_attention` the fields that both have.
    """

    of_attention: ClassVar[tuple[str, ...]] = ("heads", "kv_heads", "head_dim", "rope", "qk_norm")

    if TYPE_CHECKING:
        # Fields of the kinds: here they would stand before those that a kind has of its own.
        kv_heads: int | None
        rope: Rope | None

    def resolved(self, site: Site) -> Self:
        sizes = {"kv_heads": self.kv_heads or self.heads, "head_dim": head_dim_of(self, site)}
        return self.model_copy(update=sizes)

    def problems(self, site: Site) -> list[Problem]:
        return self._attention().problems(site)

    def runtime(self, site: Site) -> dict[str, Any]:
        rope = None if self.rope is None else self.rope.runtime()
        return {**self.resolved(site).plain(), "rope": rope}

    def canonical(self, site: Site) -> dict[str, Any]:
        return {**self.runtime(site), "rope": self._attention().canonical(site)["rope"]}

    def _attention(self) -> Attention:
        """The attention whose projections it has."""
        return Attention(**{name: getattr(self, name) for name in self.of_attention})
