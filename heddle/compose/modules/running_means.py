"""Queries against running means of keys, without a mean for each token in memory."""

from __future__ import annotations

import torch
from torch import Tensor

# Tokens of a chunk, whose products of queries and keys stand in memory at once.
CHUNK = 64


def affinities(q: Tensor, k: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
    """Each query against exponential means of the keys so far, its own among them, and the means after the last.

        a_ts = q_t · c_ts,   c_ts = g_s c_(t-1)s + (1 - g_s) k_t,   g_s = 1 - 2^-s
             = g_s^t q_t · c_0s + (1 - g_s) sum_{j <= t} g_s^(t-j) q_t · k_j        in each chunk

    Shapes:  q, k: [B, T, H, d];  means: [B, H, S, d];  out: [B, T, H, S], and as means;  all wide
    """
    found = []
    steps = torch.arange(1, means.shape[2] + 1, device=q.device, dtype=q.dtype)[:, None]
    for queries, keys in zip(*(torch.split(x, CHUNK, dim=1) for x in (q, k)), strict=True):
        size = keys.shape[1]
        place = torch.arange(size, device=q.device)
        distance = place[:, None] - place
        fading = (1.0 - torch.exp2(-steps)) ** torch.arange(size + 1, device=q.device)
        share = torch.exp2(-steps) * fading
        inside = share[:, distance.clamp(min=0)] * (distance >= 0)
        products = torch.einsum("bihd,bjhd->bhij", queries, keys)
        before = torch.einsum("bihd,bhsd->bihs", queries, means) * fading[:, 1:].mT[:, None]
        found.append(before + torch.einsum("bhij,sij->bihs", products, inside))
        taken = torch.einsum("bjhd,sj->bhsd", keys, share[:, :size].flip(-1))
        means = fading[:, -1:] * means + taken
    return torch.cat(found, dim=1), means
