"""Writes the tables of docs/performance.md that set Heddle's kernels beside flash-linear-attention's, from committed rows.

    python tests/bench/rivals.py

For each op, direction and shape the last run on an H200 that timed both. Ratios are of one run: fla's time over ours.
`--check` writes nothing and exits with 1 if the page says something else.
"""

from __future__ import annotations

import functools
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from generated_page import write_page
from rivals_causes import CAUSES, TIMED_AS

Row = dict[str, Any]
ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
DEVICE = "nvidia-h200"


@dataclass(frozen=True, slots=True)
class Goal:
    """What was set before anything was measured: fla's time over ours at least `ratio`, or at most so many `ms`."""

    ratio: float | None = None
    ms: float | None = None

    def __str__(self) -> str:
        return f"{self.ratio}" if self.ratio else f"{self.ms:.3f} ms" if self.ms else ""

    def missed_by(self, ours: float, theirs: float) -> float:
        """The part of the goal that is missing; 0 if it is kept."""
        if self.ratio:
            return max(0.0, 1 - theirs / ours / self.ratio)
        return max(0.0, ours / self.ms - 1) if self.ms else 0.0


# Forward and in both directions.
RATIOS = {
    "lightning": (2.0, 1.8),
    "simple_gla": (1.8, 1.8),
    "gla": (2.0, 2.0),
    "delta_rule": (1.6, 1.4),
    "gated_delta_rule": (1.8, 1.5),
    "kda": (1.5, 1.3),
    "hgrn2": (1.5, 1.3),
    "hgrn2_first_layer": (1.5, 1.3),
    "mamba2": (1.5, 1.3),
    "retention": (1.5, 1.3),
    "linear_attention": (1.5, 1.3),
    "taylor_attention": (1.5, 1.3),
    "taylor_attention_chunks": (1.5, 1.3),
    "parallax": (1.5, 1.3),
}
# Decays of which nothing is asked: what counts are those that checkpoints have.
LINEAR = "lightning_linear"
# 4 key and 16 value heads: the best figure that was published for this chip, forward.
GROUPED = {"fwd": Goal(ms=0.50), "fwdbwd": Goal()}
STEPS = {
    ("gated_delta_rule", "decode_graph", 1): Goal(ratio=1.0),
    ("gated_delta_rule", "decode_graph", 32): Goal(ms=0.019),
    ("gated_delta_rule", "decode_graph", 256): Goal(ms=0.148),
    ("gated_delta_rule", "decode", 1): Goal(ms=0.020),
}
PHASES = {"fwd": "forward", "fwdbwd": "forward + backward", "decode_graph": "step", "decode": "eager step"}
# A call that took less had been compiled before, all of it or most.
COLD_S = 1.0
# `6729b7b0ef94`, since which the kernels of a launcher are compiled side by side.
SIDE_BY_SIDE = "2026-11-27T08:31:50Z"
# How far the median of a call's times is from their fastest tenth where the host was busy, or the slowest tenth from the median.
WAITED, WAITED_AT_TIMES = 1.05, 1.5


def rows_of(file: str) -> list[Row]:
    path = RESULTS / f"{file}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@functools.cache
def all_runs() -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows_of(DEVICE):
        found.setdefault(row["run"], []).append(steadied({**row, "op": row["op"].removesuffix("_step")}))
    return found


def steadied(row: Row) -> Row:
    """A row of fla; where a busy host made its calls wait, by its fastest tenth, which is what a quiet one would show.

    An eager step is the host's time by itself, ours and fla's.
    """
    if impl_of(row) != "fla" or row["shape"]["T"] == 1:
        return row
    if row["ms"] < WAITED * row["ms_p10"] and row["ms_p90"] < WAITED_AT_TIMES * row["ms"]:
        return row
    return {**row, "ms": row["ms_p10"], "waited": True}


