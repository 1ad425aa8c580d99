"""How far layers see, whatever their weights: of one mixer, and of a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from heddle.specs.layer import Site

if TYPE_CHECKING:
    from heddle.specs.pattern import Layer


@dataclass(frozen=True, slots=True)
class Sight:
    """What a token sees through some of a mixer's heads.

    `window` is how many tokens back, its own included; None: all. `log_decay` is how a token's weight changes with each
    later one, 0 for softmax; where a gate decides, that of its middle when training begins. Without `is_certain` a token
    in the window may also be hidden, by a selection or a router. `is_causal`: none after it. `sinks`: so many first tokens of
    the sequence are seen from everywhere behind them.
    """

    window: int | None = None
    log_decay: float = 0.0
    is_causal: bool = True
    is_certain: bool = True
    sinks: int = 0


def of_either(parts: Sequence[Sequence[Sight]]) -> tuple[Sight, ...]:
    """What a token sees through one of several mixers, when a router says which: for certain what the narrowest sees."""

    def width(one: Sight) -> float:
        return math.inf if one.window is None else one.window

    narrowest = min(max((width(one) for one in part if one.is_certain), default=0.0) for part in parts)
    first = min(max((_first(one) for one in part if one.is_certain), default=0.0) for part in parts)
    return tuple(
        replace(
            one,
            is_certain=one.is_certain and width(one) <= narrowest,
            sinks=int(min(one.sinks, first)),
        )
        for part in parts
        for one in part
    )


def _first(one: Sight) -> float:
    """How many first tokens are in sight from everywhere."""
    return math.inf if one.window is None else one.sinks


def reach(layers: Sequence[Layer], site: Site) -> int | None:
    """How many tokens before a token can have a say in its output, whatever is selected; None: all of them.

    Each layer carries on by its widest window: reach = sum over layers of (window - 1).        (arXiv 2502.01951)
    What `first_seen` tells comes beside it.
    """
    total = 0
    for layer in layers:
        windows = [one.window for one in layer.spec.mixer.sights(site) if one.is_certain]
        if None in windows:
            return None
        total += max((window - 1 for window in windows if window is not None), default=0)
    return total


def first_seen(layers: Sequence[Layer], site: Site) -> int:
    """How many tokens at the beginning have a say in the output of every later token, however far away it is."""
    sights = (one for layer in layers for one in layer.spec.mixer.sights(site) if one.is_certain)
    return max((one.sinks for one in sights), default=0)
