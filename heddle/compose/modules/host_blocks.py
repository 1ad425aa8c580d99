"""Landmark attention of few queries over blocks that wait in host memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from heddle.compose.host_cache import HostKVLayer
from heddle.compose.modules.precision import wide
from heddle.compose.modules.selection import Places
from heddle.kernels.landmark_attention import landmark_attention


def attend_fetched(
    q: Tensor,
    held: HostKVLayer,
    landmarks: Tensor,
    places: Places,
    *,
    written: Tensor | None,
    top: int | None,
) -> Tensor:
    """`landmark_attention` over the blocks that any query of a key head chooses, and all from the first query's own block on.

    It chooses among them as it would among all. Each key head is a row of its own, with the blocks it needs at its end, and
    before them such as nobody sees. The host waits once, for the choice.

    Shapes:  q, out: [B, H, T, d], the last T of all tokens;  landmarks: [B, KV heads, C, d];  written: [B, S] of 0 and 1, or None
    """
    (B, N, count), block = landmarks.shape[:3], places.block
    seen = torch.ones(1, places.keys, dtype=torch.bool, device=q.device)
    for marks in (places.real, None if written is None else written > 0.5):
        seen = seen if marks is None else seen & marks
    seen = places.aligned_marks(seen).expand(B, -1)
    first = places.first(B, q.shape[2])
    needed = _needed(q, landmarks, seen, first, (block, top)).cpu()
    own, shift = (first.clamp(min=0) // block).cpu(), places.shift()
    begin = torch.zeros(B, 1, dtype=torch.int64) if shift is None else shift.cpu()
    rest = places.keys - int((own * block + begin[:, 0]).min())
    blocks, place, is_read = _laid_out(needed, own, block, rest)
    is_read = is_read.to(q.device) & seen.gather(
        1, place.clamp(max=places.keys - 1).flatten(1).to(q.device)
    ).view(place.shape)
    k, v = held.at((place + begin[..., None]).clamp(max=places.keys - 1))
    index = blocks.clamp(max=count - 1).to(q.device)[..., None].expand(-1, -1, -1, landmarks.shape[3])
    chosen = place.shape[2] - rest
    return landmark_attention(
        q.reshape(B * N, -1, *q.shape[2:]),
        k.flatten(0, 1)[:, None],
        v.flatten(0, 1)[:, None],
        landmarks.gather(2, index).flatten(0, 1)[:, None],
        block=block,
        start=(chosen + first - (own * block).to(q.device)).repeat_interleave(N),
        top=top,
        real=is_read.flatten(0, 1),
    ).view(*q.shape[:3], v.shape[-1])


def _laid_out(needed: Tensor, own: Tensor, block: int, rest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks that are needed, in their order and as many in all rows, then `rest` places from the own one on.

    Shapes:  needed: [B, KV heads, C] bool;  own: [B];  out: blocks [B, KV heads, those and the rest's], their places
             [B, KV heads, M], and whether a place is that of a block which is needed
    """
    heads, most = needed.shape[:2], int(needed.sum(-1).max())
    chosen = needed.to(torch.int8).argsort(dim=-1, stable=True)[..., needed.shape[2] - most :]
    place = (chosen[..., None] * block + torch.arange(block)).flatten(2)
    behind = (own[:, None, None] * block + torch.arange(rest)).expand(*heads, -1)
    blocks = (own[:, None, None] + torch.arange(-(-rest // block))).expand(*heads, -1)
    is_read = needed.gather(-1, chosen).repeat_interleave(block, dim=-1)
    is_read = torch.cat((is_read, is_read.new_ones(*heads, rest)), dim=2)
    return torch.cat((chosen, blocks), dim=2), torch.cat((place, behind), dim=2), is_read


def _needed(q: Tensor, landmarks: Tensor, seen: Tensor, first: Tensor, how: tuple[int, int | None]) -> Tensor:
    """The blocks before the first query's own one that any query of a key head chooses.

    Shapes:  seen: [B, S] bool, by places;  first: [B];  out: [B, KV heads, C] bool
    """
    (block, top), count = how, landmarks.shape[2]
    own = (first[:, None] + torch.arange(q.shape[2], device=q.device)) // block
    held = F.pad(seen, (0, count * block - seen.shape[1])).view(len(seen), count, block).any(-1)
    index = torch.arange(count, device=q.device)
    earlier = held[:, None, None, None] & (index < own[:, None, None, :, None])
    queries = wide(q).unflatten(1, (landmarks.shape[1], -1))  # type: ignore[no-untyped-call]
    logits = (queries @ wide(landmarks)[:, :, None].mT) * q.shape[-1] ** -0.5
    logits = logits.masked_fill(~earlier, -torch.inf)
    if top is not None and top < count:
        best = logits.sort(dim=-1, descending=True, stable=True).indices[..., :top]
        logits = logits.masked_fill(
            ~torch.zeros_like(logits, dtype=torch.bool).scatter(-1, best, True), -torch.inf
        )
    found: Tensor = (logits > -torch.inf).any(dim=3).any(dim=2) & (index < first[:, None, None] // block)
    return found
