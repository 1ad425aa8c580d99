"""Keys and values of a window and of the tokens before it that stay in sight."""

from __future__ import annotations

import torch
from torch import Tensor

from heddle.compose.cache import Call, KVLayer
from heddle.compose.modules.masks import View, columns_of, sink_columns


class SinkKVLayer(KVLayer):
    """Keys and values of the first `sinks` tokens of each row, then those of the last w - 1; of all, while there are no more.

    `columns`: where among the keys of the call the first ones of each row are, as `sink_columns` tells; None: at the front.

    Shapes:  keys: [B, KV heads, sinks + w - 1 at most, d];  values likewise;  columns: [B, sinks] int64
    """

    def __init__(self, window: int, sinks: int) -> None:
        super().__init__(window)
        self.sinks, self.last = sinks, window - 1
        self.columns: Tensor | None = None

    def find_first(self, call: Call, new: int) -> None:
        """Told of the call before its `new` tokens are added."""
        earlier = 0 if self.keys is None else self.keys.shape[-2]
        has_padding = call.key_padding is not None
        self.columns = sink_columns(call, earlier + new, self.sinks) if has_padding else None

    def _held(self, full: Tensor) -> Tensor:
        size = full.shape[-2]
        if size <= self.sinks + self.last:
            return full
        first = full[:, :, : self.sinks] if self.columns is None else columns_of(full, self.columns)
        return torch.cat((first, full[:, :, size - self.last :]), dim=-2)


def new_layer(view: View) -> KVLayer:
    """What is kept of keys of which queries see those in `view`."""
    if view.window is None or not view.sinks:
        return KVLayer(view.window)
    return SinkKVLayer(view.window, view.sinks)


def kept_tokens(view: View, context: int) -> int:
    """How many tokens it keeps after so many."""
    return context if view.window is None else min(context, view.sinks + view.window - 1)
