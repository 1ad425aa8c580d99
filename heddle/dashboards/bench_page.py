"""The kernels' page: rows of `heddle bench --ops` from a folder of JSON lines, beside peers and what the device can do."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from heddle.dashboards import bench_figures, sections
from heddle.dashboards.bench_figures import OURS, Bench, ceiling, newest
from heddle.dashboards.frame import Page, choose, empty, pick
from heddle.dashboards.html import Html, element, table

FLOOR = (
    "The newest row of each case. The floor is the time that the bytes or the operations that are needed would take at the most "
    "that was measured of the device itself."
)
NEEDED = ("op", "impl", "phase", "device", "commit", "shape", "dtype", "ms")


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
    if not timed or row["op"] == "python":
        return None
    # Some scripts wrote torch's name: one case, whose newest row is shown.
    return {**row, "dtype": str(row["dtype"]).removeprefix("torch.")}


def kernels(folder: Path, query: Mapping[str, str]) -> Page:
    """The rows of one op on one device."""
    page = Page("Kernels", here="Kernels", follows=False)
    page.add(element("header", element("h1", "Kernels"), sections.note(f"Benchmark rows of {folder}")))
    rows = rows_of(folder)
    devices = _names(rows, "device")
    device = query.get("device") if query.get("device") in devices else next(iter(devices), None)
    here = [row for row in rows if row["device"] == device]
    tops = {name: ceiling(row for row in rows if row["device"] == name) for name in devices}
    ops = {
        op: op for op in _names(here, "op") if any(r["op"] == op and r["phase"] != "ceiling" for r in here)
    }
    op = query.get("op") if query.get("op") in ops else next(iter(ops), None)
    mine = [row for row in here if row["op"] == op]
    if device is None or op is None:
        page.add(empty("No benchmark row was found.", "make bench writes rows; --bench names their folder."))
        return page
    page.add(pick(choose("Device", "device", devices, device), choose("Op", "op", ops, op)))
    page.plots("Beside others", bench_figures.beside_others(mine, tops[device]), sections.note(FLOOR))
    page.add(_table(mine, tops[device]))
    page.plots("Over commits", bench_figures.over_commits(mine, tops[device]))
    page.plots("On all devices", bench_figures.devices([row for row in rows if row["op"] == op], tops))
    return page


def _names(rows: Iterable[Bench], field: str) -> dict[str, str]:
    return {str(name): str(name) for name in dict.fromkeys(row[field] for row in rows)}


def _table(rows: Sequence[Bench], ceiling: Mapping[str, float]) -> Html:
    """The newest row of each case and implementation, with the time of others as a multiple of ours."""
    last, cells = newest(rows), []
    for (case, impl), row in sorted(last.items()):
        ours = last.get((case, OURS))
        same = ours is not None and ours.get("run") == row.get("run")
        ratio = f"{row['ms'] / ours['ms']:.2f}" if ours is not None and same and impl != OURS else "–"
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
    return sections.section("In figures", said, table(header, cells, numeric=range(2, 6)))


def _share(row: Bench, unit: str, name: str, ceiling: Mapping[str, float]) -> str:
    value, top = row.get(unit), ceiling.get(unit)
    if not value:
        return "–"
    return f"{value:.0f} {name}" + (f" ({100 * value / top:.0f} %)" if top else "")
