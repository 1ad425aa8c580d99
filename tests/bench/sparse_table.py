"""Writes the table of docs/performance.md that sets sparse, routed and hybrid attention beside its goals, from committed rows.

    python tests/bench/sparse_table.py

A line (sparse_goals.py) is told from the newest run on an H200, by the time in its rows, that timed both sides of it: a run that
is appended to its file of tests/bench/results takes the place of an older one. `--check` writes nothing and exits with 1 if the
page says something else.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from generated_page import between, write_page
from sparse_goals import FLOOR, NAMES, Line, lines

Row = dict[str, Any]
ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
DEVICE = "NVIDIA H200"
BEGIN, END = "<!-- sparse: begin -->", "<!-- sparse: end -->"
HEAD = ("what", "B × T", "ours", "beside", "its time", "ratio", "goal", "limited by", "run")


def rows_of(file: str) -> list[Row]:
    path = RESULTS / f"{file}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def runs_of(file: str) -> list[list[Row]]:
    """The timed rows of each run on the device in bfloat16, the newest first; rows that lost their run go by their commit."""
    found: dict[str, list[Row]] = {}
    for row in rows_of(file):
        dtype = str(row.get("dtype", "")).removeprefix("torch.")
        if row["device"] == DEVICE and row.get("ms") is not None and dtype == "bfloat16":
            found.setdefault(row.get("run") or row["commit"], []).append(row)
    return sorted(found.values(), key=lambda rows: max(row["time"] for row in rows), reverse=True)


def row_of(rows: list[Row], line: Line, impl: str) -> Row | None:
    """The last row of this implementation whose shape has the sizes of the line."""
    for row in reversed(rows):
        has_sizes = line.shape.items() <= row.get("shape", {}).items()
        if has_sizes and (row["op"], row["phase"], row["impl"]) == (line.op, line.phase, impl):
            return row
    return None


def sides_of(rows: list[Row], line: Line) -> tuple[list[Row], float] | None:
    """Our rows and the rival's time in a run that timed all of them."""
    ours = [row for impl in line.ours if (row := row_of(rows, line, impl)) is not None]
    once = None if line.instead is None else row_of(rows, line, line.instead)
    if once is None and len(ours) < len(line.ours):
        return None
    ours = ours if once is None else [once]
    if line.rival == FLOOR:
        return (ours, ours[0][FLOOR]) if ours[0].get(FLOOR) else None
    theirs = row_of(rows, line, line.rival)
    return None if theirs is None else (ours, theirs["ms"])


def milliseconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:#.3g}".removesuffix(".")


def ratio_of(line: Line, ours: float, theirs: float) -> str:
    """In bold where a goal is kept."""
    ratio = ours / theirs if line.at_most else theirs / ours
    told = f"{ratio:.1f}" if ratio >= 10 else f"{ratio:.2f}"
    kept = line.goal is not None and (ratio <= line.goal if line.at_most else ratio >= line.goal)
    return f"**{told}**" if kept else told


def goal_of(line: Line) -> str:
    return "" if line.goal is None else f"{'≤' if line.at_most else '≥'} {line.goal:g}"


def cells(line: Line, runs: list[list[Row]]) -> list[str] | None:
    for rows in runs:
        sides = sides_of(rows, line)
        if sides is None:
            continue
        (first, *more), theirs = sides
        ours = first["ms"] + sum(row["ms"] for row in more)
        dense = row_of(rows, line, "cudnn") if line.rival in ("fla", "flex") else None
        beside = milliseconds(theirs) + (f" (dense {milliseconds(dense['ms'])})" if dense else "")
        limit = "; ".join(text for text in (line.limit, line.noted.get(first["commit"])) if text)
        run = f"`{first['run']}` at `{first['commit']}`" if first.get("run") else f"`{first['commit']}`"
        times = [milliseconds(ours), NAMES[line.rival], beside, ratio_of(line, ours, theirs)]
        return [line.what, line.size, *times, goal_of(line), limit, run]
    if line.told_once_timed:
        return None
    return [line.what, line.size, "not timed", NAMES[line.rival], "", "", goal_of(line), line.limit, ""]


def text() -> str:
    """The table."""
    runs: Mapping[str, list[list[Row]]] = {file: runs_of(file) for file in {line.file for line in lines()}}
    table = [HEAD, *(row for line in lines() if (row := cells(line, runs[line.file])) is not None)]
    told = [f"| {' | '.join(row)} |" for row in table]
    return "\n".join([told[0], "|" + "---|" * len(HEAD), *told[1:]])


def main() -> int:
    return write_page(__doc__, lambda page: between(page, BEGIN, END, text()))


if __name__ == "__main__":
    sys.exit(main())
