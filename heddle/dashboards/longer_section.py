"""What a report says of the best trials trained for longer: whether the ranking of the search holds."""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING

from heddle.dashboards import words
from heddle.dashboards.html import Html, element, table
from heddle.dashboards.sections import note, section

if TYPE_CHECKING:
    from heddle.search.longer_results import LongerRow
    from heddle.search.record import Run, TaskInfo

SAID = (
    "Trained anew with seeds new to the search, at every learning rate of a task, the best of which counts; nothing of it "
    "changes the winner. A reverse has the same layers the other way round: it was never timed, and may be over a budget."
)


def rows(run: Run) -> list[list[object]]:
    """A row for each trial in the order of the search, each followed by its reverse."""
    longer = run.longer
    if longer is None:
        return []
    place = {row.number: at for at, row in enumerate(longer.ranked(), 1)}
    found: list[list[object]] = []
    before = 0
    for row in longer.rows:
        before += not row.is_reversed
        places = ["–", "–"] if row.is_reversed else [before, place.get(row.number, "failed")]
        star = " ★ winner" if row.number == longer.number and not row.is_reversed else ""
        scores = ["–" if one is None else f"{one:.4f}" for one in (row.before, row.quality)]
        tasks = [_values(row, task) for task in run.tasks]
        found.append([f"{row.name}{star}", words.short_layers(row.layers), *places, *scores, *tasks])
    return found


def _values(row: LongerRow, task: TaskInfo) -> str:
    """The mean over seeds, from least to most where there are several, and the best of several learning rates."""
    values = row.values.get(task.name, ())
    if not values:
        return "failed"
    least, most = (words.value_text(task.metric, one) for one in (min(values), max(values)))
    spread = f" ({least} to {most})" if len(values) > 1 else ""
    return f"{words.value_text(task.metric, fmean(values))}{spread} at {row.learning_rates[task.name]:g}"


def longer(run: Run) -> Html | None:
    """The section; nothing where the spec asks for no longer training."""
    if run.longer is None:
        return None
    header = ["Spec", "Layers", "Place in the search", "Place after", "Score in the search", "Score after"]
    header += [task.name for task in run.tasks]
    told = [element("p", line) for line in words.longer_texts(run.longer)]
    shown = table(header, rows(run), numeric=range(2, len(header)))
    return section("The best, trained for longer", note(SAID), *told, shown)
