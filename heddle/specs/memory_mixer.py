"""What mixers with a matrix memory in each head have in common: sizes, state and costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Self

from heddle.specs.cost import CHUNK, FLOAT32_BYTES, State
from heddle.specs.kinds import HeadedMixer, Problem, head_dim_of, heads_problems
from heddle.specs.layer import Site


class MemoryMixer(HeadedMixer):
    """A memory of K x V numbers a head, read by q and written by k and v, which a convolution may pass before.

    A kind declares `value_dim` (null: `expand` times head_dim), `short_conv` and what weights it has beside them.
    """

    # FLOPs of decoding a token for each number of the memory: to fade, to write and to read it.
    step_flops: ClassVar[int] = 5
    expand: ClassVar[int] = 1

    if TYPE_CHECKING:
        # Fields of the kinds: here they would stand before those that a kind has of its own.
        value_dim: int | None
        short_conv: int | None

    def resolved(self, site: Site) -> Self:
        K, V = self._sizes(site)
        return self.model_copy(update={"head_dim": K, "value_dim": V})

    def problems(self, site: Site) -> list[Problem]:
        return heads_problems(self, site)

    def kernels(self) -> tuple[str, ...]:
        return self.ops if self.short_conv is None else (*self.ops, "causal_conv1d")

    def flops(self, site: Site, context: int) -> int:  # noqa: ARG002 - the state does not grow
        K, V = self._sizes(site)
        return self._outside(site) + self.step_flops * self.heads * K * V

    def prefill_flops(self, site: Site, length: int) -> float:
        (K, V), C = self._sizes(site), min(CHUNK, length)
        # q kᵀ: C K; P v: C V; q S and kᵀ v: K V each.
        return self._outside(site) + self.heads * 2 * (C * (K + V) + 2 * K * V)

    def states(self, site: Site) -> tuple[State, ...]:
        memory = State("memory", (self.heads, *self._sizes(site)), element=FLOAT32_BYTES)
        if self.short_conv is None:
            return (memory,)
        return memory, State("conv", (self._channels(site), self.short_conv - 1))

    def _sizes(self, site: Site) -> tuple[int, int]:
        """Dimensions of a key and of a value head."""
        K = head_dim_of(self, site)
        return K, self.value_dim or self.expand * K

    def _channels(self, site: Site) -> int:
        """Channels of q, k and v together."""
        K, V = self._sizes(site)
        return self.heads * (2 * K + V)

    def _weights(self, site: Site) -> int:
        """Numbers in its projections."""
        raise NotImplementedError

    def _outside(self, site: Site) -> int:
        """FLOPs of a token beside the memory: projections and convolution."""
        return 2 * self._weights(site) + 2 * (self.short_conv or 0) * self._channels(site)
