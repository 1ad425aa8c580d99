"""Rotary positions: the base, the share of a head that turns, and how frequencies are stretched for long contexts."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field

from heddle.specs.base import Schema

Stretch = Annotated[
    float, Field(ge=1, le=1e6, description="How many times longer the context is than the original one.")
]
Original = Annotated[
    int, Field(ge=1, le=10**9, description="Context length that the frequencies were made for (tokens).")
]
Turns = Annotated[float, Field(gt=0, le=1e6)]


class LinearScaling(Schema):
    """All frequencies divided by `factor` (position interpolation, arXiv 2306.15595)."""

    kind: Literal["linear"] = "linear"
    factor: Stretch


class Llama3Scaling(Schema):
    """Slow frequencies divided by `factor`, fast ones kept, those between blended (Llama 3.1, arXiv 2407.21783)."""

    kind: Literal["llama3"] = "llama3"
    factor: Stretch
    low_frequency_factor: Annotated[
        Turns,
        Field(description="Frequencies that turn fewer times than this in the original context are divided."),
    ] = 1.0
    high_frequency_factor: Annotated[
        Turns,
        Field(description="Frequencies that turn more often than this in the original context are kept."),
    ] = 4.0
    original_length: Original = 8192


class YarnScaling(Schema):
    """Slow frequencies divided by `factor`, fast ones kept, a ramp between; q and k grow a little (arXiv 2309.00071)."""

    kind: Literal["yarn"] = "yarn"
    factor: Stretch
    original_length: Original
    beta_fast: Annotated[
        Turns, Field(description="Turns in the original context from which on a frequency is kept.")
    ] = 32.0
    beta_slow: Annotated[
        Turns, Field(description="Turns in the original context up to which a frequency is divided.")
    ] = 1.0
    attention_factor: Annotated[
        float | None,
        Field(gt=0, le=1e3, description="Factor of the turned q and of k; null: 0.1 · ln(factor) + 1."),
    ] = None


Scaling = Annotated[LinearScaling | Llama3Scaling | YarnScaling, Field(discriminator="kind")]


class Rope(Schema):
    """Rotary position embedding, half-split ("NeoX") rotation (arXiv 2104.09864)."""

    theta: Annotated[float, Field(gt=1, le=1e12, description="Base of the wavelengths, in tokens.")] = (
        10_000.0
    )
    fraction: Annotated[
        float, Field(gt=0, le=1, description="Share of each head's dimensions that turn, 0 to 1.")
    ] = 1.0
    scaling: Annotated[
        Scaling | None, Field(description="How frequencies are stretched; null: as they are.")
    ] = None

    def runtime(self) -> dict[str, Any]:
        """Plain data for the module; `scaling` only where it changes something, with its factor filled in."""
        data: dict[str, Any] = {"theta": self.theta, "fraction": self.fraction}
        scaling = self.scaling
        if scaling is None or (isinstance(scaling, LinearScaling) and scaling.factor == 1):
            return data
        data["scaling"] = scaling.plain()
        if isinstance(scaling, YarnScaling) and scaling.attention_factor is None:
            data["scaling"]["attention_factor"] = 0.1 * math.log(scaling.factor) + 1.0
        return data

    def problem(self) -> tuple[str, str] | None:
        """A field of `scaling` that contradicts another one, and how."""
        scaling = self.scaling
        if isinstance(scaling, Llama3Scaling):
            high, low = "high_frequency_factor", "low_frequency_factor"
        elif isinstance(scaling, YarnScaling):
            high, low = "beta_fast", "beta_slow"
        else:
            return None
        above, below = getattr(scaling, high), getattr(scaling, low)
        return None if above > below else (f"scaling.{high}", f"{above:g} is not above {low} {below:g}")
