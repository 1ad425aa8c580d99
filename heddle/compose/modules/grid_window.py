"""Windows along each axis of an image or a video, clipped at its edges or slid inward there."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from heddle.compose.cache import Call


def grid_keys(call: Call, tokens: int, grid: Mapping[str, int | None], *, inward: bool) -> Tensor:
    """The keys that each token sees: those in its window on every axis.        (arXiv 2511.14712)

        |j_a - i_a| < window_a;   inward the 2 window_a - 1 places from clamp(i_a - window_a + 1, 0, n_a - 2 window_a + 1) on

    Places are counted from each row's first real token: i = (p // width, p % width), with a `height` (p // (height width), p //
    width % height, p % width). The first axis is as long as the real tokens make it.

    Shapes:  out: [1 or B, T, keys] int64, places in the whole row, -1 for none
    """
    places = torch.arange(tokens, device=call.positions.device)[None]
    if call.key_padding is None:
        shift, count = torch.zeros_like(places[:, :1]), torch.full_like(places[:, :1], tokens)
    else:
        real = (call.key_padding > 0).long()
        shift, count = real.argmax(dim=-1, keepdim=True), real.sum(dim=-1, keepdim=True)
    place = torch.minimum((places - shift).clamp(min=0), (count - 1).clamp(min=0))
    index = torch.zeros_like(place)[..., None]
    is_seen = torch.ones_like(index, dtype=torch.bool)
    for step, size, window in _axes(grid):
        # The longest that the axis may be, and how long it is in each row.
        most, extent = (-(-tokens // step), -(-count // step)) if size is None else (size, size)
        here = place // step if size is None else place // step % size
        reach = most if window is None else window - 1
        listed = min(2 * reach + 1, most)
        last = extent - listed if isinstance(extent, int) else (extent - listed).clamp(min=0)
        first = torch.minimum((here - reach).clamp(min=0), torch.as_tensor(last, device=place.device))
        key = first[..., None] + torch.arange(listed, device=place.device)
        inside = key < (extent if isinstance(extent, int) else extent[..., None])
        if window is not None and not inward:
            inside = inside & ((key - here[..., None]).abs() <= reach)
        index = (index[..., None] + step * key[..., None, :]).flatten(2)
        is_seen = (is_seen[..., None] & inside[..., None, :]).flatten(2)
    is_seen = is_seen & (index < count[..., None])
    return torch.where(is_seen, index + shift[..., None], -1)


def _axes(grid: Mapping[str, int | None]) -> list[tuple[int, int | None, int | None]]:
    """Of each axis the tokens from one place to the next, its size (None: as the tokens make it) and its window (None: all)."""
    width, height = grid["width"], grid["height"]
    assert width is not None
    columns = (1, width, grid["column_window"])
    rows = (width, height, grid["row_window"])
    return (
        [rows, columns] if height is None else [(width * height, None, grid["frame_window"]), rows, columns]
    )
