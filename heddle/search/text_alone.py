"""For hooks inside a model's layers: whether it is the text that goes through them, or the constant stream beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from heddle.compose.constant_stream import is_stream
from heddle.compose.modules.layer import HeddleLayer


@contextmanager
def text_alone(model: nn.Module) -> Iterator[Callable[[], bool]]:
    """While it is open, what it gives tells whether the layer that runs now is run on the text."""
    now = {"text": True}

    def note(_: nn.Module, given: tuple[Any, ...]) -> None:
        now["text"] = not is_stream(given[1])

    layers = [one for one in model.modules() if isinstance(one, HeddleLayer)]
    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        yield lambda: now["text"]
    finally:
        for hook in hooks:
            hook.remove()
