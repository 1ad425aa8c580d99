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

    Shapes:  means: [B, KV heads, complete parts, d];  held: [B, 1, complete parts, 1] bool, which of them have a key that counts:
             of kernels, from the first call on that says which tokens are real or written
    """

    is_croppable = True

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.form, self.repeats = parts, False
        self.rows: Tensor | None = None
        self.held: Tensor | None = None

    @classmethod
    def filled(cls, parts: Parts, keys: Tensor, context: int) -> MeansLayer:
        """All means of `context` tokens and one more are there, whose step repeats."""
        made = cls(parts)
        made.rows, made.tokens, made.repeats, made.is_initialized = keys, context, True, True
        return made

    def means(self) -> Means:
        """All of them."""
        assert self.rows is not None
        return Means(self.rows, None if self.held is None else self.held[:, 0, :, 0])

    @torch.no_grad()
    def extend(self, k: Tensor, places: Places, *, weights: Tensor | None, new: int) -> None:
        """Adds the parts that the last `new` of all keys complete; arguments as those of `means_of`."""
        found, first = means_of(k, places, self.form, weights=weights, new=new)
        most, past = self.form.complete(places.keys), found.keys[:, :, :0] if self.rows is None else self.rows
        if self.held is not None or (found.held is not None and self.form.width > 1):
            # Where a call says nothing of it, all keys count.
            shape, every = (
                (k.shape[0], 1, past.shape[2], 1),
                torch.ones((), dtype=torch.bool, device=k.device),
            )
            marks = every.expand(found.keys.shape[2]) if found.held is None else found.held
            marks = marks.expand(k.shape[0], -1)[:, None, :, None]
            self.held = self._joined(
                every.expand(shape) if self.held is None else self.held, marks, first, most
            )
        self.rows = self._joined(past, found.keys, first, most)
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
        if self.rows is None:
            return {}
        marks = {} if self.held is None else {"held": self.held}
        return {"means": self.rows, **marks}

    def replace(self, tensors: dict[str, Tensor]) -> None:
        self.rows, self.held = tensors.get("means"), tensors.get("held")
        self.is_initialized = self.rows is not None

    def crop(self, tokens_to_remove: int) -> None:
        removed = abs(tokens_to_remove)
        if removed in (0, self.tokens):
            super().crop(tokens_to_remove)
            return
        left = self.form.complete(self.tokens - removed)
        self.replace({name: held[:, :, :left] for name, held in self.tensors().items()})
        self.tokens -= removed
