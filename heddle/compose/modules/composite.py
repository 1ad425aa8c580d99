"""Mixers made of other mixers: what they have in common."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from heddle.compose.cache import CompositeLayer, RecurrentLayer, StateLayer


class CompositeMixer(nn.Module):
    """A mixer whose attributes `mixer` or `mixers` hold others, which are built before it and handed to it."""

    def parts(self) -> dict[str, Any]:
        """The mixers it is made of, by path."""
        found: dict[str, Any] = {}
        for name in ("mixer", "mixers"):
            held = getattr(self, name, None)
            if isinstance(held, nn.ModuleList):
                found |= {f"{name}.{index}": one for index, one in enumerate(held)}
            elif held is not None:
                found[name] = held
        return found

    def new_cache(self) -> StateLayer:
        return CompositeLayer({path: part.new_cache() for path, part in self.parts().items()})

    def filled_cache(self, batch: int, context: int, like: Tensor) -> StateLayer:
        """A cache of random contents after `context` tokens, whose step repeats."""
        parts = {path: part.filled_cache(batch, context, like) for path, part in self.parts().items()}
        made = CompositeLayer(parts, self.filled_states(batch, context, like))
        made.tokens, made.is_initialized = context, True
        return made

    def filled_states(self, batch: int, context: int, like: Tensor) -> RecurrentLayer | None:  # noqa: ARG002
        """Its own part of such a cache, if it has states of its own."""
        return None

    def kernel_path(self, device: torch.device, dtype: torch.dtype) -> str:
        """The names of the code that does the mixing, each once."""
        names = [cast(str, part.kernel_path(device, dtype)) for part in self.parts().values()]
        return " and ".join(dict.fromkeys(name for joined in names for name in joined.split(" and ")))
