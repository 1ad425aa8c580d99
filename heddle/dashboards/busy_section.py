"""The section about workers and GPUs: who is busy with what now, and how long each GPU was."""

from __future__ import annotations

from heddle.dashboards import data
from heddle.dashboards.busy import Busy, Flying
from heddle.dashboards.frame import url
from heddle.dashboards.html import Html, element, join, table
from heddle.dashboards.sections import note, section
from heddle.search.record import REFERENCE, Run

# As in `heddle.search.evaluations`, whose import brings Ray.
LATENCY = "latency"


def facts(found: Busy) -> list[tuple[str, object]]:
    """How many workers and GPUs are busy, for tiles."""
    count = len(found.flying)
    told: list[tuple[str, object]] = [
        ("workers busy", count if found.workers is None else f"{count} of {found.workers}")
    ]
    return told + ([("GPUs busy", f"{len(found.busy_gpus)} of {found.gpus}")] if found.gpus else [])


def busy_section(run: Run, key: str, found: Busy) -> Html | None:
    """What runs now, and how long each GPU was busy; nothing of a search on a CPU that has ended."""
    parts = [_flying(run, key, found), _gpus(found)]
    held = [part for part in parts if part is not None]
    return section("Workers", *held) if held else None


def _flying(run: Run, key: str, found: Busy) -> Html | None:
    if not found.flying:
        return None
    known = {trial.number: trial for trial in data.with_reference(run)}
    rows = []
    for one in sorted(found.flying.values(), key=lambda one: one.began):
        trial = known.get(one.number)
        name = f"trial {one.number}" if trial is None else data.name_of(trial, run)
        what = "timing" if one.stage == LATENCY else one.stage
        link = element("a", name, href=url(key, "trial", one.number)) if one.number >= REFERENCE else name
        rows.append([link, what, one.began[:19].replace("T", " "), *([_names(one)] if found.gpus else [])])
    return table(["Spec", "Evaluation", "Since (UTC)", *(["GPU"] if found.gpus else [])], rows)


def _names(one: Flying) -> str:
    return ", ".join(f"{node} GPU {gpu}" for node, gpu in one.gpus) or "not told yet"


def _gpus(found: Busy) -> Html | None:
    if not found.gpus or not found.spent_s:
        return None
    now = found.busy_gpus
    rows = [
        [f"{node} GPU {index}", "busy" if (node, index) in now else "idle", f"{100 * found.share((node, index)):.0f} %"]
        for node, index in sorted(found.spent_s)
    ]  # fmt: skip
    never = found.gpus - len(rows)
    told = note(f"{never} of {found.gpus} GPUs took no evaluation yet.") if never > 0 else ""
    how = note("Busy: at least one evaluation is on it, which says nothing of how much of it that uses.")
    return join([how, table(["GPU", "Now", "Busy in this session"], rows, numeric=(2,)), told])
