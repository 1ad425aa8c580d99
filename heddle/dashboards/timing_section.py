"""The report's section on how far its timings, and what is predicted from them alone, are to be believed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from heddle.dashboards.html import Html, element
from heddle.search.expected_latency import left_out_errors
from heddle.search.timing_quality import from_data, quality_of

if TYPE_CHECKING:
    from heddle.search.record import Run


def timings(run: Run) -> Html | None:
    """The section; None where nothing was timed."""
    lines = [*timing_lines(run), *left_out_lines(run)]
    if not lines:
        return None
    return element(
        "section", element("h2", "How good the timings are"), *(element("p", one) for one in lines)
    )


def timing_lines(run: Run) -> list[str]:
    """Widths of the intervals and disturbances: of the run, those of its end among them, and of its latency model's fits."""
    everyone = [*run.trials, *([run.reference] if run.reference else [])]
    # Specs that were asked for twice were timed once.
    timed = {
        (one.hash, label, when): row
        for one in everyone
        for when, rows in enumerate((one.latency, one.remeasured))
        for label, row in rows.items()
    }
    own = quality_of(list(timed.values()))
    lines = [] if own is None else [f"Timings of the run: {'; '.join(own.told)}."]
    for fit in run.meta.get("latency_model", []):
        held = from_data(fit.get("timings"))
        lines += [] if held is None else [f"Timings of the fit, {fit['label']}: {'; '.join(held.told)}."]
    return lines


def left_out_lines(run: Run) -> list[str]:
    """How far the line that placements are proposed by was off for specs that it was not fitted on."""
    return [
        f"Proposals predict {one.label} from the run's own timings. Each of {one.n} specs predicted from the others: MAPE "
        f"{100 * one.mape:.1f} %, Spearman {one.spearman:.3f}. They are what the search chose, not random ones."
        for one in left_out_errors(run)
    ]
