"""Checks of the parity battery that a class fails by itself: its logits without a cache are right.

Run as `parity.py` is, in a process that has no heddle; it imports nothing of ours. Measured with transformers 5.23.0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

PADDED_LEFT, PADDED_ONE = "left padding", "batch of one, padded"
CHUNKS, CHUNKS_PLACED = "chunked prefill", "chunked prefill, positions given"
STEPS, NARROW_STEPS = "one-token steps", "bfloat16, one-token steps"
ONE_STEPPED, RIGHT_STEPPED = "batch of one, padded, then steps", "right padding, then steps"
# Whatever is generated, and beams alone.
GENERATION = "with and without cache"
BEAMS = f"three beams, {GENERATION}"
# Kinds of mixers in an export of ours that decide on a whole prompt, once: pieces of it, and a pass without a cache, decide anew.
BY_PROMPT = ("layer_router",)
PROMPTED = (
    "a layer picks its mixer by the whole prompt, and a call without the cache of that prompt picks again"
)
CHOSEN_STEPS = "a token that is decoded alone reads chosen blocks, several tokens at once all keys"
UNPLACED = "the class counts positions only where position_ids are given"
FORGETS = "the class forgets its state where a call goes on with several tokens"
UNSORTED = "the class leaves the states of its linear layers where they are as beams change places"
UNCOUNTED = "the class asks its first layer for the number of tokens, and a linear one has none"
BIAS = "the class masks padding before its projection, whose bias then reaches the convolution"
# Classes with Mamba-2, and what they fail where its projections have a bias.
BIASED = ("bamba", "granitemoehybrid", "falcon_h1")
# What MiniMax raises where a window makes its mask and its keys of two lengths.
TWO_LENGTHS = "RuntimeError: The size of tensor a"
LINEAR = "linear_attention"


class Known(NamedTuple):
    """Why a class fails a check, and how its error begins where it raises one and gives no logits."""

    why: str
    error: str = ""


def known_failures(config: Any) -> dict[str, Known]:
    """Checks that the class of `config` fails, and why."""
    kind, biased = config.model_type, getattr(config, "mamba_proj_bias", False)
    found: dict[str, Known] = {}
    if kind == "bamba":
        found[CHUNKS] = Known(UNPLACED)
    elif kind == "jamba":
        found |= dict.fromkeys((CHUNKS, CHUNKS_PLACED), Known(FORGETS))
    elif kind == "minimax":
        found |= _minimax(config)
    elif kind == "heddle":
        found |= _ours(config.layers)
    if kind in BIASED and biased:
        found |= dict.fromkeys((PADDED_LEFT, PADDED_ONE, ONE_STEPPED), Known(BIAS))
    return found


def _ours(layers: Any) -> dict[str, Known]:
    steps = (STEPS, NARROW_STEPS, CHUNKS, CHUNKS_PLACED, ONE_STEPPED, RIGHT_STEPPED, GENERATION)
    if any(one in BY_PROMPT for one in values(layers, "kind")):
        return dict.fromkeys(steps, Known(PROMPTED))
    return dict.fromkeys(steps, Known(CHOSEN_STEPS)) if True in values(layers, "decode_only") else {}


def _minimax(config: Any) -> dict[str, Known]:
    types = list(config.layer_types)
    found = {BEAMS: Known(UNSORTED)} if LINEAR in types else {}
    if types[0] != LINEAR:
        return found
    windowed = config.sliding_window is not None and set(types) != {LINEAR}
    chunks = Known(UNCOUNTED, TWO_LENGTHS if windowed else "")
    found |= dict.fromkeys((CHUNKS, CHUNKS_PLACED), chunks)
    # Where a window ends is counted from the same number.
    steps = (ONE_STEPPED, RIGHT_STEPPED, GENERATION, *((STEPS, NARROW_STEPS) if windowed else ()))
    return found | dict.fromkeys(steps, Known(UNCOUNTED))


def values(data: Any, field: str) -> Iterator[Any]:
    """What every field of this name in plain data says."""
    if isinstance(data, Mapping):
        yield from (data[name] for name in data if name == field)
    inner = data.values() if isinstance(data, Mapping) else data if isinstance(data, (list, tuple)) else ()
    for one in inner:
        yield from values(one, field)
