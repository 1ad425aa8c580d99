"""Plots of benchmark rows: beside other implementations and the floor, over commits, on all devices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from heddle.dashboards.data import natural
from heddle.dashboards.figures import BROKEN, Figure, escape, layout

SYMBOLS = {"heddle": "circle", "fla": "diamond", "torch": "square", "cudnn": "cross", "flash": "triangle-up"}
# An implementation keeps its colour from plot to plot; Okabe and Ito's, as those of devices.
PAINTS = {"heddle": "#0072b2", "fla": "#009e73", "torch": "#cc79a7", "cudnn": "#e69f00", "flash": "#56b4e9"}
OTHER = "#d55e00"
OTHERS = ("triangle-down", "x", "hexagon", "bowtie", "star-square")
# The time that nobody beats stands in a plot as one more implementation.
FLOOR, FLOOR_MARK = "floor", {"symbol": "line-ns-open", "size": 16, "color": BROKEN, "line": {"width": 2}}
OURS = "heddle"
ABOVE = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}
# Times that differ by less may have none of 1, 2 and 5 between them; of times that differ by more these are too many.
NARROW, WIDE = 5.0, 300.0
# Of devices: Okabe and Ito's colours, told apart by all, and marks.
COLOURS, DEVICES = (
    ("#0072b2", "#e69f00", "#009e73", "#cc79a7"),
    ("circle", "square", "diamond", "triangle-up"),
)
Bench = dict[str, Any]


def ceiling(rows: Iterable[Bench]) -> dict[str, float]:
    """The most that was measured of the device itself: bytes and FLOPs a second."""
    tops: dict[str, float] = {}
    for row in rows:
        for unit in ("gbps", "tflops"):
            if row["phase"] == "ceiling" and row.get(unit):
                tops[unit] = max(tops.get(unit, 0.0), float(row[unit]))
    return tops


def case_of(row: Bench) -> str:
    return f"{row['phase']} {_shape(row)}"


def _shape(row: Bench) -> str:
    return " ".join([*(f"{name}={value}" for name, value in row["shape"].items()), str(row["dtype"])])


def newest(rows: Iterable[Bench]) -> dict[tuple[str, str], Bench]:
    """The newest row of each case and implementation."""
    return {(case_of(row), row["impl"]): row for row in sorted(rows, key=_time)}


def _time(row: Bench) -> str:
    return str(row.get("time", ""))


def floors(rows: Iterable[Bench], tops: Mapping[str, float]) -> list[Bench]:
    """For each row of ours one of the floor: the milliseconds that its bytes or its operations need at `tops`."""
    found = []
    for row in rows:
        shares = [float(row[unit]) / top for unit, top in tops.items() if row.get(unit)]
        if row["impl"] == OURS and shares:
            found.append(row | {"impl": FLOOR, "ms": row["ms"] * max(shares)})
    return found


def beside_others(rows: Sequence[Bench], tops: Mapping[str, float]) -> list[Figure]:
    """One plot a phase: the newest of each implementation and the floor, case by case."""
    found = []
    for phase, mine in _phases(newest(rows).values()):
        known = [*mine, *floors(mine, tops)]
        cases, said = _cases(mine)
        traces = [_along(impl, here, cases) for impl, here in _by(known, "impl")]
        found.append(_drawn(f"beside-{phase}", f"{phase}: median time{said}", traces, cases))
    return found


def over_commits(rows: Sequence[Bench], tops: Mapping[str, float]) -> list[Figure]:
    """One plot a phase: every case of each implementation and of the floor, commit by commit in the order of their runs."""
    found = []
    for phase, mine in _phases(sorted(rows, key=_time)):
        traces = []
        for impl, here in _by([*mine, *floors(mine, tops)], "impl"):
            # Two levels: implementations stand beside each other inside of a commit.
            commits = [escape(str(row["commit"])[:7]) for row in here]
            places = {"x": [commits, [escape(impl)] * len(here)], "y": [row["ms"] for row in here]}
            traces.append(_points(impl, here) | places)
        drawn = layout("commit, oldest first", "ms") | {"showlegend": True}
        drawn["xaxis"] |= {"type": "multicategory"}
        drawn["yaxis"] |= _log([ms for trace in traces for ms in trace["y"]])
        drawn["legend"] = ABOVE
        found.append(Figure(f"kernels-{phase}", f"{phase}: median time of every case", traces, drawn))
    return found


def devices(rows: Sequence[Bench], tops: Mapping[str, Mapping[str, float]]) -> list[Figure]:
    """One plot a phase: our newest time of each case on every device that was measured, and the device's own floor."""
    found = []
    for phase, mine in _phases(row for row in rows if row["impl"] == OURS):
        known = _by(mine, "device")
        if len(known) < 2:
            continue
        cases, said = _cases(mine)
        traces = []
        for index, (device, here) in enumerate(known):
            colour, symbol = COLOURS[index % len(COLOURS)], DEVICES[index % len(DEVICES)]
            last = list(newest(here).values())
            for name, seen, look in (
                (device, last, {"symbol": symbol, "size": 10, "color": colour}),
                (f"{device}: floor", floors(last, tops[device]), FLOOR_MARK | {"color": colour}),
            ):
                traces.append(_along(name, seen, cases) | {"marker": look})
        found.append(_drawn(f"devices-{phase}", f"{phase}: heddle{said}", traces, cases))
    return found


