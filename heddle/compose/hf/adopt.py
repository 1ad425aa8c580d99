"""Our cache layers in a cache of transformers."""

from __future__ import annotations

from collections.abc import Sequence

from transformers.cache_utils import Cache

from heddle.compose.cache import StateLayer
from heddle.errors import HeddleError


def adopt(cache: Cache, layers: Sequence[StateLayer]) -> None:
    """Makes an empty cache hold `layers`; one that holds such layers already is left as it is.

    Raises:
        HeddleError: "bad-argument" for a cache that other layers have filled, or that offloads or quantizes.
    """
    held = cache.layers
    if held and all(isinstance(layer, StateLayer) for layer in held):
        return
    if any(getattr(layer, "is_initialized", False) for layer in held) or getattr(cache, "offloading", False):
        raise HeddleError(
            "bad-argument",
            f"this model cannot go on from a {type(cache).__name__} that it has not filled itself",
            hint="pass past_key_values=None, an empty DynamicCache(), or what an earlier call returned",
        )
    cache.layers = list(layers)
    cache.layer_class_to_replicate = None
