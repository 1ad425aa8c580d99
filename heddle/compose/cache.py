"""What a layer remembers between calls, and what a mixer is told about the call it is in.

transformers builds caches from a list of layer kinds that knows neither per-layer windows nor all-linear models. So the model
replaces the layers of any empty cache it is handed by its own (`hf.adopt`), and reads nothing else of it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from heddle.compose.modules.packing import Packing
from heddle.compose.modules.rope import Scaling, Tables, rotary_tables

T = TypeVar("T")


class StateLayer(CacheLayerMixin):  # type: ignore[misc]
    """What one mixer keeps: tensors with the batch first, and the number of tokens they stand for."""

    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.tokens = 0

    def advance(self, tokens: int) -> None:
        """Called once after every forward."""
        self.tokens += tokens

    def get_seq_length(self) -> int:
        return self.tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.tokens + query_length, 0

    def get_max_length(self) -> int:
        return -1

    # The name before transformers 5.13.
    get_max_cache_shape = get_max_length

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare: the first update brings the shapes."""

    def update(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError(f"{type(self).__name__} keeps no keys and values")

    def tensors(self) -> dict[str, Tensor]:
        """Everything it holds, by name."""
        raise NotImplementedError

    def replace(self, tensors: dict[str, Tensor]) -> None:
        """Takes over `tensors`, named as in `tensors()`."""
        raise NotImplementedError

    def reset(self) -> None:
        self.replace({})
        self.tokens = 0

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove == 0:
            return
        if abs(tokens_to_remove) != self.tokens:
            raise RuntimeError(f"a {type(self).__name__} cannot forget single tokens: it has merged them")
        self.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.replace({name: held[indices.to(held.device)] for name, held in self.tensors().items()})

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.replace({name: held.repeat_interleave(repeats, dim=0) for name, held in self.tensors().items()})


class KVLayer(StateLayer):
    """Keys and values of the tokens so far; with a window w only the last w-1.

    Those are all that the next token can see. `written` is there from the first call on that says which tokens are.

    Shapes:  keys: [B, KV heads, tokens held, d];  values likewise;  written: [B, 1, tokens held, 1] bool
    """

    def __init__(self, window: int | None = None) -> None:
        super().__init__()
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.written: Tensor | None = None
        self.window = window
        self.is_croppable = window is None

    def update(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Adds the new tokens; gives what the new queries may look at, the new tokens last."""
        keys, values = key_states, value_states
        if self.keys is not None and self.values is not None:
            keys = torch.cat((self.keys, keys), dim=-2)
            values = torch.cat((self.values, values), dim=-2)
        self.keys, self.values = self._held(keys), self._held(values)
        self.is_initialized = True
        return keys, values

    def mark(self, written: Tensor, earlier: int) -> Tensor:
        """Adds which new tokens are `written`; tells it of all keys that `update` gave, the new ones after `earlier` others.

        Shapes:  written: [B, T] of 0 and 1;  out: [B, earlier + T] likewise
        """
        past = None if self.written is None else self.written[:, 0, :, 0].to(written.dtype)
        past = written.new_ones(written.shape[0], earlier) if past is None else past
        full = torch.cat((past, written), dim=-1)
        self.written = self._held((full > 0.5)[:, None, :, None])
        return full

    def _held(self, full: Tensor) -> Tensor:
        held = full.shape[-2] if self.window is None else min(self.window - 1, full.shape[-2])
        last = full[:, :, full.shape[-2] - held :]
        # A short view would keep all of a long prefill in memory.
        return last.clone() if 2 * held < full.shape[-2] else last

    def tensors(self) -> dict[str, Tensor]:
        if self.keys is None or self.values is None:
            return {}
        marks = {} if self.written is None else {"written": self.written}
        return {"keys": self.keys, "values": self.values, **marks}

    def replace(self, tensors: dict[str, Tensor]) -> None:
        self.keys, self.values = tensors.get("keys"), tensors.get("values")
        self.written = tensors.get("written")
        self.is_initialized = self.keys is not None

    def crop(self, tokens_to_remove: int) -> None:
        removed = abs(tokens_to_remove)
        if removed in (0, self.tokens):
            super().crop(tokens_to_remove)
            return
        if self.keys is None or self.values is None or self.keys.shape[-2] < self.tokens:
            raise RuntimeError("a sliding window has dropped the tokens that a crop would bring back")
        self.replace({name: held[:, :, :-removed] for name, held in self.tensors().items()})
        self.tokens -= removed


class TokenCount(StateLayer):
    """What a mixer keeps that has no memory of its own: how many tokens there were."""

    is_croppable = True

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def replace(self, tensors: dict[str, Tensor]) -> None:
        """There is nothing to replace."""

    def crop(self, tokens_to_remove: int) -> None:
        self.tokens -= abs(tokens_to_remove)


class RecurrentLayer(StateLayer):
    """The named states of a recurrence, each of a size that does not grow."""

    def __init__(self) -> None:
        super().__init__()
        self.states: dict[str, Tensor] = {}

    def keep(self, states: dict[str, Tensor]) -> None:
        """Remembers the states after this call's last token."""
        self.states.update(states)
        self.is_initialized = True

    def tensors(self) -> dict[str, Tensor]:
        return self.states

    def replace(self, tensors: dict[str, Tensor]) -> None:
        self.states = dict(tensors)
        self.is_initialized = bool(tensors)


class CompositeLayer(StateLayer):
    """What a mixer made of others keeps: the layers of its parts, and named states of its own.

    The tensors of a part are named by its path: `mixers.0.keys`.
    """

    def __init__(self, parts: Mapping[str, StateLayer], own: RecurrentLayer | None = None) -> None:
        super().__init__()
        self.parts, self.own = dict(parts), own or RecurrentLayer()
        self.is_croppable = not self.own.states and all(part.is_croppable for part in parts.values())

    def _held(self) -> dict[str, StateLayer]:
        return {"": self.own, **{f"{path}.": part for path, part in self.parts.items()}}

    def advance(self, tokens: int) -> None:
        for part in self.parts.values():
            part.advance(tokens)
        # Parts whose step repeats stay where they are, and so does the whole.
        self.tokens = self.own.tokens = next(iter(self.parts.values())).tokens

    def tensors(self) -> dict[str, Tensor]:
        return {
            path + name: tensor
            for path, held in self._held().items()
            for name, tensor in held.tensors().items()
        }

    def replace(self, tensors: dict[str, Tensor]) -> None:
        for path, held in self._held().items():
            held.replace({name: tensors[path + name] for name in held.tensors() if path + name in tensors})
        self.is_initialized = bool(tensors)

    def reset(self) -> None:
        for held in self._held().values():
            held.reset()
        self.tokens, self.is_initialized = 0, False

    def crop(self, tokens_to_remove: int) -> None:
        if self.own.states:
            self.own.crop(tokens_to_remove)
        # First those that refuse, so that nothing is cropped by half.
        for part in sorted(self.parts.values(), key=lambda part: part.is_croppable):
            part.crop(tokens_to_remove)
        self.tokens = self.own.tokens = next(iter(self.parts.values())).tokens


class PreallocatedKVLayer(KVLayer):
    """A KV layer at a fixed length: every step writes the same slot in place.

    So a step can be captured and repeated. `keys` and `values` hold the context and one free slot after it.
    """

    def __init__(self, keys: Tensor, values: Tensor, *, context: int, window: int | None = None) -> None:
        super().__init__(window)
        self.keys, self.values = keys, values
        self.tokens = context
        self.is_initialized = True

    def advance(self, tokens: int) -> None:
        """The step repeats, so nothing moves on."""

    def update(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        slot = self.keys.shape[-2] - 1
        self.keys[:, :, slot : slot + 1] = key_states
        self.values[:, :, slot : slot + 1] = value_states
        return self.keys, self.values

    def mark(self, written: Tensor, earlier: int) -> Tensor:
        if self.written is None:
            self.written = written.new_ones(written.shape[0], 1, earlier + 1, 1, dtype=torch.bool)
        self.written[:, 0, earlier:, 0] = written > 0.5
        return self.written[:, 0, :, 0].to(written.dtype)


class PreallocatedRecurrentLayer(RecurrentLayer):
    """A recurrent layer whose every step starts from the same states, so it can be captured and repeated."""

    def __init__(self, states: dict[str, Tensor], *, context: int) -> None:
        super().__init__()
        self.states = states
        self.tokens = context
        self.is_initialized = True

    def advance(self, tokens: int) -> None:
        """The step repeats, so nothing moves on."""

    def keep(self, states: dict[str, Tensor]) -> None:
        """The new states are dropped: the next step is the same step."""


@dataclass(slots=True)
class Call:
    """One forward as a mixer sees it.

    Shapes:  positions: [B, T] int64;  padding: [B, T] bool, True for a real token, or None if all are;
             key_padding: [B, earlier tokens + T] likewise
    """

    positions: Tensor
    padding: Tensor | None = None
    key_padding: Tensor | None = None
    cache: StateLayer | None = None
    # Where the documents of a packed row lie; there is no padding then, and no cache.
    packing: Packing | None = None
    # Tables that layers of one forward share: rotations by (size, theta, scaling), masks by (keys, view).
    memo: dict[Any, Any] = field(default_factory=dict)
    # What layers hand on to later ones, by (what, layer): the streams, keys, values and indices of this forward.
    handed: dict[tuple[str, int], Any] = field(default_factory=dict)
    # Auxiliary losses of this forward: name, value, and the factor with which it joins the training loss.
    losses: list[tuple[str, Tensor, float]] = field(default_factory=list)
    # Shares with one target for their mean over the layers: name, share, target, and the factor of the loss.
    targets: list[tuple[str, Tensor, float, float]] = field(default_factory=list)
    # How often every expert was chosen, [E] int64 each, and sums over members of clusters, in the order of the calls.
    loads: list[Tensor] = field(default_factory=list)
    members: list[Tensor] = field(default_factory=list)
    # [B, T, H], or None: factors of the heads of the mixer that is called, before its output projection; of 0 without gradient.
    head_gates: Tensor | None = None
    # [B, T] of 0 and 1, or None for 1: which of these tokens the mixer remembers. Every token is answered.
    written: Tensor | None = None
    # The layer that is called, what later ones will ask for of it and others (keys of `handed`), and what it has given so far.
    layer: int = 0
    wanted: frozenset[tuple[str, int]] = frozenset()
    given: dict[str, Any] = field(default_factory=dict)

    @property
    def cu_seqlens(self) -> Tensor | None:
        """Where packed documents begin and the last one ends, as ops take it."""
        return None if self.packing is None else self.packing.cu_seqlens

    def at(self, cache: StateLayer | None, layer: int | None = None) -> Call:
        """The same call at another layer; None: at the same."""
        made = Call(self.positions, self.padding, self.key_padding, cache, self.packing)
        made.losses, made.targets, made.loads, made.given = self.losses, self.targets, self.loads, self.given
        made.memo, made.handed, made.wanted, made.members = self.memo, self.handed, self.wanted, self.members
        made.layer = self.layer if layer is None else layer
        return made

    def part(self, path: str, *, head_gates: Tensor | None = None, written: Tensor | None = None) -> Call:
        """The same call for a part of a composite mixer, with the part's own cache."""
        inner = self.at(self.cache.parts[path] if isinstance(self.cache, CompositeLayer) else None)
        inner.head_gates = self.head_gates if head_gates is None else head_gates
        inner.written = self.written if written is None else written
        return inner

    def gated(self, heads: Tensor) -> Tensor:
        """The outputs of heads [B, T, H, V], each times its factor."""
        return heads if self.head_gates is None else heads * self.head_gates[..., None].to(heads.dtype)

    def add_loss(self, name: str, value: Tensor, factor: float) -> None:
        """Adds an auxiliary loss (a scalar) to those of this forward; only training asks for them."""
        self.losses.append((name, value, factor))

    def add_target(self, name: str, share: Tensor, target: float, factor: float) -> None:
        """Adds the loss (mean share - target)², the mean over all layers that name this target; as `add_loss` else."""
        self.targets.append((name, share, target, factor))

    def hand(self, **values: Tensor) -> None:
        """Hands on to later layers what one asks for, in training a copy: of a view FSDP2 would lose the hook."""
        wanted = {what: value for what, value in values.items() if (what, self.layer) in self.wanted}
        self.given |= {what: one.clone() if one.requires_grad else one for what, one in wanted.items()}

    def hide_padding(self, x: Tensor) -> Tensor:
        """`x` [B, T, ...] with zeros where there is no token, so that a recurrence starts from nothing."""
        return x if self.padding is None else x * self.padding[..., None].to(x.dtype)

    def hide_unwritten(self, x: Tensor) -> Tensor:
        """`x` [B, T, ...] with zeros at the tokens that are not to be remembered."""
        if self.written is None:
            return x
        return x * self.written.reshape(*self.written.shape, *[1] * (x.dim() - 2)).to(x.dtype)

    def state(self, name: str) -> Tensor | None:
        """A recurrent state after the earlier tokens, or None at the start."""
        held = self.cache.own if isinstance(self.cache, CompositeLayer) else self.cache
        return held.states.get(name) if isinstance(held, RecurrentLayer) else None

    def keep(self, **states: Tensor) -> None:
        """Remembers recurrent states for the next call, if there will be one."""
        held = self.cache.own if isinstance(self.cache, CompositeLayer) else self.cache
        if isinstance(held, RecurrentLayer):
            held.keep(states)

    def rotary_tables(self, size: int, theta: float, scaling: Scaling | None = None) -> Tables:
        """Cosines and sines at this call's positions."""
        key = (size, theta, scaling)
        return self.once(("rotary", *key), lambda: rotary_tables(self.positions, *key))

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` gives, made once in a forward for all layers that ask for `key`.

        A compiler joins equal computations by itself, and lets a layer that will be run again write nothing outside of it.
        """
        made = cast(T, self.memo[key]) if key in self.memo else make()
        if not torch.compiler.is_compiling():
            self.memo[key] = made
        return made


def cache_bytes(layers: Iterable[StateLayer]) -> int:
    """Bytes that `layers` hold."""
    return sum(held.numel() * held.element_size() for layer in layers for held in layer.tensors().values())
