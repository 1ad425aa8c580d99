"""Chunks of tokens where padding moves them: each row counts from its first token that is none."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from heddle.compose.cache import Call
from heddle.kernels.common.chunks import attend_in_blocks, gated_scan, gates


@dataclass(frozen=True, slots=True)
class Chunks:
    """Where the tokens of a call with padding stand in chunks of `length` tokens.

    Shapes:  index: [B, T] int64, the number of each token's chunk;  begins, ends: [B, T] bool, true where a chunk does
             real: [B, T] bool, false at padding
    """

    length: int
    # Tokens before this call, padding included.
    start: int
    index: Tensor
    begins: Tensor
    ends: Tensor
    real: Tensor

    @classmethod
    def of(cls, call: Call, length: int) -> Chunks:
        start = 0 if call.cache is None else call.cache.get_seq_length()
        return call.once(("chunks", length, start), lambda: cls._of(call, length, start))

    @classmethod
    def _of(cls, call: Call, length: int, start: int) -> Chunks:
        tokens, padding = call.positions.shape[1], call.key_padding
        assert padding is not None
        real = padding[:, -tokens:] > 0
        place = ((padding > 0).long().cumsum(-1)[:, -tokens:] - 1).clamp(min=0)
        begins, ends = place % length == 0, place % length == length - 1
        return cls(length, start, place // length, begins & real, ends & real, real)

    def scan(self, x: Tensor, raw: Tensor, past: Tensor | None) -> Tensor:
        """y_t = g_t * y_{t-1} + (1 - g_t) * x_t, g = sigmoid(raw), from 0 where a chunk begins; padding leaves y as it is.

        Shapes:  x, out: [B, T, N, C];  raw: [B, T, 1, C], both at least float32;  past: [B, N, C], y before this call
        """
        (gate, rest), hidden = gates(raw), ~self.real[..., None, None]
        written = (rest * x).masked_fill(hidden, 0.0)
        return gated_scan(written, gate.masked_fill(hidden, 1.0), self.begins, past, x.shape[1])

    def summaries(self, rows: Tensor, past: Tensor | None) -> Tensor:
        """What chunks came to: the rows of earlier calls, then those with which a chunk ends.

        A sequence may have fewer chunks than there is place for; what stands in the rest is behind every `index`.

        Shapes:  rows: [B, H, T, d];  past, out: [B, H, chunks, d]
        """
        tokens, held = rows.shape[2], self.start // self.length
        total = (self.start + tokens) // self.length
        before = rows[:, :, :0] if past is None else past[:, :, :held]
        # One place more, for all rows that end no chunk.
        places = F.pad(before, (0, 0, 0, total + 1 - held))
        index = torch.where(self.ends, self.index, total)[:, None, :, None].expand_as(rows)
        return places.scatter(2, index, rows)[:, :, :total]

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, own: tuple[Tensor, Tensor]) -> Tensor:
        """Softmax attention of each token over the summaries before its chunk and the row of its own.

        Shapes:  q, out: [B, H, T, d];  keys, values: [B, H, chunks, d];  own: two of [B, H, T, d]
        """
        rows = (torch.zeros_like(self.index), self.index)
        return attend_in_blocks(q, (keys, values), own, rows, start=self.start, chunk=self.length)
