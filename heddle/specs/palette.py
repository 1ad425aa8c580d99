"""One fixed colour for each kind of mixer, the same in every picture, plot and page.

No hue tells two dozen kinds apart, and least of all to the colour-blind. So mixers that are made of others, and those that
choose which tokens go together, are hatched as well, and within the plain and within the hatched kinds any two colours
differ in lightness or hue to a normal eye and with each of the three dichromacies (simulated after Machado 2009;
`tests/specs/test_palette.py` measures it). Every picture names its kinds in words too.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

PLAIN = {
    "attention": "#0072b2",
    "mla": "#001133",
    "gated_deltanet": "#d55e00",
    "decay_attention": "#009e73",
    "lightning": "#ffbb00",
    "mamba2": "#bb33ff",
    "deltanet": "#662200",
    "gla": "#77ccaa",
    "kda": "#bb1100",
    "gated_pool": "#330000",
    "retnet": "#aa99dd",
    "rat": "#ccddff",
    "hgrn2": "#003377",
    "liger": "#116600",
    "inline": "#ffff22",
    "rf_attention": "#99ffaa",
    "local_linear_attention": "#aa4488",
    "hierarchical_attention": "#ee66aa",
    "ttt": "#7700aa",
    "token_mlp": "#bbbbee",
    "linear_attention": "#cc9933",
    "fla": "#775555",
}
HATCHED = {
    "parallel": "#0072b2",
    "sequential": "#d55e00",
    "head_split": "#77ccaa",
    "moh": "#ffbb00",
    "token_router": "#bb33ff",
    "layer_router": "#662200",
    "landmark": "#994455",
    "routing": "#bb88ff",
    "nats_l": "#220088",
    "still": "#bbeeff",
    "contmix": "#331133",
}
# Kinds of plugins: always the same one for a name, though not one of its own.
OTHERS = ("#0011dd", "#998800", "#cc6699", "#446655", "#888888")
# A window of so many tokens or fewer is the palest relative of the whole attention, one of so many has nearly its colour.
NARROW, WIDE = 4, 13


@dataclass(frozen=True, slots=True)
class Look:
    """How a kind is drawn: its colour, the colour of text on it, and whether it is hatched."""

    colour: str
    ink: str
    hatched: bool


def look_of(mixer: str) -> Look:
    """The look of a kind, or of a kind with what sets it apart in brackets: `attention (window 16)` is paler."""
    kind, _, extra = mixer.partition(" (")
    colour = PLAIN.get(kind) or HATCHED.get(kind) or OTHERS[zlib.crc32(kind.encode()) % len(OTHERS)]
    colour = mixed(colour, _pallor(extra.removesuffix(")")))
    return Look(colour, "#000000" if luminance(colour) > 0.18 else "#ffffff", kind in HATCHED)


def _pallor(extra: str) -> float:
    """How much white is mixed in for what stands in the brackets."""
    word, _, number = extra.partition(" ")
    if word == "window" and number.isdigit():
        bits = min(max(int(number).bit_length() - 1, NARROW), WIDE)
        return 0.85 - 0.6 * (bits - NARROW) / (WIDE - NARROW)
    return 0.0 if extra in ("", "lightning") else 0.45


def mixed(colour: str, white: float) -> str:
    """`colour` with a share of white."""
    parts = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(part + (255 - part) * white):02x}" for part in parts)


def linear(colour: str) -> tuple[float, float, float]:
    """Linear red, green and blue of an sRGB colour."""
    red, green, blue = (_linear(int(colour[i : i + 2], 16) / 255) for i in (1, 3, 5))
    return red, green, blue


def _linear(part: float) -> float:
    return part / 12.92 if part <= 0.04045 else float(((part + 0.055) / 1.055) ** 2.4)


def luminance(colour: str) -> float:
    """Relative luminance of WCAG: 0 is black, 1 is white."""
    red, green, blue = linear(colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
