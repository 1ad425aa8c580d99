"""Every plot of a run: those of its report, of its pages, and of its winner."""

from __future__ import annotations

from math import ceil

from heddle.dashboards import data, latency_section, model_figures
from heddle.dashboards.figures import Figure, figures, progress, twice
from heddle.errors import HeddleError
from heddle.search.costs import layer_costs
from heddle.search.placement_terms import placement_terms
from heddle.search.record import Run, Trial

# The share of trained trials that counts as best.
BEST_SHARE = 0.1


def every_figure(run: Run) -> list[Figure]:
    """All that have something to show."""
    found = [*figures(run), progress(run, "time"), progress(run, "device"), *placements(run)]
    learnt = placement_terms(run)
    found += [] if learnt is None else model_figures.terms(learnt)
    found += [*latency_section.unseen(run), *latency_section.scatter(run), *twice(run)]
    found += [] if run.best_trial is None else _winner(run, run.best_trial)
    return [figure for figure in found if not figure.is_empty]


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
    """What its layers cost, how long it took, how it was trained."""
    found = [*model_figures.timings(best), *model_figures.curves([(data.name_of(best, run), best)])]
    context, batch = place_of(run)
    try:
        layers = layer_costs(best.spec, context=context, batch=batch)
    except HeddleError:
        # Written by another heddle, perhaps.
        return found
    return [*model_figures.costs(layers, context, batch), *found]