def run_of(op: str, phase: str) -> list[Row]:
    """The rows of the last run that timed `op` so in both implementations; none if there is no such run."""
    for rows in reversed(all_runs().values()):
        impls = {impl_of(row) for row in rows if row["op"] == op and row["phase"] == phase}
        if {"heddle", "fla"} <= impls:
            return rows
    return []


def made(row: Row) -> str:
    """The run and the commit of a row."""
    return f"`{row['run']}` at `{row['commit']}`"


def impl_of(row: Row) -> str:
    return str(row["impl"].partition(",")[0])


def pairs(op: str, phase: str) -> Iterator[tuple[Row, Row]]:
    """Ours and fla's row of each shape, of the last run that timed both; `earlier` where that is not `run_of`."""
    found: dict[str, tuple[Row, Row]] = {}
    last = {row["run"] for row in run_of(op, phase)}
    for rows in all_runs().values():
        mine = [row for row in rows if row["op"] == op and row["phase"] == phase]
        for ours, theirs in itertools.product(mine, mine):
            if ours["impl"] == "heddle" and impl_of(theirs) == "fla" and theirs["shape"] == ours["shape"]:
                found[size(ours["shape"])] = ours, {**theirs, "earlier": theirs["run"] not in last}
    yield from found.values()


def alone_since(op: str, phase: str, pair: Row) -> Row | None:
    """Our last row of a shape that a run after its pair's timed without fla."""
    alike = [
        row
        for rows in all_runs().values()
        for row in rows
        if (row["op"], row["phase"], row["impl"], row["shape"]) == (op, phase, "heddle", pair["shape"])
    ]
    return alike[-1] if alike[-1]["run"] != pair["run"] else None


def of_floor(ours: Row) -> str:
    """Which share of the time the necessary bytes or operations would take at the ceilings of the run."""
    ceilings = [row for row in all_runs()[ours["run"]] if row["phase"] == "ceiling"]
    most = {unit: max(row[unit] or 0.0 for row in ceilings) for unit in ("gbps", "tflops")}
    return f"{max((ours[unit] or 0.0) / most[unit] for unit in most):.0%}"


def size(shape: dict[str, int]) -> str:
    keys, values = shape["H"], shape.get("HV", shape["H"])
    told = f"batch {shape['B']}" if shape["T"] == 1 else f"{shape['B']} × {shape['T']:,}"
    return told + (f", {keys} key heads" if 1 < keys < values else "")


def is_grouped(op: str, shape: dict[str, int]) -> bool:
    return op == "gated_delta_rule" and shape["H"] != shape["HV"]


def goal_of(op: str, phase: str, shape: dict[str, int]) -> Goal:
    if phase.startswith("decode"):
        return STEPS.get((op, phase, shape["B"]), Goal())
    if is_grouped(op, shape):
        return GROUPED[phase]
    return Goal(ratio=RATIOS[op][phase != "fwd"])


def times(ours: Row, theirs: Row, goal: Goal, digits: int = 3) -> list[str]:
    """Ours, fla's, and their ratio, in bold where a goal is kept."""
    theirs_ms, ratio = f"{theirs['ms']:.{digits}f}", f"{theirs['ms'] / ours['ms']:.2f}"
    kept = (goal.ratio or goal.ms) and not goal.missed_by(ours["ms"], theirs["ms"])
    # Which of the two numbers the goal is about.
    bold = ["**" if kept and limit else "" for limit in (goal.ms, goal.ratio)]
    marks = ("*" if "lifted" in theirs["impl"] else "") + ("†" if "copied" in theirs["impl"] else "")
    marks += ("‡" if theirs.get("waited") else "") + ("§" if theirs["earlier"] else "")
    own = f"{bold[0]}{ours['ms']:.{digits}f}{bold[0]}"
    return [own, f"{theirs_ms}{marks}", f"{bold[1]}{ratio}{bold[1]}"]


