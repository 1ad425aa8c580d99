"""The constant stream: a sequence that runs through the layers beside the text, the same for every text.

Layers with `qk_source: constant` make queries and keys of what it is at theirs (Deconstructing Attention, arXiv 2510.11602: from
random rows its RndEmbQK, from the embeddings of one text its FixedSeqQK). It is one sequence for all rows of a batch, and goes
as far as the longest of them. Each layer runs it just before the text, with a cache of its own; of the last that reads it only
the norm.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from heddle.compose.cache import Call, CompositeLayer, StateLayer

# What a layer's input of the stream is called in `Call.handed`, by that layer.
CONSTANT = "constant"
# With the last layer that reads it, among what is wanted of the stream: there is nothing behind it to run it for.
ENDS = "ends"


class RowsLayer(StateLayer):
    """What the constant stream was at a layer, token by token.

    Rows that it is made with are of a step that repeats: every step writes the last slot in place.

    Shapes:  rows: [1, tokens, D]
    """

    is_croppable = True

    def __init__(self, rows: Tensor | None = None) -> None:
        super().__init__()
        self.rows, self.repeats = rows, rows is not None
        self.tokens = 0 if rows is None else rows.shape[1] - 1
        self.is_initialized = self.repeats

    def append(self, new: Tensor) -> Tensor:
        """Adds the new rows, and gives all."""
        if self.repeats and self.rows is not None:
            self.rows[:, self.tokens :] = new
            return self.rows
        self.rows = new if self.rows is None else torch.cat((self.rows, new), dim=1)
        self.is_initialized = True
        return self.rows

    def advance(self, tokens: int) -> None:
        self.tokens += 0 if self.repeats else tokens

    def tensors(self) -> dict[str, Tensor]:
        return {} if self.rows is None else {"rows": self.rows}

    def replace(self, tensors: dict[str, Tensor]) -> None:
        self.rows = tensors.get("rows")
        self.repeats &= self.rows is not None
        self.is_initialized = self.rows is not None

    def crop(self, tokens_to_remove: int) -> None:
        removed = abs(tokens_to_remove)
        if self.rows is None or removed in (0, self.tokens):
            super().crop(tokens_to_remove)
            return
        self.replace({"rows": self.rows[:, :-removed]})
        self.tokens -= removed


class ConstantCache(CompositeLayer):
    """What the constant stream left in the layers: in the `mixers` that it runs through, and its `inputs` of those that read it.

    It is of no sequence of the batch, so choosing, ordering and repeating these leaves it as it is.
    """

    def __init__(self, mixers: Sequence[StateLayer], inputs: Mapping[int, RowsLayer]) -> None:
        parts: dict[str, StateLayer] = {f"mixers.{index}": one for index, one in enumerate(mixers)}
        super().__init__(parts | {f"inputs.{index}": one for index, one in inputs.items()})

    def batch_select_indices(self, indices: Tensor) -> None:
        """No row of the batch is its own."""

    def batch_repeat_interleave(self, repeats: int) -> None:
        """As `batch_select_indices`."""


class ConstantStream:
    """The constant stream in one forward: `x` is what it has come to, as many tokens as the text has.

    Shapes:  x: [1, T, D]
    """

    def __init__(self, x: Tensor, call: Call, readers: Iterable[int], cache: ConstantCache | None) -> None:
        self.x, self.call, self.cache, self.readers = x, call, cache, frozenset(readers)
        self.last = max(self.readers)
        # No union: dynamo of torch 2.11 takes none of frozen sets.
        wanted = [(CONSTANT, index) for index in self.readers]
        call.wanted = frozenset([*call.wanted, *wanted, (ENDS, self.last)])

    def cache_at(self, index: int) -> StateLayer | None:
        """What the mixer of a layer keeps of it."""
        return None if self.cache is None else self.cache.parts.get(f"mixers.{index}")

    def hand(self, index: int, text: Call) -> None:
        """Hands layer `index` of the text its own input of the stream, of all tokens so far."""
        if index not in self.readers:
            return
        rows: Tensor = self.call.handed[CONSTANT, index]
        held = None if self.cache is None else self.cache.parts[f"inputs.{index}"]
        text.handed[CONSTANT, index] = held.append(rows) if isinstance(held, RowsLayer) else rows


def is_stream(call: Call) -> bool:
    """Whether a call is of the constant stream, and not of a text."""
    return any(what == ENDS for what, _ in call.wanted)


def constant_rows(call: Call, size: int) -> Tensor:
    """What the constant stream is at a call's positions in a layer that reads it; in its own call its input of the layer.

    Shapes:  out: [B, T, size]
    """
    own: Tensor | None = call.given.get(CONSTANT)
    if own is not None:
        return own
    positions = call.positions
    # Without padding all sequences have the same positions, and these are one row in memory.
    given = positions[:1] if positions.stride(0) == 0 else positions
    rows = F.embedding(given, call.handed[CONSTANT, call.layer][0])
    return rows.expand(positions.shape[0], -1, size)


def readers_of(layers: Sequence[Mapping[str, Any]]) -> frozenset[int]:
    """The layers that read the constant stream, of the plain data of a configuration."""
    return frozenset(index for index, layer in enumerate(layers) if _reads(layer["mixer"]))


def _reads(mixer: Mapping[str, Any]) -> bool:
    parts = [*mixer.get("mixers", ()), mixer.get("mixer")]
    return mixer.get("qk_source") == CONSTANT or any(_reads(one) for one in parts if isinstance(one, Mapping))
