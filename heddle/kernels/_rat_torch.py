"""rat_scan and rat_attention in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from heddle.kernels.common.chunks import attend_in_blocks, gated_scan, gates
from heddle.kernels.op import wide_dtype


def turn(x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
    """Pairs (j, j + R/2) of the first R channels, turned.  Shapes:  x: [B, T, H, d];  rotation: two of [1 or B, T, 1, R]"""
    if rotation is None:
        return x
    cos, sin = rotation
    first, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    low, high = first.chunk(2, dim=-1)
    return torch.cat((first * cos + torch.cat((-high, low), dim=-1) * sin, rest), dim=-1)


def places_of(
    tokens: int, start: int, cu_seqlens: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Of each token its place in its sequence, and where that begins.  Shapes:  out: two of [T] int64"""
    token = torch.arange(tokens, device=device)
    if cu_seqlens is None:
        return token + start, torch.zeros_like(token)
    bounds = cu_seqlens.long()
    begin = bounds[torch.searchsorted(bounds[1:], token, right=True)]
    return token - begin, begin


def scan(
    q: Tensor,
    k: Tensor,
    x: Tensor,
    gate: Tensor,
    gate_bias: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    past: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk: int,
    start: int,
) -> tuple[Tensor, ...]:
    """What `rat_scan` gives; arguments as those of the registered op."""
    wide, (B, T, H, _) = wide_dtype(x.dtype), x.shape
    place, _ = places_of(T, start, cu_seqlens, x.device)
    # Head h reads group h mod G.
    pair = torch.stack((x.to(wide), k.to(wide).repeat(1, 1, H // k.shape[2], 1)), dim=2).flatten(3)
    g, rest = gates((gate.to(wide) + gate_bias.to(wide)).flatten(2)[:, :, None])
    before = None if past is None or start % chunk == 0 else past.flatten(2).to(wide)
    states = gated_scan(rest * pair, g, (place % chunk == 0)[None], before, min(chunk, T))
    rows = place // chunk - start // chunk
    rotation = None if cos is None or sin is None else (cos[rows][None, :, None], sin[rows][None, :, None])
    value, key = states.view(B, T, 2, H, -1).unbind(2)
    value, key = value.to(x.dtype), turn(key, rotation).to(x.dtype)
    turned = q.clone() if rotation is None else turn(q.to(wide), rotation).to(q.dtype)
    if cu_seqlens is None:
        ends = slice((-1 - start) % chunk, None, chunk)
        keys, values = (side[:, ends].transpose(1, 2).contiguous() for side in (key, value))
        running = states[:, -1].view(B, 2, H, -1).clone()
    else:
        keys, values = (_packed_summaries(side, place, chunk) for side in (key, value))
        running = _last_states(states.view(T, 2, H, -1), cu_seqlens.long())
    return turned, key, value, keys, values, running


def _packed_summaries(x: Tensor, place: Tensor, chunk: int) -> Tensor:
    """The rows with which chunks end, that of token t in row t // chunk; zeros between sequences.

    Shapes:  x: [1, T, H, d];  out: [1, H, rows, d]
    """
    rows = -(-x.shape[1] // chunk)
    token = torch.arange(x.shape[1], device=x.device)
    # One row more, for all tokens that end no chunk.
    index = torch.where(place % chunk == chunk - 1, token // chunk, rows)
    room = x.new_zeros(1, rows + 1, *x.shape[2:])
    return room.index_copy(1, index, x)[:, :rows].transpose(1, 2).contiguous()


def _last_states(states: Tensor, bounds: Tensor) -> Tensor:
    """Shapes:  states: [T, 2, H, d];  bounds: [N + 1];  out: [N, 2, H, d], zeros for an empty sequence"""
    there = bounds.diff() > 0
    return states[(bounds[1:] - 1).clamp(min=0)] * there[:, None, None, None].to(states.dtype)


def attend(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk: int,
    start: int,
) -> Tensor:
    """What `rat_attention` gives; arguments as those of the registered op."""
    T, H = key.shape[1:3]
    query, own_key, own_value = (
        side.transpose(1, 2) for side in (q.repeat(1, 1, H // q.shape[2], 1), key, value)
    )
    rows = None
    if cu_seqlens is None:
        seen = (start + T - 1) // chunk
        keys, values = keys[:, :, :seen], values[:, :, :seen]
    if T > 1 or cu_seqlens is not None:
        place, begin = places_of(T, start, cu_seqlens, q.device)
        low = (begin + chunk - 1) // chunk
        rows = (low[None], (low + place // chunk)[None])
    own = (own_key, own_value)
    o = attend_in_blocks(query, (keys, values), own, rows, start=start, chunk=chunk, scale=scale)
    return o.transpose(1, 2)
