"""The numbers of a plot as a table, for those who read a page with scripts off."""

from __future__ import annotations

import html
from typing import Any

from heddle.dashboards.figures import Figure
from heddle.dashboards.html import Html, element, table


def numbers(figure: Figure) -> Html:
    """A table that is shown where scripts are off; nothing of trials as points, which the page has in tables of their own."""
    if any("customdata" in trace for trace in figure.data):
        return Html()
    x, y = (html.unescape(figure.layout[f"{side}axis"]["title"]["text"]) for side in "xy")
    if any(trace["type"] == "heatmap" for trace in figure.data):
        (heat,) = figure.data
        rows = [[_cell(name), *map(_cell, row)] for name, row in zip(heat["y"], heat["z"], strict=True)]
        return _hidden(table([y, *(f"{x} {place}" for place in heat["x"])], rows))
    rows = [
        [_cell(trace["name"]), *map(_cell, point)]
        for trace in figure.data
        for point in zip(_flat(trace["x"]), trace["y"], strict=True)
    ]
    return _hidden(table(["", x, y], rows))


def _hidden(shown: Html) -> Html:
    return element("noscript", shown)


def _flat(places: Any) -> Any:
    """Places on an axis of two levels as one text each."""
    two = bool(places) and isinstance(places[0], list | tuple)
    return [" ".join(pair) for pair in zip(*places, strict=True)] if two else places


def _cell(value: object) -> str:
    """Figures hold their texts escaped, since plotly reads tags in them; here they are plain again."""
    return f"{value:.6g}" if isinstance(value, int | float) else html.unescape(str(value))