def _phases(rows: Iterable[Bench]) -> list[tuple[str, list[Bench]]]:
    """The rows of each phase, without settings that were only tried: "heddle, splits 4" beside "heddle", and launches by name."""
    known = list(rows)
    plain = {(row["phase"], row["impl"]) for row in known}
    kept = [
        row
        for row in known
        if "Launch(" not in row["impl"]
        and ((row["phase"], _base(row["impl"])) not in plain or _base(row["impl"]) == row["impl"])
    ]
    return [(phase, mine) for phase, mine in _by(kept, "phase") if phase != "ceiling"]


def _base(impl: str) -> str:
    return impl.partition(",")[0]


def _by(rows: Iterable[Bench], field: str) -> list[tuple[str, list[Bench]]]:
    found: dict[str, list[Bench]] = {}
    for row in rows:
        found.setdefault(str(row[field]), []).append(row)
    return list(found.items())


def _cases(rows: Sequence[Bench]) -> tuple[dict[str, str], str]:
    """Short names of the cases from small to large, without what is the same in all of them, which is told for the caption."""
    held = [{**row["shape"], "dtype": row["dtype"]} for row in rows]
    columns = {name: tuple(str(one.get(name)) for one in held) for name in held[0]}
    same = [name for name, column in columns.items() if len(set(column)) == 1]
    # Of two dimensions that are equal in all cases one is enough.
    told = {column: name for name, column in reversed(columns.items()) if name not in same}
    names = {}
    for row in sorted(rows, key=lambda row: natural(case_of(row))):
        parts = {**row["shape"], "dtype": row["dtype"]}
        lines = [f"{name}={parts.get(name)}" for name in columns if name in told.values()]
        names[case_of(row)] = " ".join(map(escape, lines)) or "one case"
    shared = " ".join(f"{name}={held[0][name]}" for name in same)
    return names, f", {shared}" if shared else ""


def _points(impl: str, rows: Sequence[Bench]) -> dict[str, Any]:
    """An implementation's marks, without their places."""
    name = _base(impl)
    symbol = SYMBOLS.get(name) or OTHERS[sum(map(ord, name)) % len(OTHERS)]
    marker = FLOOR_MARK | {"symbol": "line-ew-open"} if impl == FLOOR else {"symbol": symbol, "size": 9}
    if name == impl != FLOOR:
        marker["color"] = PAINTS.get(impl, OTHER)
    text = [escape(f"{impl} {case_of(row)}: {row['ms']:.4g} ms") for row in rows]
    trace: dict[str, Any] = {"type": "scatter", "mode": "markers", "name": escape(impl), "marker": marker}
    return trace | {"text": text, "hovertemplate": "%{text}<extra></extra>"}


def _along(impl: str, rows: Sequence[Bench], cases: Mapping[str, str]) -> dict[str, Any]:
    """The same with the times across and the cases up."""
    trace = _points(impl, rows)
    look = {"marker": FLOOR_MARK} if impl == FLOOR else {}
    return trace | look | {"x": [row["ms"] for row in rows], "y": [cases[case_of(row)] for row in rows]}


def _log(times: Sequence[float]) -> dict[str, Any]:
    """An axis of milliseconds with ticks at 1, 2 and 5, at powers of ten where these are many, else where plotly puts them."""
    low, high = min(times), max(times)
    ticks = {} if low < high < NARROW * low else {"dtick": 1 if high > WIDE * low else "D2"}
    return {"title": {"text": "ms"}, "type": "log"} | ticks


def _drawn(name: str, caption: str, traces: list[dict[str, Any]], cases: Mapping[str, str]) -> Figure:
    """Cases as rows, the smallest above, since their names are long."""
    drawn = layout("ms", "case") | {"showlegend": True, "legend": ABOVE}
    order = list(dict.fromkeys(reversed(list(cases.values()))))
    drawn["yaxis"] |= {"type": "category", "categoryorder": "array", "categoryarray": order}
    drawn["xaxis"] |= _log([ms for trace in traces for ms in trace["x"]])
    return Figure(name, caption, traces, drawn)
