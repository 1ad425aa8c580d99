"""The means of keys by which a layer chooses blocks, kept between calls."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from heddle.compose.cache import StateLayer
from heddle.compose.modules.selection import Means, Parts, Places, means_of


class MeansLayer(StateLayer):
    """Means of the parts of keys that are complete, so that a step need not read the keys again.

    They are those that a pass over all tokens makes, and are written when a part's last key comes. Rows with padding complete a
    part later than it has room here; until then nothing can be told of it. `repeats`: a step that repeats writes in place.

    Shapes:  means: [B, KV heads, complete parts, d];  held: [B, 1, complete parts, 1] bool, which of them have a key that counts,
             there from the first call on that says which tokens are written
    """

    is_croppable = True

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.parts, self.repeats = parts, False
        self.keys: Tensor | None = None
        self.held: Tensor | None = None

    @classmethod
    def filled(cls, parts: Parts, keys: Tensor, context: int) -> MeansLayer:
        """All means of `context` tokens and one more are there, whose step repeats."""
        made = cls(parts)
        made.keys, made.tokens, made.repeats, made.is_initialized = keys, context, True, True
        return made

    def means(self) -> Means:
        """All of them."""
        assert self.keys is not None
        return Means(self.keys, None if self.held is None else self.held[:, 0, :, 0])

    def extend(self, k: Tensor, places: Places, *, weights: Tensor | None, new: int) -> None:
        """Adds the parts that the last `new` of all keys complete; arguments as those of `means_of`."""
        found, first = means_of(k, places, self.parts, weights=weights, new=new)
        most, held = self.parts.complete(places.keys), self.held
        past = found.keys[:, :, :0] if self.keys is None else self.keys
        if found.held is not None and held is None and self.parts.width > 1:
            # Earlier calls said nothing of it: all were written.
            held = torch.ones(k.shape[0], 1, past.shape[2], 1, dtype=torch.bool, device=k.device)
        if held is not None and found.held is not None:
            marks = found.held.expand(k.shape[0], -1)[:, None, :, None]
            self.held = self._joined(held, marks, first, most)
        self.keys = self._joined(past, found.keys, first, most)
        self.is_initialized = True

    def _joined(self, past: Tensor, new: Tensor, first: int | Tensor, most: int) -> Tensor:
        """What is held after `new` came to stand from the part `first` on, `most` in all."""
        if new.shape[2] == 0:
            return past
        if isinstance(first, Tensor):
            index = first[:, None] + torch.arange(new.shape[2], device=new.device)
            index = index[:, None, :, None].expand(new.shape[0], new.shape[1], -1, new.shape[3])
            room = F.pad(past, (0, 0, 0, most - past.shape[2]))
            return past.copy_(room.scatter(2, index, new)) if self.repeats else room.scatter(2, index, new)
        if self.repeats:
            past[:, :, first:] = new
            return past
        return torch.cat((past[:, :, :first], new), dim=2)

    def advance(self, tokens: int) -> None:
        if not self.repeats:
            super().advance(tokens)

    def tensors(self) -> dict[str, Tensor]:
        if self.keys is None:
            return {}
        marks = {} if self.held is None else {"held": self.held}
        return {"means": self.keys, **marks}

    def replace(self, tensors: dict[str, Tensor]) -> None:
        self.keys, self.held = tensors.get("means"), tensors.get("held")
        self.is_initialized = self.keys is not None

    def crop(self, tokens_to_remove: int) -> None:
        removed = abs(tokens_to_remove)
        if removed in (0, self.tokens):
            super().crop(tokens_to_remove)
            return
        left = self.parts.complete(self.tokens - removed)
        self.replace({name: held[:, :, :left] for name, held in self.tensors().items()})
        self.tokens -= removed
