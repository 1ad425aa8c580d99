"""What every kind of mixer and of channel block answers, and how it says what cannot be built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from heddle.specs.base import Schema
from heddle.specs.cost import State
from heddle.specs.layer import Site


@dataclass(frozen=True, slots=True)
class Problem:
    """A size that does not fit. `field` is its dotted path inside the mixer or channel block."""

    field: str
    what: str
    hint: str | None = None
    code: str = "dims-not-divisible"


class MixerSpec(Schema):
    """A block that mixes along time. All costs are of one sequence; `element` is the bytes of a number."""

    kind: str
    # Set by `resolved`; the layer's own count may be derived from hidden_size.
    heads: int
    head_dim: int | None = None

    def resolved(self, site: Site) -> Self:
        """The same mixer with every size filled in."""
        raise NotImplementedError

    def problems(self, site: Site) -> list[Problem]:
        """What cannot be built at `site`."""
        raise NotImplementedError

    def runtime(self, site: Site) -> dict[str, Any]:
        """Plain data for the torch module: every field, resolved."""
        return self.resolved(site).model_dump()

    def canonical(self, site: Site) -> dict[str, Any]:
        """What decides the computation: as `runtime`, with equal computations spelled in one way."""
        return self.runtime(site)

    def params(self, site: Site) -> int:
        """Parameters."""
        raise NotImplementedError

    def flops(self, site: Site, context: int) -> int:
        """FLOPs of decoding one token after `context` others."""
        raise NotImplementedError

    def prefill_flops(self, site: Site, length: int) -> float:
        """FLOPs per token, the mean over a causal pass of `length` tokens."""
        raise NotImplementedError

    def states(self, site: Site) -> tuple[State, ...]:
        """The tensors its cache holds."""
        raise NotImplementedError

    def state_bytes(self, site: Site, context: int, element: int) -> int:
        """Bytes its cache holds after `context` tokens."""
        return sum(state.bytes(context, element) for state in self.states(site))

    def cache_bytes_per_token(self, site: Site, element: int) -> int:
        """Bytes by which its cache grows with a token, before any window is full."""
        return sum(state.bytes_per_token(element) for state in self.states(site) if state.grows)


class ChannelSpec(Schema):
    """A block that mixes the features of one token."""

    # Whether there is a block at all, and so a norm before it.
    is_empty: ClassVar[bool] = False
    kind: str

    def resolved(self, site: Site) -> Self:
        """The same block with every size filled in."""
        raise NotImplementedError

    def problems(self, site: Site) -> list[Problem]:  # noqa: ARG002
        """What cannot be built at `site`."""
        return []

    def runtime(self, site: Site) -> dict[str, Any]:
        """Plain data for the torch module."""
        raise NotImplementedError

    def canonical(self, site: Site) -> dict[str, Any]:
        """What decides the computation."""
        return self.runtime(site)

    def params(self, site: Site) -> int:
        """Parameters."""
        raise NotImplementedError

    def flops(self, site: Site) -> int:
        """FLOPs per token, in prefill and in decode."""
        raise NotImplementedError


def head_dim_of(mixer: MixerSpec, site: Site) -> int:
    """`head_dim`, or its share of the hidden size."""
    return mixer.head_dim or max(1, site.hidden_size // mixer.heads)


def heads_problems(mixer: MixerSpec, site: Site) -> list[Problem]:
    """That heads divides hidden_size where it must."""
    if mixer.head_dim is not None or site.hidden_size % mixer.heads == 0:
        return []
    what = f"{mixer.heads} does not divide hidden_size {site.hidden_size}"
    return [Problem("heads", what, f"{divisors_near(mixer.heads, site.hidden_size)}; or set head_dim")]


def divisors_near(value: int, whole: int) -> str:
    """`4 or 8 do`: the divisors of `whole` below and above `value`."""
    below = next(number for number in range(min(value, whole), 0, -1) if whole % number == 0)
    above = next((number for number in range(value + 1, whole + 1) if whole % number == 0), None)
    return f"{below} does" if above is None else f"{below} or {above} do"
