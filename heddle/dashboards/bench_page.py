"""The kernels' page: rows of `heddle bench --ops` from a folder of JSON lines, beside peers and what the device can do."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from heddle.dashboards import sections
from heddle.dashboards.figures import Figure, escape, layout
from heddle.dashboards.frame import Page, choose, empty, pick
from heddle.dashboards.html import Html, element, table

NEEDED = ("op", "impl", "phase", "device", "commit", "shape", "dtype", "ms")
SYMBOLS = {"heddle": "circle", "fla": "diamond", "torch": "square", "cudnn": "cross", "flash": "triangle-up"}
Bench = dict[str, Any]


def rows_of(folder: Path) -> list[Bench]:
    """The benchmark rows of all files of a folder; lines of other kinds are passed over."""
    found = []
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            row = _row(line)
            if row is not None:
                found.append(row)
    return found


def _row(line: str) -> Bench | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    whole = isinstance(row, dict) and all(row.get(name) is not None for name in NEEDED)
    timed = whole and isinstance(row["shape"], dict) and isinstance(row["ms"], int | float)
    return row if timed and row["op"] != "python" else None


def kernels(folder: Path, query: Mapping[str, str]) -> Page:
    """The rows of one op on one device."""
    page = Page("Kernels", here="Kernels", follows=False)
    page.add(element("header", element("h1", "Kernels"), sections.note(f"Benchmark rows of {folder}")))
    rows = rows_of(folder)
    devices = _names(rows, "device")
    device = query.get("device") if query.get("device") in devices else next(iter(devices), None)
    here = [row for row in rows if row["device"] == device]
    ops = {
        op: op for op in _names(here, "op") if any(r["op"] == op and r["phase"] != "ceiling" for r in here)
    }
    op = query.get("op") if query.get("op") in ops else next(iter(ops), None)
    mine = [row for row in here if row["op"] == op]
    if device is None or op is None:
        page.add(empty("No benchmark row was found.", "make bench writes rows; --bench names their folder."))
        return page
    page.add(pick(choose("Device", "device", devices, device), choose("Op", "op", ops, op)))
    page.plots("Time over commits", _over_commits(mine))
    page.add(_table(mine, _ceiling(here)))
    return page


def _names(rows: Iterable[Bench], field: str) -> dict[str, str]:
    return {str(name): str(name) for name in dict.fromkeys(row[field] for row in rows)}


def _ceiling(rows: Sequence[Bench]) -> dict[str, float]:
    """The most that was measured of the device itself: bytes and FLOPs a second."""
    tops: dict[str, float] = {}
    for row in rows:
        for unit in ("gbps", "tflops"):
            if row["phase"] == "ceiling" and row.get(unit):
                tops[unit] = max(tops.get(unit, 0.0), float(row[unit]))
    return tops


def _case(row: Bench) -> str:
    shape = " ".join(f"{name}={value}" for name, value in row["shape"].items())
    return f"{row['phase']} {shape} {row['dtype']}"


def _over_commits(rows: Sequence[Bench]) -> list[Figure]:
    """One plot a phase: each case and implementation in the order of its runs."""
    found = []
    for phase in _names(rows, "phase"):
        mine = sorted((r for r in rows if r["phase"] == phase), key=lambda row: str(row.get("time", "")))
        traces = []
        for impl in _names(mine, "impl"):
            points = [row for row in mine if row["impl"] == impl]
            marker = {"symbol": SYMBOLS.get(impl, "x"), "size": 9}
            trace: dict[str, Any] = {
                "type": "scatter",
                "mode": "markers",
                "name": escape(impl),
                "marker": marker,
            }
            # Two levels: implementations stand beside each other inside of a commit.
            trace["x"] = [[escape(str(row["commit"])[:7]) for row in points], [escape(impl)] * len(points)]
            trace["y"] = [row["ms"] for row in points]
            text = [escape(f"{impl} {_case(row)}: {row['ms']:.3f} ms") for row in points]
            traces.append(trace | {"text": text, "hovertemplate": "%{text}<extra></extra>"})
        drawn = layout("commit, oldest first", "ms")
        drawn["xaxis"] |= {"type": "multicategory"}
        drawn["yaxis"] |= {"type": "log"}
        found.append(Figure(f"kernels-{phase}", f"{phase}: median time of every case", traces, drawn))
    return found


def _table(rows: Sequence[Bench], ceiling: Mapping[str, float]) -> Html:
    """The newest row of each case and implementation, with the time of others as a multiple of ours."""
    newest: dict[tuple[str, str], Bench] = {}
    for row in sorted(rows, key=lambda row: str(row.get("time", ""))):
        newest[_case(row), row["impl"]] = row
    cells = []
    for (case, impl), row in sorted(newest.items()):
        ours = newest.get((case, "heddle"))
        same = ours is not None and ours.get("run") == row.get("run")
        ratio = f"{row['ms'] / ours['ms']:.2f}" if ours is not None and same and impl != "heddle" else "–"
        parts = [_share(row, unit, name, ceiling) for unit, name in (("gbps", "GB/s"), ("tflops", "TFLOP/s"))]
        cells.append([case, impl, f"{row['ms']:.4f}", ratio, *parts, row["commit"]])
    header = [
        "Case",
        "By",
        "ms",
        "× heddle, same run",
        "GB/s (of the ceiling)",
        "TFLOP/s (of the ceiling)",
        "Commit",
    ]
    said = sections.note(
        "The newest row of each. The ceiling is the most that was measured of the device itself."
    )
    return sections.section("Beside others", said, table(header, cells, numeric=range(2, 6)))


def _share(row: Bench, unit: str, name: str, ceiling: Mapping[str, float]) -> str:
    value, top = row.get(unit), ceiling.get(unit)
    if not value:
        return "–"
    return f"{value:.0f} {name}" + (f" ({100 * value / top:.0f} %)" if top else "")
