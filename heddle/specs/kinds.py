"""What every kind of mixer and of channel block answers, and how it says what cannot be built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from heddle.specs.base import Schema
from heddle.specs.cost import State
from heddle.specs.layer import Site
from heddle.specs.sight import Sight

# What a layer may take from an earlier one. `stream`: what it gave to the residual stream.
Handed = Literal["keys", "values", "indices", "stream"]
# What every mixer keeps unless its kind says otherwise: earlier outputs do not depend on later tokens; decoding equals
# one pass; a prompt in pieces equals a whole one; `Call.written` decides what is remembered.
Contract = Literal["causality", "step", "chunks", "written"]
# Why kinds behind the ops `gla` and `kda` are `rounded` in causality.
FROM_MIDDLE = (
    "kernels take the decays of a chunk (of at most 64 tokens) from its middle: on a GPU, where a later token of the same chunk "
    "changes, outputs may differ by rounding; outputs of earlier chunks are equal to the bit"
)


@dataclass(frozen=True, slots=True)
class Problem:
    """A size that does not fit. `field` is its dotted path inside the mixer or channel block."""

    field: str
    what: str
    hint: str | None = None
    code: str = "dims-not-divisible"


@dataclass(frozen=True, slots=True)
class Reference:
    """An edge by name: `what` is taken from the nearest earlier layer called `name`, or made of the block `name`.

    `field` is its dotted path inside the mixer, or inside the block for `stream`.
    """

    field: str
    name: str
    what: Handed


class MixerSpec(Schema):
    """A block that mixes along time. All costs are of one sequence; `element` is the bytes of a number."""

    # "package.module:Class" of the torch module of a kind that lives in another package; ours are found by their kind.
    module: ClassVar[str | None] = None
    # The ops of `heddle.kernels` that it calls.
    ops: ClassVar[tuple[str, ...]] = ()
    # Contracts that it cannot keep, each with the reason and what holds instead.
    exempt: ClassVar[Mapping[Contract, str]] = {}
    # Contracts that it keeps to the bit in PyTorch alone, each with the reason and what holds of its kernels instead. That is
    # less than is asked of every kind, and no exemption: tests of what PyTorch computes hold it.
    rounded: ClassVar[Mapping[Contract, str]] = {}
    # Fields that make it take each of its roads, in sizes for a hidden size of 48: what the contracts are held over.
    cases: ClassVar[tuple[Mapping[str, Any], ...]] = ({"heads": 4},)
    # Whether what tokens say decides what is computed, or read, for them.
    routes: ClassVar[bool] = False
    kind: str

    @property
    def is_causal(self) -> bool:
        """Whether no output depends on later tokens."""
        return True

    def parts(self) -> Mapping[str, MixerSpec]:
        """The mixers it is made of, by their dotted path inside it; none for a plain mixer."""
        return {}

    def is_routed(self) -> bool:
        """Whether it, or a part of it, `routes`: then how long it takes depends on inputs and weights."""
        return self.routes or any(part.is_routed() for part in self.parts().values())

    def exemptions(self) -> Mapping[Contract, str]:
        """The contracts that it, or a part of it, cannot keep."""
        return self.exempt

    def roundings(self) -> Mapping[Contract, str]:
        """The contracts that it, or a part of it, keeps but for rounding where its kernels run."""
        return self.rounded

    def kernels(self) -> tuple[str, ...]:
        """The ops that it and its parts call, each once."""
        return self.ops

    def references(self) -> tuple[Reference, ...]:
        """What it takes from earlier layers."""
        return ()

    def offers(self, site: Site) -> Mapping[Handed, tuple[int, ...]]:  # noqa: ARG002
        """What later layers may take of it, with the shape of one token's part."""
        return {}

    def misfit(self, reference: Reference, source: MixerSpec, site: Site) -> str | None:
        """Why `reference`, one of its own, cannot take what `source` offers; None if it can."""
        return misfit_of(self.offers(site), reference, source, site)

    def sights(self, site: Site) -> tuple[Sight, ...]:  # noqa: ARG002
        """What a token sees: one or more for all heads together. A mixer that says nothing else sees all before it."""
        return (Sight(),)

    def bounds_width(self, site: Site) -> int:  # noqa: ARG002
        """Columns that it reads of the table of lower bounds, which a model has once with a row for each layer; 0: none."""
        return 0

    def resolved(self, site: Site) -> Self:
        """The same mixer with every size filled in."""
        raise NotImplementedError

    def problems(self, site: Site) -> list[Problem]:
        """What cannot be built at `site`."""
        raise NotImplementedError

    def risks(self) -> list[Problem]:
        """What can be built and may go wrong, of its own fields alone: what a check warns of."""
        return []

    def runtime(self, site: Site) -> dict[str, Any]:
        """Plain data for the torch module: every field, resolved."""
        return self.resolved(site).plain()

    def canonical(self, site: Site) -> dict[str, Any]:
        """What decides the computation: as `runtime`, with equal computations spelled in one way."""
        return self.runtime(site)

    def params(self, site: Site) -> int:
        """Parameters."""
        raise NotImplementedError

    def frozen_params(self, site: Site) -> int:  # noqa: ARG002
        """Weights that are never trained: no parameters, but read as those are."""
        return 0

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

    def host_bytes(self, site: Site, context: int, element: int) -> int:  # noqa: ARG002
        """Of `state_bytes` those that wait in host memory."""
        return 0

    def read_bytes(self, site: Site, context: int, element: int) -> int:
        """Bytes of caches, its own or an earlier layer's, that decoding one token after `context` others reads.

        All of its own, where a kind says nothing else.
        """
        return self.state_bytes(site, context, element)

    def cache_bytes_per_token(self, site: Site, element: int) -> int:
        """Bytes by which its cache grows with a token, before any window is full; rounded down where that is a mean."""
        return int(sum(state.bytes_per_token(element) for state in self.states(site) if state.grows))


