"""Which keys a query may see."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from heddle.compose.cache import Call


@dataclass(frozen=True, slots=True)
class View:
    """What queries see by their place alone: `window` tokens, the own one among them (None: all), on one side or on both."""

    window: int | None = None
    causal: bool = True

    def of(self, distance: Tensor) -> Tensor:
        """Shapes:  distance: [Q, K], the query's place less the key's;  out: [Q, K] bool"""
        seen = distance >= 0 if self.causal else torch.ones_like(distance, dtype=torch.bool)
        if self.window is not None:
            seen = seen & (distance < self.window)
            seen = seen if self.causal else seen & (distance > -self.window)
        return seen


def key_mask(distance: Tensor, view: View, *limits: Tensor | None, written: Tensor | None = None) -> Tensor:
    """The keys in view that every one of `limits` lets through, and the query's own, whatever they say.

    A row that sees nothing would have no softmax. What is not `written` is hidden from other queries; its gradient is that
    of a bias of the logits: 0 where written, with slope 1.

    Shapes:  distance: [Q, K];  limits: [..., 1 or Q, K] bool;  written: [..., 1, K] of 0 and 1;
             out: [..., Q, K], bool, or a float bias in the type of `written` if that wants a gradient
    """
    own, seen = distance == 0, view.of(distance)
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
    window = view.window
    sees_all = queries == 1 or queries == keys
    if call.key_padding is None and sees_all and (window is None or keys <= window):
        return None
    return call.once(("mask", queries, keys, view), lambda: _mask(call, queries, keys, view))


def _mask(call: Call, queries: int, keys: int, view: View) -> Tensor:
    distance = distances(queries, keys, call.positions.device)
    mask = key_mask(distance, view, real_keys(call, keys))
    return mask[None, None] if mask.dim() == 2 else mask


def real_keys(call: Call, keys: int) -> Tensor | None:
    """Which of the last `keys` tokens are no padding, or None if all.  Shapes:  out: [B, 1, 1, keys] bool"""
    return None if call.key_padding is None else call.key_padding[:, None, None, -keys:]
