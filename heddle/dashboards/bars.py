"""Bars over layers as SVG in the page: nothing has to be loaded or laid out by a script before they are seen."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence
from typing import Any

from heddle.dashboards import words
from heddle.dashboards.figures import Figure
from heddle.dashboards.html import Html, element, join

# Pixels from the highest value to the foot.
HEIGHT = 190
TICKS, LABELS = 4, 8
# More layers than these stand without a gap, and equal neighbours are one bar.
SINGLE = 200
Bar = tuple[int, int, float]


def bars(drawn: Sequence[Figure]) -> Html:
    """Figures with one bar a layer, side by side."""
    return element(
        "div",
        *(element("figure", _bars(one), element("figcaption", one.caption)) for one in drawn),
        cls="plots",
    )


def _bars(figure: Figure) -> Html:
    """One figure: its axes, and for each mixer the bars of its layers."""
    top = max((value for trace in figure.data for value in trace["y"]), default=0.0)
    unit, per = _unit(figure.layout["yaxis"]["title"]["text"], top)
    count = 1 + max((x for trace in figure.data for x in trace["x"]), default=0)
    step = _step(top / per, TICKS)
    ceiling = per * step * max(1, math.ceil(top / per / step))
    mixers = [_mixer(figure.name, trace, (count, ceiling), unit) for trace in figure.data]
    axes = [*_levels(step * per, ceiling, per), *_layers(count), _text(unit, x=0, y=-12, cls="unit")]
    axes.append(_text("layer", x="100%", y=HEIGHT + 32, text_anchor="end"))
    dense = "dense" if count > SINGLE else None
    inner = element("svg", *axes, *mixers, width="100%", height=HEIGHT, cls=dense)
    return element("div", inner, cls="bars", role="img", aria_label=figure.caption)


def _unit(unit: str, top: float) -> tuple[str, float]:
    """The unit of the axis, and how many of what is counted one of them is."""
    if unit != "bytes":
        return unit, 1.0
    for power, name in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if top >= 1 << power:
            return name, float(1 << power)
    return unit, 1.0


def _step(top: float, most: int) -> float:
    """The distance of ticks of which at most so many stand above the foot: 1, 2 or 5 times a power of ten."""
    if top <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(top / most))
    return next(power * times for times in (1, 2, 5, 10) if power * times * most >= top * (1 - 1e-9))


def _levels(step: float, ceiling: float, per: float) -> Iterator[Html]:
    """Lines across the plot with what they stand for."""
    for at in range(round(ceiling / step) + 1):
        y = round(HEIGHT * (1 - at * step / ceiling), 1)
        yield element("line", x1=0, x2="100%", y1=y, y2=y)
        value = at * step / per
        said = words.count_text(value) if value >= 1000 else f"{value:g}"
        yield _text(said, x=-8, y=y + 4, text_anchor="end")


def _layers(count: int) -> Iterator[Html]:
    """Some numbers of layers below the foot."""
    for layer in range(0, count, max(1, round(_step(count, LABELS)))):
        yield _text(str(layer), x=_percent(layer + 0.5, count), y=HEIGHT + 16, text_anchor="middle")


def _text(said: str, **place: object) -> Html:
    return element("text", said, **place)


def _mixer(name: str, trace: dict[str, Any], scale: tuple[int, float], unit: str) -> Html:
    """The bars of a mixer in its colour, and its stripes above them."""
    found = (
        _joined(trace)
        if scale[0] > SINGLE
        else [(x, x, y) for x, y in zip(trace["x"], trace["y"], strict=True)]
    )
    found = [bar for bar in found if bar[2] > 0]
    # Figures hold their texts escaped, for plotly.
    mixer = html.unescape(trace["name"])
    rects = [_rect(bar, scale, f"{mixer}, {_value(bar[2], unit)}") for bar in found]
    parts = [element("g", *rects, fill=trace["marker"]["color"])]
    if "pattern" in trace["marker"] and found:
        hatch = f"hatch-{name}-{min(trace['x'])}"
        stripe = element("path", d="M0 6L6 0", stroke="#fff", stroke_width=1.6)
        pattern = element("pattern", stripe, id=hatch, width=6, height=6, patternUnits="userSpaceOnUse")
        parts += [
            pattern,
            element("g", *(_rect(bar, scale) for bar in found), fill=f"url(#{hatch})", pointer_events="none"),
        ]
    return join(parts)


def _joined(trace: dict[str, Any]) -> list[Bar]:
    """First and last layer and the value, of neighbours that are equal."""
    found: list[Bar] = []
    for x, y in zip(trace["x"], trace["y"], strict=True):
        if found and found[-1][1] == x - 1 and found[-1][2] == y:
            found[-1] = (found[-1][0], x, y)
        else:
            found.append((x, x, y))
    return found


def _rect(bar: Bar, scale: tuple[int, float], said: str | None = None) -> Html:
    first, last, value = bar
    count, ceiling = scale
    gap = 0.0 if count > SINGLE else 0.1
    height = HEIGHT * value / ceiling
    layers = f"layer {first}" if first == last else f"layers {first} to {last}"
    title = [] if said is None else [element("title", f"{layers}: {said}")]
    return element(
        "rect", *title, x=_percent(first + gap, count), width=_percent(last + 1 - first - 2 * gap, count),
        y=round(HEIGHT - height, 1), height=round(height, 1),
    )  # fmt: skip


def _value(value: float, unit: str) -> str:
    return (
        words.bytes_text(value)
        if unit in ("bytes", "KiB", "MiB", "GiB", "TiB")
        else f"{words.count_text(value)} {unit}"
    )


def _percent(layers: float, count: int) -> str:
    return f"{100 * layers / count:.2f}%"