class HeadedMixer(MixerSpec):
    """A mixer with heads of its own, whose output before the output projection is handed out head by head."""

    # `resolved` fills the size in; it may be derived from hidden_size.
    heads: int
    head_dim: int | None = None

    def head_counts(self) -> dict[str, int]:
        """The fields that count heads, all in one ratio whatever the number of heads; of a resolved mixer."""
        names = [name for name in ("heads", "kv_heads", "value_heads") if name in type(self).model_fields]
        return {name: getattr(self, name) for name in names}

    def output_heads(self) -> int:
        """The heads before the output projection; of a resolved mixer."""
        return self.head_counts().get("value_heads", self.heads)

    def takes_heads(self, count: int) -> bool:
        """Whether `with_heads(count)` keeps every group of heads whole; of a resolved mixer."""
        return all(held * count % self.heads == 0 for held in self.head_counts().values())

    def with_heads(self, count: int) -> Self:
        """A resolved mixer with `count` heads in the place of all: each as large as it was, groups in proportion."""
        assert self.takes_heads(count), f"{count} heads would tear the groups of {self.kind}"
        sizes = {name: held * count // self.heads for name, held in self.head_counts().items()}
        return self.model_copy(update=sizes)


def misfit_of(
    own: Mapping[Handed, tuple[int, ...]], reference: Reference, source: MixerSpec, site: Site
) -> str | None:
    """Why a mixer with shapes `own` cannot take what `source` offers: it offers no such thing, or in another shape."""
    given = source.offers(site).get(reference.what)
    if given is None:
        return f"{reference.name} is {source.kind}, which has no {reference.what} to hand on"
    wanted = own.get(reference.what)
    if wanted is not None and wanted != given:
        sizes = [" x ".join(map(str, shape)) for shape in (given, wanted)]
        return f"the {reference.what} of {reference.name} are {sizes[0]} a token, and {sizes[1]} are needed"
    return None


class ChannelSpec(Schema):
    """A block that mixes the features of one token."""

    # Whether there is a block at all, and so a norm before it.
    is_empty: ClassVar[bool] = False
    # Whether what a token says decides what is computed for it.
    routes: ClassVar[bool] = False
    module: ClassVar[str | None] = None
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

    def params_read(self, site: Site, tokens: int) -> int:  # noqa: ARG002
        """Parameters that a pass over `tokens` tokens reads: all, where a kind says nothing else."""
        return self.params(site)

    def active_params(self, site: Site) -> int:
        """Parameters that one token meets."""
        return self.params(site)

    def flops(self, site: Site) -> int:
        """FLOPs per token, in prefill and in decode."""
        raise NotImplementedError


def head_dim_of(mixer: HeadedMixer, site: Site) -> int:
    """`head_dim`, or its share of the hidden size."""
    return mixer.head_dim or max(1, site.hidden_size // mixer.heads)


def heads_problems(mixer: HeadedMixer, site: Site) -> list[Problem]:
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
