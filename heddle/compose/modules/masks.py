"""Which keys a query may see."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from heddle.compose.cache import Call


@dataclass(frozen=True, slots=True)
class View:
    """What queries see by their place alone: `window` tokens, the own one among them (None: all), on one side or on both.

    With `sinks` each sees so many first tokens of its row, too (arXiv 2309.17453): those from the first on that is no padding.
    """

    window: int | None = None
    causal: bool = True
    sinks: int = 0

    def sees_all(self, keys: int) -> bool:
        """Whether the last of so many keys sees all those before."""
        return self.window is None or keys <= self.window + self.sinks

    def of(self, distance: Tensor) -> Tensor:
        """Shapes:  distance: [Q, K], the query's place less the key's;  out: [Q, K] bool"""
        seen = distance >= 0 if self.causal else torch.ones_like(distance, dtype=torch.bool)
        if self.window is not None:
            seen = seen & (distance < self.window)
            seen = seen if self.causal else seen & (distance > -self.window)
        return seen


def key_mask(
    distance: Tensor,
    view: View,
    *limits: Tensor | None,
    sinks: Tensor | None = None,
    written: Tensor | None = None,
) -> Tensor:
    """The keys in view and the `sinks` that every one of `limits` lets through, and the query's own, whatever they say.

    Sinks are seen by the queries behind them. A row that sees nothing would have no softmax. What is not `written` is hidden
    from other queries; its gradient is that of a bias of the logits: 0 where written, with slope 1.

    Shapes:  distance: [..., Q, K];  limits: [..., 1 or Q, K] bool;  sinks: likewise;  written: [..., 1, K] of 0 and 1;
             out: [..., Q, K], bool, or a float bias in the type of `written` if that wants a gradient
    """
    own, seen = distance == 0, view.of(distance)
    if sinks is not None:
        seen = seen | (sinks & (distance > 0))
    for limit in limits:
        seen = seen if limit is None else seen & limit
    if written is None:
        return seen | own
    seen = (seen & (written > 0.5)) | own
    if not written.requires_grad:
        return seen
    # The own key is seen whether it is written or not, so no gradient comes from there.
    bias = (written - written.detach()) * ~own
    return bias.masked_fill(~seen, -torch.inf)


def distances(queries: int, keys: int, device: torch.device) -> Tensor:
    """How far the last `queries` tokens are behind each of the last `keys`.  Shapes:  out: [queries, keys]"""
    return torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)


def attention_mask(call: Call, queries: int, keys: int, view: View) -> Tensor | None:
    """Which of the last `keys` tokens each of the last `queries` may see; None if it is all, or all before it.

    Shapes:  out: [1 or B, 1, queries, keys] bool
    """
    is_whole = queries == 1 or queries == keys
    if call.key_padding is None and is_whole and view.sees_all(keys):
        return None
    return call.once(("mask", queries, keys, view), lambda: _mask(call, queries, keys, view))


def _mask(call: Call, queries: int, keys: int, view: View) -> Tensor:
    distance = distances(queries, keys, call.positions.device)
    mask = key_mask(
        distance, view, real_keys(call, keys, view.sinks), sinks=sink_keys(call, keys, view.sinks)
    )
    return mask[None, None] if mask.dim() == 2 else mask


def real_keys(call: Call, keys: int, sinks: int = 0) -> Tensor | None:
    """Which of the keys are no padding, or None if all. They are the last ones, or as `sink_columns` has them.

    Shapes:  out: [B, 1, 1, keys] bool
    """
    if call.key_padding is None:
        return None
    real = call.key_padding[:, -keys:]
    if sinks and keys < call.key_padding.shape[1]:
        place = first_places(call, sinks)
        # What is held a second time, or not there yet, counts once.
        kept = place < call.key_padding.shape[1] - keys + sinks
        first = call.key_padding.gather(1, place.clamp(max=call.key_padding.shape[1] - 1)) & kept
        real = torch.cat((first, real[:, sinks:]), dim=1)
    return real[:, None, None]


def sink_keys(call: Call, keys: int, sinks: int) -> Tensor | None:
    """Which of the keys are the first `sinks` tokens of their row, or None without any.

    Shapes:  out: [1 or B, 1, 1, keys] bool
    """
    if not sinks:
        return None
    columns = sink_columns(call, keys, sinks)
    marks = torch.zeros(columns.shape[0], keys + 1, dtype=torch.bool, device=columns.device)
    return marks.scatter(1, columns, True)[:, None, None, :keys]


def sink_columns(call: Call, keys: int, sinks: int) -> Tensor:
    """Where among the keys the first `sinks` tokens of each row are; `keys` for those that are not there yet.

    Keys are those of all tokens so far or, as a cache holds them beside a window, those of the first `sinks` tokens and of the
    last ones. While the first ones of a row are among the last, they are there twice, and it is the second that is told.

    Shapes:  out: [1 or B, sinks, or keys if they are fewer] int64
    """
    sinks = min(sinks, keys)
    if call.key_padding is None:
        return torch.arange(sinks, device=call.positions.device)[None]
    total, place = call.key_padding.shape[1], first_places(call, sinks)
    if keys < total:
        held = torch.arange(sinks, device=place.device)
        place = torch.where(place < total - keys + sinks, held, place - (total - keys))
    return place.clamp(max=keys)


def first_places(call: Call, sinks: int) -> Tensor:
    """The places of the first `sinks` tokens of each row, from the first on that is no padding.  Shapes:  out: [B, sinks]"""
    assert call.key_padding is not None
    # Of equal values argmax takes the first.
    first = call.key_padding.to(torch.uint8).argmax(dim=1, keepdim=True)
    return first + torch.arange(sinks, device=first.device)


def columns_of(x: Tensor, columns: Tensor) -> Tensor:
    """The rows of `x` at `columns`, the last one for those behind it.

    Shapes:  x: [B, H, S, d];  columns: [1 or B, n] int64;  out: [B, H, n, d]
    """
    index = columns.clamp(max=x.shape[2] - 1)[:, None, :, None]
    return x.gather(2, index.expand(*x.shape[:2], -1, x.shape[3]))
