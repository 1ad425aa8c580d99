"""What the model that places blocks predicted of the last round, beside what came of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from heddle.dashboards.html import Html, element, table
from heddle.search.expected_quality import TOLERANCE, LastRound, last_round

if TYPE_CHECKING:
    from heddle.search.record import Run


def placements(run: Run) -> Html | None:
    """The section; None where no layers are placed, or too few trials were trained."""
    found = last_round(run)
    if found is None:
        return None
    rows = [[f"trial {number}", f"{told:.4f}", f"{real:.4f}"] for number, told, real in found.pairs]
    header = ["Spec", "Predicted", "Trained"]
    return element(
        "section",
        element("h2", "Predicted placements"),
        *(element("p", one) for one in lines(found)),
        table(header, rows, numeric=(1, 2)),
    )


def lines(found: LastRound) -> list[str]:
    """How far the last round was from its predictions, and whether predicted and real agree about the best."""
    told = (
        f"Round {found.round}, predicted from the rounds before it: off by {found.error:.4f} of the mean normalised score in the "
        f"mean, where all scores span {found.spread:.4f}."
    )
    best = (
        f"The best, trial {found.best}, reached {found.reached_best:.4f}; all other placements predict "
        f"{found.predicted_best:.4f} of it."
    )
    if found.agreed:
        return [
            told,
            f"{best} No placement of its counts is expected to be better: predicted and real agree.",
        ]
    if not found.is_favourite:
        return [
            told,
            f"{best} Another placement of its counts is expected to be better: more trials may find it.",
        ]
    share = f"{100 * TOLERANCE:g} % of that span"
    return [told, f"{best} That is off by more than {share}, so predicted and real do not agree yet."]
