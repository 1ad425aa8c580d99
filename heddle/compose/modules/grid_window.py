"""Windows along each axis of an image or a video, clipped at its edges or slid inward there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from heddle.compose.cache import Call
from heddle.kernels.grid_window_attention import grid_window_attention, real_run, window_keys


def grid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
    *,
    grid: Mapping[str, Any],
    boundary: Any,
    scale: float | None,
) -> Tensor:
    """Softmax attention of each token over those in its window on every axis; padding gets 0.

    Shapes:  q, out: [B, H, T, d];  k, v: [B, KV heads, T, d]
    """
    real = None if call.key_padding is None else call.key_padding > 0
    return grid_window_attention(q, k, v, **grid, boundary=boundary, real=real, scale=scale)


def grid_keys(call: Call, tokens: int, grid: Mapping[str, int | None], *, inward: bool) -> Tensor:
    """The keys that each token sees: those in its window on every axis, of padding itself.        (arXiv 2511.14712)

        |j_a - i_a| < window_a;   inward the 2 window_a - 1 places from clamp(i_a - window_a + 1, 0, n_a - 2 window_a + 1) on

    Places are counted from each row's first real token: i = (p // width, p % width), with a `height` (p // (height width), p //
    width % height, p % width). The first axis is as long as the real tokens make it.

    Shapes:  out: [1 or B, T, keys] int64, places in the whole row, -1 for none
    """
    places = torch.arange(tokens, device=call.positions.device)[None]
    padding = torch.ones_like(places) if call.key_padding is None else call.key_padding
    begin, count = real_run(padding)
    sizes = (grid["height"], grid["width"], grid["frame_window"], grid["row_window"], grid["column_window"])
    height, width, frames, rows, columns = (one or 0 for one in sizes)
    index = window_keys(
        tokens, (height, width, frames, rows, columns), slides=inward, begin=begin, count=count
    )
    sees_none = (index < 0).all(-1, keepdim=True)
    return torch.where(sees_none, places[..., None], index)
