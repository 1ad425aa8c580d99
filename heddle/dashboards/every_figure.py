"""Every plot of a run: those of its report, of its pages, and of its winner."""

from __future__ import annotations

from math import ceil

from heddle.dashboards import data, latency_section, model_figures
from heddle.dashboards.block_times import block_times, stacked
from heddle.dashboards.figures import Figure, figures, progress, twice
from heddle.dashboards.site import Watched
from heddle.errors import HeddleError
from heddle.search.costs import layer_costs
from heddle.search.placement_terms import placement_terms
from heddle.search.record import Run, Trial

# The share of trained trials that counts as best.
BEST_SHARE = 0.1


def every_figure(run: Run) -> list[Figure]:
    """All that have something to show."""
    return [figure for _, drawn in grouped(run) for figure in drawn]


def grouped(run: Run) -> list[tuple[str, list[Figure]]]:
    """All that have something to show, under the headings that the pages have."""
    learnt = placement_terms(run)
    groups = [
        ("Plots", [*figures(run), progress(run, "time"), progress(run, "device")]),
        ("Mixer at each layer", placements(run)),
        ("What the placement model has learnt", [] if learnt is None else model_figures.terms(learnt)),
        ("Measured against predicted", [*latency_section.unseen(run), *latency_section.scatter(run)]),
        ("The front timed twice", twice(run)),
        ("The winner", [] if run.best_trial is None else _winner(run, run.best_trial)),
    ]  # fmt: skip
    shown = [(title, [one for one in drawn if not one.is_empty]) for title, drawn in groups]
    return [(title, drawn) for title, drawn in shown if drawn]


def best_placed(run: Run) -> list[Trial]:
    """The best of the trained trials, from the best down."""
    trained = sorted((t for t in run.trials if t.quality is not None), key=lambda t: -(t.quality or 0.0))
    return trained[: ceil(BEST_SHARE * len(trained))]


def placements(run: Run) -> list[Figure]:
    """Which mixer stands at which layer, of the best and of all; none before a trial was trained."""
    best = best_placed(run)
    if not best:
        return []
    mixers = data.mixers_of(run)
    count = sum(trial.quality is not None for trial in run.trials)
    said = f"the best {len(best)} of {count} trained trials, by mean normalised score"
    return [
        model_figures.placement(said, "best", [mixers(trial) for trial in best]),
        model_figures.placement(f"all {len(run.trials)} trials", "all", [mixers(trial) for trial in run.trials]),
    ]  # fmt: skip


def place_of(run: Run) -> tuple[int, int]:
    """The context and batch at which costs are counted: those of the first budget that has some."""
    budget = next((one for one in run.budgets if one.context), None)
    return (budget.context, budget.batch) if budget else (4096, 1)


def _winner(run: Run, best: Trial) -> list[Figure]:
    """What its layers cost, how long its blocks and all of it took, how it was trained."""
    context, batch = place_of(run)
    found = [*_times(run, best), *model_figures.timings(best)]
    found += model_figures.curves([(data.name_of(best, run), best)])
    try:
        layers = layer_costs(best.spec, context=context, batch=batch)
    except HeddleError:
        # Written by another heddle, perhaps.
        return found
    return [*model_figures.costs(layers, context, batch), *found]


def _times(run: Run, best: Trial) -> list[Figure]:
    """The predicted times of its blocks; none where the run has no latency model, or one that cannot be read."""
    try:
        return stacked(block_times(Watched(run.name, run.path), run, best))
    except (HeddleError, ValueError, KeyError, TypeError):
        return []
