"""A plan as an SVG picture that needs nothing beside itself: layers from top to bottom, arcs at their right.

Text is set in a fixed pitch, so that what fits can be counted; a name that does not fit is cut, and stands in full in the
tooltip of its row.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import pairwise

from heddle.compose.picture_rows import Arc, Fold, Row, Rows, rows_of
from heddle.compose.plan import Plan
from heddle.specs.palette import look_of, mixed

FONT = "Menlo, Consolas, 'DejaVu Sans Mono', monospace"
SIZE = 11
# Fixed-pitch fonts are 0.60 to 0.61 of their size wide.
PITCH = 0.615 * SIZE
LINE, GAP, TOP, MARGIN = 18, 14, 16, 12
# Left edges and widths of the columns: repeats, numbers, and the card with its name, mixer and channel block.
REPEAT, NUMBER, CARD = 44, 92, 100
NAME_WIDTH, MIXER_WIDTH, CHANNEL_WIDTH, PAD = 132, 196, 96, 6
CARD_WIDTH = NAME_WIDTH + MIXER_WIDTH + CHANNEL_WIDTH + 4 * PAD
RIGHT = CARD + CARD_WIDTH
LANE, BEND = 14, 6
# The share of white in the boxes of mixers.
PALLOR = 0.6
INK, FAINT, EDGE = "#1f2933", "#7b8794", "#cbd2d9"
# Colour and dashes of each kind of edge; the words are those of `graph.Edge`.
ARCS = {
    "share": ("#6b7280", "4 3"),
    "skip": ("#0f766e", ""),
    "qk_source": ("#7c3aed", ""),
    "constant": ("#7c3aed", "2 2"),
    "keys": ("#b45309", ""),
    "values": ("#be185d", ""),
    "indices": ("#4338ca", "2 2"),
}


def svg(plan: Plan) -> str:
    """The picture."""
    found = rows_of(plan)
    kinds = list(dict.fromkeys(kind for row in found.rows for _, kind in row.mixers))
    colours, lanes = _colours(kinds), _lanes(found.arcs)
    width = RIGHT + LANE * (max(lanes, default=-1) + 2) + MARGIN
    title = f"{len(plan.layers)} layers, {plan.parameters:,} parameters"
    legend, top = _legend(colours, [arc.kind for arc in found.arcs], width)
    places = _places(found.rows, top)
    height = places[-1][1] + MARGIN
    body = [
        f'<title>{title}</title><rect width="{width}" height="{height}" fill="#ffffff"/>',
        _text(MARGIN, TOP + 4, title, weight="bold"),
        *legend,
        *_streams(places),
        *(part for row, place in zip(found.rows, places, strict=True) for part in _row(row, place, colours)),
        *(part for fold in found.folds for part in _fold(fold, places)),
        *_drawn_arcs(found, lanes, places),
    ]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
    head += f'viewBox="0 0 {width} {height}" role="img" font-family="{escape(FONT)}" font-size="{SIZE}">'
    return "\n".join([head, *body, "</svg>"]) + "\n"


def _colours(kinds: Sequence[str]) -> dict[str, str]:
    """The colour of each kind of mixer, paled so that text stands on it."""
    return {kind: mixed(look_of(kind).colour, PALLOR) for kind in kinds}


def _lanes(arcs: Sequence[Arc]) -> list[int]:
    """For each arc the first lane in which nothing else passes the same rows."""
    lanes = [0] * len(arcs)
    ends: list[int] = []
    for index in sorted(range(len(arcs)), key=lambda index: _span(arcs[index])):
        first, last = _span(arcs[index])
        lane = next((lane for lane, end in enumerate(ends) if end < first), len(ends))
        ends[lane : lane + 1] = [last]
        lanes[index] = lane
    return lanes


def _span(arc: Arc) -> tuple[int, int]:
    return min(arc.source, *arc.targets), max(arc.source, *arc.targets)


def _places(rows: Sequence[Row], top: int) -> list[tuple[int, int]]:
    """Upper and lower edge of each row."""
    places, y = [], top
    for row in rows:
        height = LINE * max(1, len(row.mixers)) + 2 * PAD
        places.append((y, y + height))
        y += height + GAP
    return places


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", fill: str = INK, weight: str = "normal"
) -> str:
    shape = f'x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{fill}" font-weight="{weight}"'
    return f"<text {shape}>{escape(text)}</text>"


def _cells(text: str) -> int:
    """Fixed-pitch cells that a text takes."""
    return sum(2 if unicodedata.east_asian_width(one) in "WF" else 1 for one in text)


def _cut(text: str, width: float) -> str:
    """As much of a text as fits."""
    room = int(width / PITCH)
    if _cells(text) <= room:
        return text
    while text and _cells(text) > room - 1:
        text = text[:-1]
    return text + "…"


def _legend(colours: dict[str, str], arcs: Sequence[str], width: int) -> tuple[list[str], int]:
    """What colours and lines mean, and where the rows begin."""
    drawn, x, y = [], MARGIN, TOP + LINE
    for name in [*colours, *dict.fromkeys(arcs)]:
        need = 24 + round(PITCH * _cells(name)) + 14
        if x + need > width and x > MARGIN:
            x, y = MARGIN, y + LINE
        if name in colours:
            drawn.append(_box(x, y, 16, 11, fill=colours[name]))
        else:
            drawn.append(_line(f"M{x} {y + 6}h18", name))
        drawn.append(_text(x + 24, y + 10, _cut(name, width - x - 24)))
        x += need
    return drawn, y + LINE + GAP


def _box(x: float, y: float, width: float, height: float, *, fill: str) -> str:
    shape = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
    return f'<rect {shape} rx="4" fill="{fill}" stroke="{EDGE}"/>'


def _line(path: str, kind: str) -> str:
    colour, dashes = ARCS[kind]
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.5"{dashed}/>'


def _streams(places: Sequence[tuple[int, int]]) -> Iterator[str]:
    """An arrow from each row to the next."""
    x = CARD + CARD_WIDTH // 2
    for (_, low), (high, _) in pairwise(places):
        yield f'<path d="M{x} {low}V{high - 5}" stroke="{FAINT}" stroke-width="1.5"/>'
        yield f'<path d="M{x - 4} {high - 6}h8l-4 6z" fill="{FAINT}"/>'


def _row(row: Row, place: tuple[int, int], colours: dict[str, str]) -> Iterator[str]:
    high, low = place
    middle = (high + low) / 2 + 4
    yield f"<g><title>{escape(row.told)}</title>"
    yield _box(CARD, high, CARD_WIDTH, low - high, fill="#f8fafc")
    yield _text(NUMBER, middle, row.number, anchor="end", fill=FAINT)
    name = NAME_WIDTH if row.mixers else CARD_WIDTH - 2 * PAD
    yield _text(CARD + PAD, middle, _cut(row.label, name - PAD), weight="normal" if row.mixers else "bold")
    x = CARD + PAD + NAME_WIDTH
    for line, (depth, kind) in enumerate(row.mixers):
        # A mixer made of others lies behind them.
        inside = next(
            (i for i, (d, _) in enumerate(row.mixers[line + 1 :]) if d <= depth), len(row.mixers) - line - 1
        )
        left, y = x + 10 * depth, high + PAD + LINE * line
        tall = LINE * (inside + 1) - (0 if depth == 0 else 2)
        yield _box(left, y, MIXER_WIDTH - 14 * depth, tall, fill=colours[kind])
        yield _text(left + 6, y + 13, _cut(kind, MIXER_WIDTH - 14 * depth - 10))
    if row.channel is not None:
        left = x + MIXER_WIDTH + PAD
        yield _box(left, high + PAD, CHANNEL_WIDTH, low - high - 2 * PAD, fill="#e4e7eb")
        yield _text(left + 6, middle, _cut(row.channel, CHANNEL_WIDTH - 10))
    yield "</g>"


def _fold(fold: Fold, places: Sequence[tuple[int, int]]) -> Iterator[str]:
    """A bracket around rows that repeat."""
    high, low = places[fold.first][0], places[fold.last][1]
    yield f'<path d="M{REPEAT + 6} {high}h-6V{low}h6" fill="none" stroke="{INK}" stroke-width="1.5"/>'
    yield _text(REPEAT - 5, (high + low) / 2 + 4, f"×{fold.times}", anchor="end", weight="bold")


def _drawn_arcs(found: Rows, lanes: Sequence[int], places: Sequence[tuple[int, int]]) -> Iterator[str]:
    """Each arc leaves its row, goes along its lane and comes back at its targets; the lane is drawn once each way."""
    ports = _ports(found.arcs, places)
    for index, arc in enumerate(found.arcs):
        x, start = RIGHT + LANE * (lanes[index] + 1), ports[index, "out", arc.source]
        ways = _ways(arc, start, ports, index)
        furthest = dict(sorted(ways, key=lambda one: abs(one[1] - start)))
        for way, end in ways:
            bend = min(BEND, abs(end - start) / 2)
            back = f"V{end - way * bend:g}Q{x} {end:g} {x - bend:g} {end:g}H{RIGHT + 6}"
            if end == furthest[way]:
                out = f"M{RIGHT} {start:g}H{x - bend:g}Q{x} {start:g} {x} {start + way * bend:g}"
            else:
                out = f"M{x} {end - way * bend:g}"
            yield _line(out + back, arc.kind)
            yield f'<path d="M{RIGHT} {end:g}l7 -3.5v7z" fill="{ARCS[arc.kind][0]}"/>'


def _ways(
    arc: Arc, start: float, ports: Mapping[tuple[int, str, int], float], index: int
) -> list[tuple[int, float]]:
    """Where an arc ends, and whether that is below (1) or above (-1) where it begins."""
    ends = [ports[index, "in", target] for target in arc.targets]
    return [(1 if end >= start else -1, end) for end in ends]


def _ports(arcs: Sequence[Arc], places: Sequence[tuple[int, int]]) -> dict[tuple[int, str, int], float]:
    """Where each arc leaves and enters a row: what enters above what leaves, none at the place of another."""
    at: dict[int, list[tuple[int, str, int]]] = {}
    for way in ("in", "out"):
        for index, arc in enumerate(arcs):
            for row in arc.targets if way == "in" else (arc.source,):
                at.setdefault(row, []).append((index, way, row))
    found = {}
    for row, ports in at.items():
        high, low = places[row]
        for place, port in enumerate(ports):
            found[port] = high + (low - high) * (place + 1) / (len(ports) + 1)
    return found
