"""Writes the table of docs/performance.md that sets Heddle's kernels beside flash-linear-attention's, from committed rows.

    python tests/bench/rivals.py

For each op and device the last run that timed both. Ratios are of one run: fla's time over ours. `--check` writes nothing
and exits with 1 if the page says something else.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]
ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "performance.md"
RESULTS = Path(__file__).parent / "results"
DEVICE = "nvidia-h200"
BEGIN, END = "<!-- rivals: begin -->", "<!-- rivals: end -->"
# What was set as goals, forward and in both directions, before anything was measured.
GOALS = {
    "lightning": (2.0, 1.8),
    "simple_gla": (1.8, 1.8),
    "gla": (2.0, 2.0),
    "delta_rule": (1.6, 1.4),
    "gated_delta_rule": (1.8, 1.5),
    "kda": (1.5, 1.3),
}
HEAD = (
    "| op | B × T | forward | fla | ratio | goal | of floor | forward + backward | fla | ratio | goal | of floor "
    "| peak, GB | fla |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"
)
STEPS = "| op | decode step, in a CUDA graph | Heddle | fla | ratio | of floor |\n|---|---|---|---|---|---|"


def runs(op: str) -> Iterator[list[Row]]:
    """The rows of each run that timed `op` in both implementations, with the run's ceilings; the last first."""
    lines = (RESULTS / f"{DEVICE}.jsonl").read_text(encoding="utf-8").splitlines()
    found: dict[str, list[Row]] = {}
    for row in map(json.loads, lines):
        if row["op"] == op or row["phase"] == "ceiling":
            found.setdefault(row["run"], []).append(row)
    for rows in reversed(found.values()):
        if {"heddle", "fla"} <= {row["impl"].partition(",")[0] for row in rows}:
            yield rows


def pick(rows: list[Row], impl: str, phase: str, shape: dict[str, int]) -> Row | None:
    matching = (
        row
        for row in rows
        if row["impl"].partition(",")[0] == impl and row["phase"] == phase and row["shape"] == shape
    )
    return next(matching, None)


def of_floor(rows: list[Row], row: Row) -> str:
    """Which share of the time the necessary bytes or operations would take at the ceilings of the run."""
    most = {
        unit: max(other[unit] or 0.0 for other in rows if other["phase"] == "ceiling")
        for unit in ("gbps", "tflops")
    }
    return f"{max((row[unit] or 0.0) / most[unit] for unit in most):.0%}"


def size(shape: dict[str, int]) -> str:
    keys, values = shape["H"], shape.get("HV", shape["H"])
    return f"{shape['B']} × {shape['T']:,}" + (f", {keys} key heads" if keys != values else "")


def both(rows: list[Row], phase: str, shape: dict[str, int], goal: float) -> list[str]:
    ours, theirs = (pick(rows, impl, phase, shape) for impl in ("heddle", "fla"))
    if ours is None or theirs is None:
        return [""] * 5
    ratio = theirs["ms"] / ours["ms"]
    lifted = "*" if "lifted" in theirs["impl"] else ""
    told = f"**{ratio:.2f}**" if ratio >= goal else f"{ratio:.2f}"
    return [f"{ours['ms']:.3f}", f"{theirs['ms']:.3f}{lifted}", told, f"{goal}", of_floor(rows, ours)]


def peaks(rows: list[Row], shape: dict[str, int]) -> list[str]:
    found = (pick(rows, impl, "fwdbwd", shape) for impl in ("heddle", "fla"))
    return ["" if row is None else f"{row['peak_bytes'] / 1e9:.2f}" for row in found]


def text() -> str:
    """The tables, and which runs they are of."""
    lines, steps, told = [HEAD], [STEPS], []
    for op, (forward, backward) in GOALS.items():
        rows = next(runs(op), None)
        if rows is None:
            continue
        told.append(f"`{op}` `{rows[-1]['run']}` at `{rows[-1]['commit']}`")
        shapes = [row["shape"] for row in rows if row["impl"] == "heddle" and row["phase"] == "fwd"]
        for shape in shapes:
            cells = [*both(rows, "fwd", shape, forward), *both(rows, "fwdbwd", shape, backward)]
            lines.append(f"| {' | '.join([op, size(shape), *cells, *peaks(rows, shape)])} |")
        for row in rows:
            theirs = pick(rows, "fla", "decode_graph", row["shape"])
            if row["impl"] == "heddle" and row["phase"] == "decode_graph" and theirs is not None:
                cells = [f"batch {row['shape']['B']}", f"{row['ms']:.4f}", f"{theirs['ms']:.4f}"]
                cells += [f"{theirs['ms'] / row['ms']:.2f}", of_floor(rows, row)]
                steps.append(f"| {' | '.join([op, *cells])} |")
    return "\n".join([f"Runs: {', '.join(told)}.", "", *lines, "", *steps])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 if the page is not current"
    )
    check = parser.parse_args().check
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    new = f"{before}{BEGIN}\n\n{text()}\n\n{END}{after}"
    if check:
        return int(new != page)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
