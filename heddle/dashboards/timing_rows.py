"""Timings as rows of a report's tables: those of the front taken again, and every one with how it was taken."""

from __future__ import annotations

from heddle.dashboards import data, words
from heddle.search.record import Latency, Run, Trial

HEADER = [
    "Spec",
    "Measurement",
    "Median [95 %]",
    "Ratio [95 %]",
    "Peak memory",
    "Turns",
    "Method",
    "dtype",
    "Paths",
]
AGAIN_HEADER = [
    "Spec",
    "Measurement",
    "In the search",
    "At the end",
    "Ratio in the search",
    "Ratio at the end",
    "Peak memory",
    "Budget",
]


def row(trial: Trial, seen: Latency, run: Run) -> list[object]:
    """One timing, under `HEADER`."""
    paths = ", ".join(f"{kind}: {path}" for kind, path in seen.paths.items())
    measured = (words.latency_text(seen), words.ratio_text(seen), words.peak_text(seen))
    return [
        data.name_of(trial, run),
        seen.label,
        *measured,
        seen.n,
        words.method_text(seen),
        seen.dtype,
        paths,
    ]


def again_rows(run: Run) -> list[list[object]]:
    """The second timings of the front beside the first, under `AGAIN_HEADER`."""
    rows: list[list[object]] = []
    for trial in run.front_trials:
        for label, again in trial.remeasured.items():
            before = trial.latency.get(label)
            first = "–" if before is None else words.latency_text(before)
            ratio = "–" if before is None else words.ratio_text(before)
            times = (first, words.latency_text(again), ratio, words.ratio_text(again))
            name = data.name_of(trial, run)
            rows.append([name, label, *times, words.peak_text(again), _kept(run, label, again)])
    return rows


def _kept(run: Run, label: str, seen: Latency) -> str:
    """Whether the budgets that go by this timing are kept; of several, those that are not."""
    budgets = [budget for budget in run.budgets if budget.is_measured and budget.timing == label]
    values = {words.budget_name(budget): (budget.limited(seen), budget.at_most) for budget in budgets}
    known = {name: value > most for name, (value, most) in values.items() if value is not None}
    if not known:
        return "–" if values else "none"
    broken = [name for name, is_over in known.items() if is_over]
    if not broken:
        return "kept"
    return "broken" if len(known) == 1 else f"broken: {', '.join(broken)}"
