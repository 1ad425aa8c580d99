"""A recurrence that begins again in every chunk of tokens, and attention over what the chunks came to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from heddle.compose.cache import Call
from heddle.compose.modules.precision import wide
from heddle.compose.modules.softmax import softmax_attention

# Queries of one attention over summaries.
QUERIES = 4096


@dataclass(frozen=True, slots=True)
class Chunks:
    """Where the tokens of a call stand in chunks of `length` tokens, counted from each sequence's first that is no padding.

    Shapes:  index: [1 or B, T] int64, the number of each token's chunk;  begins, ends: [1 or B, T] bool, true where a chunk
             does;  real: [B, T] bool, false at padding, or None for all true
    """

    length: int
    # Tokens before this call, padding included.
    start: int
    index: Tensor
    begins: Tensor
    ends: Tensor
    real: Tensor | None

    @classmethod
    def of(cls, call: Call, length: int) -> Chunks:
        start = 0 if call.cache is None else call.cache.get_seq_length()
        return call.once(("chunks", length, start), lambda: cls._of(call, length, start))

    @classmethod
    def _of(cls, call: Call, length: int, start: int) -> Chunks:
        tokens, padding = call.positions.shape[1], call.key_padding
        if padding is None:
            place, real = torch.arange(start, start + tokens, device=call.positions.device)[None], None
        else:
            real = padding[:, -tokens:] > 0
            place = ((padding > 0).long().cumsum(-1)[:, -tokens:] - 1).clamp(min=0)
        begins, ends = place % length == 0, place % length == length - 1
        if real is not None:
            begins, ends = begins & real, ends & real
        return cls(length, start, place // length, begins, ends, real)

    def scan(self, x: Tensor, gate: Tensor, past: Tensor | None) -> Tensor:
        """y_t = g_t * y_{t-1} + (1 - g_t) * x_t, from 0 where a chunk begins; padding leaves y as it is.

        Doubling: after step s, y_t holds the terms of the last 2^s tokens and a_t is the product of their gates. Nothing is
        divided, so a product that underflows only drops what has no weight.

        Shapes:  x, out: [B, T, N, C];  gate: [B, T, 1, C], both at least float32;  past: [B, N, C], y before this call
        """
        reach = min(self.length, x.shape[1])
        if self.real is not None:
            gate, reach = gate.masked_fill(~self.real[..., None, None], 1.0), x.shape[1]
        y, a = (1 - gate) * x, gate.masked_fill(self.begins[..., None, None], 0.0)
        if past is not None:
            y = torch.cat((y[:, :1] + a[:, :1] * past[:, None], y[:, 1:]), dim=1)
        step = 1
        while step < reach:
            y = torch.cat((y[:, :step], torch.addcmul(y[:, step:], a[:, step:], y[:, :-step])), dim=1)
            a = torch.cat((a[:, :step], a[:, step:] * a[:, :-step]), dim=1)
            step *= 2
        return y

    def summaries(self, rows: Tensor, past: Tensor | None) -> Tensor:
        """What chunks came to: the rows of earlier calls, then those with which a chunk ends.

        With padding a sequence has fewer chunks than there is place for; what stands in the rest is behind every `index`.

        Shapes:  rows: [B, H, T, d];  past, out: [B, H, chunks, d]
        """
        tokens, held = rows.shape[2], self.start // self.length
        total = (self.start + tokens) // self.length
        before = rows[:, :, :0] if past is None else past[:, :, :held]
        if self.real is None:
            if total == held:
                return before
            return torch.cat((before, rows[:, :, (-1 - self.start) % self.length :: self.length]), dim=2)
        # One place more, for all rows that end no chunk.
        places = F.pad(before, (0, 0, 0, total + 1 - held))
        index = torch.where(self.ends, self.index, total)[:, None, :, None].expand_as(rows)
        return places.scatter(2, index, rows)[:, :, :total]

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, own: tuple[Tensor, Tensor]) -> Tensor:
        """Softmax attention of each token over the summaries before its chunk and the row of its own.

        In blocks of queries, each over those summaries alone that its last one sees: half of the work, and small masks.

        Shapes:  q, out: [B, H, T, d];  keys, values: [B, H, chunks, d];  own: two of [B, H, T, d]
        """
        tokens, blocks = q.shape[2], []
        for first in range(0, tokens, QUERIES):
            last = min(first + QUERIES, tokens)
            before = (self.start + last - 1) // self.length
            index = self.index[:, None, first:last, None]
            # One token without padding sees all of them.
            is_full = tokens == 1 and self.real is None
            seen = None if is_full else torch.arange(before, device=q.device) < index
            mine = (own[0][:, :, first:last], own[1][:, :, first:last])
            block = attend_with_own(
                q[:, :, first:last], keys[:, :, :before], values[:, :, :before], mine, seen
            )
            blocks.append(block)
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2)


def attend_with_own(
    q: Tensor, k: Tensor, v: Tensor, own: tuple[Tensor, Tensor], seen: Tensor | None
) -> Tensor:
    """Softmax attention of each query over shared keys and one key of its own.

        o_t = (sum_j e^l_tj v_j + e^s_t v'_t) / (sum_j e^l_tj + e^s_t),   l_tj = q_t · k_j / sqrt(d),   s_t = q_t · k'_t / sqrt(d)

    Many queries take one fused attention of slightly wider heads: one key more, (0, 1), meets the query (q_t, q_t · k'_t) with
    the logit s_t, and one value more, (0, 1), hands out its weight w_t, so that o_t = (sum_j p_tj v_j) + w_t v'_t. Narrow
    types carry q_t · k'_t in two numbers, the rounded one and what was rounded off.

    Shapes:  q, out: [B, H, T, d];  k, v: [B, H, S, d];  own: two of [B, H, T, d];  seen: [1 or B, 1, T, S] bool, None for all
    """
    own_key, own_value = own
    if k.shape[2] == 0:
        return own_value
    # The own key is always seen.
    mask = None if seen is None else F.pad(seen, (0, 1), value=True)
    if q.shape[2] == 1:
        k, v = torch.cat((k, own_key), dim=2), torch.cat((v, own_value), dim=2)
        return softmax_attention(q, k, v, mask)
    size, dot = q.shape[-1], (wide(q) * wide(own_key)).sum(-1, keepdim=True)
    parts = [dot.to(q.dtype)]
    if dot.dtype != q.dtype:
        parts.append((dot - parts[0]).to(q.dtype))
    # Fused kernels want a multiple of 8 numbers in narrow types.
    width = size + 1 if len(parts) == 1 else (size + len(parts) + 7) // 8 * 8
    extra = torch.zeros(width, device=q.device, dtype=q.dtype)
    key, value = extra.clone(), extra.clone()
    key[size : size + len(parts)] = 1.0
    value[size] = 1.0
    q = F.pad(torch.cat((q, *parts), dim=-1), (0, width - size - len(parts)))
    k, v = (
        torch.cat((F.pad(side, (0, width - size)), row.expand(*side.shape[:2], 1, width)), dim=2)
        for side, row in ((k, key), (v, value))
    )
    o = softmax_attention(q, k, v, mask, scale=size**-0.5)
    return o[..., :size] + o[..., size : size + 1] * own_value