def row_of(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def head(*names: str) -> list[str]:
    return [row_of(*names), "|" + "---|" * len(names)]


def table() -> list[str]:
    """Whole sequences, a line for each op and shape."""
    direction = ["fla", "ratio", "goal", "of floor"]
    lines = head(
        "op", "B × T", "forward", *direction, "forward + backward", *direction, "peak, GB", "fla"
    )  # fmt: skip
    for op in RATIOS:
        found = {phase: list(pairs(op, phase)) for phase in ("fwd", "fwdbwd")}
        shapes = [ours["shape"] for ours, _ in max(found.values(), key=len)]
        for shape in shapes:
            cells = [op, size(shape)]
            peaks = ["", ""]
            for phase, timed in found.items():
                here = next((pair for pair in timed if pair[0]["shape"] == shape), None)
                if here is None:
                    cells += [""] * 5
                    continue
                goal = goal_of(op, phase, shape)
                cells += [*times(*here, goal), str(goal), of_floor(here[0])]
                if phase == "fwdbwd":
                    peaks = [f"{row['peak_bytes'] / 1e9:.2f}" for row in here]
            lines.append(row_of(*cells, *peaks))
    return lines


def step_table() -> list[str]:
    lines = head(
        "op", "", "in a CUDA graph", "fla", "ratio", "goal", "of floor", "eager", "fla", "ratio", "goal"
    )  # fmt: skip
    for op in RATIOS:
        eager = {ours["shape"]["B"]: (ours, theirs) for ours, theirs in pairs(op, "decode")}
        for ours, theirs in pairs(op, "decode_graph"):
            shape = ours["shape"]
            goal, later = (goal_of(op, phase, shape) for phase in ("decode_graph", "decode"))
            cells = [f"{op}_step", size(shape), *times(ours, theirs, goal, 4), str(goal), of_floor(ours)]
            lines.append(row_of(*cells, *times(*eager[shape["B"]], later, 4), str(later)))
    return lines


def apart() -> list[str]:
    """How far fla's outputs and states are from ours, where a run compared them."""
    found = [
        (max(theirs["apart"].values()), op)
        for op, phase in itertools.product(RATIOS, ("fwd", "decode_graph"))
        for _, theirs in pairs(op, phase)
        if "apart" in theirs
    ]
    if not found:
        return []
    worst, op = max(found)
    names = ", ".join(f"`{name}`" for name in dict.fromkeys(op for _, op in found))
    what = f"fla's outputs and final states are apart from ours by {worst:.1%} of their norm at most (`{op}`)"
    return [f"In one run with these times of {names}, in bfloat16, {what}.", ""]


def first_calls() -> list[str]:
    """Seconds of the first call of each op and direction, in the runs of the table."""
    lines = head("op", "forward", "fla", "then both directions", "fla")
    for op in RATIOS:
        cells = [first_call(row) for phase in ("fwd", "fwdbwd") for row in next(pairs(op, phase), ())]
        if cells:
            lines.append(row_of(op, *cells, *[""] * (4 - len(cells))))
    return lines


def first_call(row: Row) -> str:
    if row["first_call_s"] <= COLD_S:
        return "warm"
    mark = "¶" if row["impl"] == "heddle" and row["time"] < SIDE_BY_SIDE else ""
    return f"{row['first_call_s']:.1f}{mark}"


def lasting() -> list[str]:
    """Fixed decays: what is won where heads forget soon, beside decays that let nothing be left out."""
    names = ("lightning", "lightning_linear", "linear_attention")
    whole = [
        rows
        for rows in all_runs().values()
        if set(names) <= {row["op"] for row in rows if row["impl"] == "heddle"}
    ]
    if not whole:
        return []
    ours = {
        (row["op"], row["phase"], size(row["shape"])): row["ms"]
        for row in whole[-1]
        if row["op"] in names and row["impl"] == "heddle"
    }
    lines = [
        f"Heddle's times by decays, of run {made(whole[-1][0])}; gain: over decays that forget nothing.",
        "",
    ]
    lines += head("B × T", "", "nothing is forgotten", "geometric table", "gain", "linear table", "gain")
    for (op, phase, shape), base in ours.items():
        if op != "linear_attention" or any((name, phase, shape) not in ours for name in names):
            continue
        cells = [f"{base:.3f}"]
        for name in names[:2]:
            ms = ours[name, phase, shape]
            cells += [f"{ms:.3f}", f"{base / ms:.2f}"]
        lines.append(row_of(shape, PHASES[phase], *cells))
    return [*lines, ""]


def other_decays() -> list[str]:
    """The linear table of decays beside fla, forward, and in both directions once a run has timed these."""
    timed = {phase: list(pairs(LINEAR, phase)) for phase in ("fwd", "fwdbwd")}
    found = {phase: pair for phase, pair in timed.items() if pair}
    if not found:
        return []
    runs = ", ".join(f"{PHASES[phase]} {made(pair[0][0])}" for phase, pair in found.items())
    lines = [f"Lightning's linear table of decays, of which no goal was set; runs: {runs}.", ""]
    lines += head("B × T", *[name for phase in found for name in (PHASES[phase], "fla", "ratio", "of floor")])
    for shape in [ours["shape"] for ours, _ in next(iter(found.values()))]:
        cells = [size(shape)]
        for pair in found.values():
            here = next(((ours, theirs) for ours, theirs in pair if ours["shape"] == shape), None)
            cells += [*times(*here, Goal()), of_floor(here[0])] if here else [""] * 4
        lines.append(row_of(*cells))
    return [*lines, ""]


def earlier() -> list[str]:
    """Shapes that the last run of an op did not time beside fla: which run did, and what ours takes since."""
    told = []
    for op, phase in itertools.product(RATIOS, PHASES):
        for ours, theirs in pairs(op, phase):
            if not theirs["earlier"]:
                continue
            since = alone_since(op, phase, ours)
            later = f", ours alone since {since['ms']:.3f} ms in {made(since)}" if since else ""
            told.append(f"`{op}` {PHASES[phase]} at {size(ours['shape'])} {made(ours)}{later}")
    return [f"§ The last run that timed both there: {'; '.join(told)}.", ""] if told else []


def misses() -> list[str]:
    """Goals that are missed: by how much, why, and what other launches took where they were tried."""
    lines = head("missed", "by", "what bounds it, what was tried")
    for phase in PHASES:
        for op in RATIOS:
            found = [
                (f"{size(ours['shape'])} {by:.0%}", ours["shape"])
                for ours, theirs in pairs(op, phase)
                if (by := goal_of(op, phase, ours["shape"]).missed_by(ours["ms"], theirs["ms"]))
            ]
            if found:
                name = f"{op}_step" if phase.startswith("decode") else op
                cause = CAUSES.get((op, phase), "not looked into")
                tried = " ".join(text for _, shape in found if (text := launches(op, phase, shape)))
                parts = ", ".join(text for text, _ in found)
                lines.append(row_of(f"`{name}` {PHASES[phase]}", parts, f"{cause} {tried}".strip()))
    return lines


def launches(op: str, phase: str, shape: dict[str, int]) -> str:
    """What `misses_check.py` found at this shape: the kernels as they are set, and the best other launch."""
    if not (RESULTS / "evidence-misses.jsonl").exists():
        return ""
    op = TIMED_AS.get(op, op)
    alike = [
        row
        for row in rows_of("evidence-misses")
        if (row["op"], row["phase"]) == (op, phase)
        and all(row["shape"].get(letter) == value for letter, value in shape.items())
    ]
    mine = [row for row in alike if alike and row["run"] == alike[-1]["run"]]
    ours = [row for row in mine if row["tried"] == "as set"]
    others = [row for row in mine if row["tried"] != "as set"]
    if not ours or not others:
        return ""
    parts = sorted(ours[0]["kernels_ms"].items(), key=lambda pair: -pair[1])
    names = ", ".join(
        f"{name.removeprefix(f'_{op}_').removesuffix('_kernel')} {ms:.3f}" for name, ms in parts
    )
    best = min(others, key=lambda row: row["ms"])
    apart = f" ({names})" if names else ""
    return (
        f"{size(shape)} on the device: {ours[0]['ms']:.4f} ms{apart}; best of {len(others)} other launches "
        f"{best['ms']:.4f} ({best['tried']})."
    )


def rivals() -> str:
    told = []
    for op in RATIOS:
        found = {phase: run_of(op, phase) for phase in ("fwd", "fwdbwd", "decode_graph")}
        names = {phase: made(rows[0]) for phase, rows in found.items() if rows}
        if len(set(names.values())) == 1:
            told.append(f"`{op}` {next(iter(names.values()))}")
        else:
            told += [f"`{op}` {PHASES[phase]} {name}" for phase, name in names.items()]
    return "\n".join([
        f"Runs: {', '.join(told)}.", "", *table(), "", *earlier(), *step_table(), "", *apart(), *misses(), "",
        *lasting(), *other_decays(),
        "Seconds of a first call, fla's with its tuning; \"warm\": these kernels had run before;",
        "¶ before `6729b7b0ef94`, when ours were compiled one after the other ([of now](#the-first-call)).", "",
        *first_calls(),
    ])  # fmt: skip


def layer_step() -> str:
    """A decode step of a whole layer, by the chain that computes it."""
    rows = [row for row in rows_of("evidence-layer-step") if "K=128" in row["case"]]
    ms = {(row["case"].split()[0].removeprefix("B="), row["tried"]): row["ms"] for row in rows}
    lines = head(
        "batch", "Heddle", "of floor", "fla, a convolution", "ratio", "fla, three", "ratio", "Heddle's ops in a row"
    )  # fmt: skip
    # heddle/kernels/configs/gated_delta_layer.py
    for batch, launch in (
        ("1", "128 columns, 4 warps"),
        ("32", "64 columns, 2 warps"),
        ("256", "64 columns, 2 warps"),
    ):
        ours = ms[batch, launch]
        cells = [batch, f"{ours:.4f}", f"{ms[batch, 'floor'] / ours:.0%}"]
        for chain in ("fla, one convolution", "fla"):
            ratio = f"{ms[batch, chain] / ours:.2f}"
            cells += [
                f"{ms[batch, chain]:.4f}",
                f"**{ratio}**" if ms[batch, chain] >= 1.5 * ours else ratio,
            ]
        lines.append(row_of(*cells, f"{ms[batch, 'heddle, one op after the other']:.4f}"))
    return "\n".join(lines)


def lla() -> str:
    """Local linear attention beside fla's softmax attention; the floor is that of softmax attention's two products."""
    rows = [row for row in rows_of("evidence-lla") if row.get("run") == "b6e9ec2c"]
    most = max(row["tflops"] or 0.0 for row in rows if row["phase"] == "ceiling")
    lines = head("", "B × T", "forward", "of softmax's floor", "forward + backward")
    timed = {(row["impl"], row["phase"], size(row["shape"])): row for row in rows if "B" in row["shape"]}
    for (impl, phase, shape), row in timed.items():
        if phase == "fwd" and "Launch" not in impl:
            back = timed.get((impl, "fwdbwd", shape))
            cells = [impl, shape, f"{row['ms']:.2f}", f"{row['tflops'] / most:.0%}"]
            lines.append(row_of(*cells, f"{back['ms']:.1f}" if back else ""))
    return "\n".join(lines)


BLOCKS: dict[str, Callable[[], str]] = {"rivals": rivals, "layer step": layer_step, "lla": lla}


def written(page: str) -> str:
    """The page with all blocks as the rows say."""
    for name, text in BLOCKS.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, _, rest = page.partition(begin)
        _, closed, after = rest.partition(end)
        assert closed, f"no place for {name}"
        page = f"{before}{begin}\n\n{text()}\n\n{end}{after}"
    return page


def main() -> int:
    return write_page(__doc__, written)


if __name__ == "__main__":
    sys.exit(main())
