"""Each kind of mixer has one colour, told from every other also by the colour-blind."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from math import dist

import pytest

from heddle.specs.mixers import BUILT_IN
from heddle.specs.palette import HATCHED, PLAIN, linear, look_of, luminance
from heddle.specs.plugins import OPTIONAL

# Linear RGB as a normal eye and the three dichromacies see it: Machado, Oliveira, Fernandes 2009, severity 1.
EYES = {
    "normal": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protan": (
        (0.152286, 1.052583, -0.204868),
        (0.114503, 0.786281, 0.099216),
        (-0.003882, -0.048116, 1.051998),
    ),
    "deutan": (
        (0.367322, 0.860646, -0.227968),
        (0.280085, 0.672501, 0.047413),
        (-0.011820, 0.042940, 0.968881),
    ),
    "tritan": (
        (1.255528, -0.076749, -0.178779),
        (-0.078411, 0.930809, 0.147602),
        (0.004733, 0.691367, 0.303900),
    ),
}
# From linear RGB to the cones of OKLab, and from their cube roots to lightness and two hues (Ottosson 2020).
CONES = (
    (0.4122214708, 0.5363325363, 0.0514459929),
    (0.2119034982, 0.6806995451, 0.1073969566),
    (0.0883024619, 0.2817188376, 0.6299787005),
)
OKLAB = (
    (0.2104542553, 0.7936177850, -0.0040720468),
    (1.9779984951, -2.4285922050, 0.4505937099),
    (0.0259040371, 0.7827717662, -0.8086757660),
)
Matrix = tuple[tuple[float, float, float], ...]


def _times(matrix: Matrix, vector: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix)


def _seen(colour: str, eye: Matrix) -> tuple[float, ...]:
    light = tuple(min(1.0, max(0.0, part)) for part in _times(eye, linear(colour)))
    return _times(OKLAB, tuple(cone ** (1 / 3) for cone in _times(CONES, light)))


def _nearest(colours: Mapping[str, str]) -> float:
    return min(
        dist(_seen(colours[one], eye), _seen(colours[other], eye))
        for one, other in combinations(colours, 2)
        for eye in EYES.values()
    )


def test_every_kind_has_a_colour_of_its_own() -> None:
    kinds = [one.model_fields["kind"].default for one in BUILT_IN] + [one.kind for one in OPTIONAL]
    missing = set(kinds) - {*PLAIN, *HATCHED}
    assert not missing, "give each a line in heddle/specs/palette.py"
    assert not set(PLAIN) & set(HATCHED)


@pytest.mark.parametrize("table", [PLAIN, HATCHED], ids=["plain", "hatched"])
def test_no_two_colours_look_alike_to_any_eye(table: Mapping[str, str]) -> None:
    # The palette of Okabe and Ito, made for this, has 0.076 between its nearest two of eight, these 0.086.
    okabe_ito = ("#000000", "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7")
    assert _nearest(table) >= _nearest(dict(zip("abcdefgh", okabe_ito, strict=True)))


def test_a_narrow_window_is_paler_than_a_wide_one() -> None:
    shades = [look_of(f"attention{extra}").colour for extra in (" (window 16)", " (window 4096)", "")]
    assert sorted(shades, key=luminance, reverse=True) == shades
    assert len(set(shades)) == 3


def test_a_kind_of_a_plugin_keeps_its_colour() -> None:
    assert look_of("their_own") == look_of("their_own")
    assert look_of("parallel").hatched
    assert not look_of("their_own").hatched


def test_text_on_a_colour_can_be_read() -> None:
    for kind in (*PLAIN, *HATCHED):
        look = look_of(kind)
        light, dark = sorted((luminance(look.colour), luminance(look.ink)), reverse=True)
        # WCAG 2.2, 1.4.3.
        assert (light + 0.05) / (dark + 0.05) >= 4.5
