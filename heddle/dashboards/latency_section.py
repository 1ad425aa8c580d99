"""The report's section on predicted latencies: how good the model was, and what came of going by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from heddle.dashboards import data
from heddle.dashboards.axes import axes
from heddle.dashboards.figures import FRONT, SCORED, Figure, equal, escape, layout, points, slug, thinned
from heddle.dashboards.html import Html, element
from heddle.search import changed_software
from heddle.search.curse import Curse, compared, counted, curses, predicted, summary
from heddle.search.expected_latency import expected_latencies
from heddle.search.latency_model import told

if TYPE_CHECKING:
    from heddle.search.record import Run


def rows_of_fits(run: Run) -> list[list[object]]:
    """A row for each fit: where, how, and its errors on stacks it had not seen."""
    rows: list[list[object]] = []
    for fit in run.meta.get("latency_model", []):
        unseen = fit["held_out"]
        margin = "none" if unseen["margin"] is None else percent(unseen["margin"])
        errors = [percent(unseen[name]) for name in ("mape", "worst", "constant_mape", "flops_mape")]
        bias = [percent(unseen["bias"], sign=True), _near(unseen)]
        order = f"{unseen['spearman']:.3f}"
        rows.append([fit["label"], fit["method"], unseen["n"], *errors, *bias, order, margin])
    return rows


def _near(unseen: Mapping[str, Any]) -> str:
    """The bias near the budget, and of how many stacks; a dash where they are too few to say."""
    return f"{percent(unseen['bias_near_budget'], sign=True)} ({unseen['near_budget']})"


FIT_HEADER = [
    "Measurement",
    "Timed by",
    "Held out",
    "MAPE",
    "Worst",
    "MAPE of a constant",
    "MAPE of FLOPs",
    "Bias",
    "Bias near the budget (stacks)",
    "Spearman",
    "Margin",
]
OTHER = SCORED
MEMBER = {"symbol": "circle", "size": 9, "color": FRONT}
FRONT_HEADER = ["Spec", "Measurement", "Predicted", "Measured again", "Error"]


def front_rows(run: Run) -> list[list[object]]:
    """Predicted beside measured again, a row for each member of the front and budget."""
    rows: list[list[object]] = []
    for one in compared(run):
        least = one.predicted.least
        margin = "" if least is None else f" ± {one.predicted.limited - least:.3f}"
        name = data.name_of(run.trial(one.number), run)
        said = f"{one.predicted.limited:.3f}{margin}"
        rows.append([name, one.label, said, f"{one.measured:.3f}", percent(one.error, sign=True)])
    return rows


def expected_rows(run: Run) -> list[list[object]]:
    """The same of runs that went by no latency model: what the other timings of the run say, beside measured again."""
    rows: list[list[object]] = []
    for number, expected in expected_latencies(run).items():
        trial = run.trial(number)
        for budget in run.budgets:
            again, value = trial.remeasured.get(budget.timing), expected.get(budget.label)
            measured = None if again is None else counted(again, budget)
            if predicted(trial, budget) is None and value is not None and measured is not None:
                name = data.name_of(trial, run) + (" ★ winner" if number == run.best else "")
                error = percent(measured / value - 1, sign=True)
                rows.append([name, budget.label, f"{value:.3f}", f"{measured:.3f}", error])
    return rows


def sentences(run: Run) -> list[str]:
    """What the search did by predictions alone, and the winner's curse."""
    found = summary(run)
    if found is None:
        return []
    never, changed = found["never_timed"], run.meta.get("latency_changed", {})
    first = f"{never} specs were over a budget by more than the margin, by prediction: they were never timed, nor trained."
    lines = [f"{doubt[0].upper()}{doubt[1:]}." for doubt in told.doubts(run.meta.get("latency_model", []))]
    lines += [first] if never or not changed else []
    if changed:
        lines += _software(changed, run.meta.get("latency_sentinels", {}))
    return [*lines, *map(_curse, curses(run))]


def _software(changed: Mapping[str, Sequence[Any]], judged: Mapping[str, Any]) -> list[str]:
    """What the model was worth with other software than it was fitted with."""
    places = changed_software.places_of(judged)
    which = "" if not any(one["trusted"] for one in places) else " where it was not trusted"
    did = "was trusted" if changed_software.is_trusted(judged) else f"ruled nothing out{which}"
    first = (
        f"With other software than it was fitted with ({changed_software.names(changed)}) the model {did}."
    )
    return [first, *(f"{changed_software.place_told(one)}." for one in places)]


def _curse(one: Curse) -> str:
    """The errors of the selected beside those of the others."""
    parts = [
        f"the front {percent(one.selected, sign=True)} ({one.n_selected} specs)",
        f"other timed specs {percent(one.others, sign=True)} ({one.n_others})",
        f"the model's held-out stacks {percent(one.held_out, sign=True)}",
    ]
    return f"{one.label}, measured over predicted in the mean: {', '.join(parts)}."


def percent(value: float | None, *, sign: bool = False) -> str:
    """A share in percent, or a dash."""
    if value is None:
        return "–"
    return f"{100 * value:+.1f} %" if sign else f"{100 * value:.1f} %"


def paragraphs(run: Run) -> list[Html]:
    """The sentences as HTML."""
    return [element("p", line) for line in sentences(run)]


def unseen(run: Run) -> list[Figure]:
    """Of the stacks that a latency model was checked on what it predicted against what was measured, one plot a fit."""
    found = []
    for fit in run.meta.get("latency_model", []):
        pairs, label = fit["held_out"].get("pairs", []), escape(fit["label"])
        x, y = [ms for ms, _ in pairs], [ms for _, ms in pairs]
        dots: dict[str, Any] = {
            "type": "scatter",
            "mode": "markers",
            "name": "held-out stack",
            "marker": OTHER,
            "x": x,
            "y": y,
        }
        dots["hovertemplate"] = "predicted %{x:.4g} ms, measured %{y:.4g} ms<extra></extra>"
        said = f"{label}: measured against predicted, of {len(pairs)} stacks that the fit had not seen"
        drawn = layout("ms predicted", "ms measured")
        found.append(Figure(slug(f"held out {label}"), said, [equal([*x, *y]), dots] if pairs else [], drawn))
    return found


def scatter(run: Run) -> list[Figure]:
    """What was measured of each timed trial against what was predicted of it, one plot a budget."""
    found = []
    for budget in run.budgets:
        axis = next(one for one in axes(run) if one.budget == budget)
        timed = [
            (predicted(trial, budget), axis.value(trial), trial) for trial in run.trials if trial.latency
        ]
        known = [
            (figure.limited, value, trial) for figure, value, trial in timed if figure and value is not None
        ]
        if not known:
            continue
        members = set(run.front)
        traces = [equal([x for x, *_ in known] + [y for _, y, _ in known])]
        for name, chosen, look in (
            ("other trials", thinned([one for one in known if one[2].number not in members]), OTHER),
            ("Pareto front", [trial for *_, trial in known if trial.number in members], MEMBER),
        ):
            at = {trial.number: (x, y) for x, y, trial in known}
            xs, ys = ([at[trial.number][side] for trial in chosen] for side in (0, 1))
            traces.append(points(name, chosen, run, xs, ys) | {"marker": look})
        drawn = layout(f"predicted, {axis.label}", f"measured, {axis.label}")
        said = f"{axis.plain}: measured against predicted, of the trials of the search"
        found.append(Figure(slug(f"predicted {budget.label}"), said, traces, drawn))
    return found
