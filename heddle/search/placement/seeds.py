"""How many layers of each block a trial gets where the solver says so: the counts that it puts to Optuna as seeds.

First come simple placements at the costliest counts that keep the latency budgets, so that what is found is no worse than
they are: the evenly spread one, and blocks one after another, either way round. After that the counts are those whose best new
placement may be hoped most of, over all counts and placements within the budgets. The other trials have counts that Optuna draws,
and all trials the other values that it draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from heddle.search.placement.all_counts import most_hoped
from heddle.search.placement.history import History, Seen
from heddle.search.placement.limits import fit_of
from heddle.search.placement.problem import Budget
from heddle.search.placement.proposals import Layers, Question, keeps, latency_limits, simple

# Trained trials after which simple placements come no more.
SIMPLE = 8
# Of so many trials in a row the last one has the counts that Optuna draws.
EVERY = 2
# Counts that are looked at: of more those closest to the best found.
MOST_COUNTS = 64
# Placements that are looked at of all counts together, and so many of each at least.
MOST_CANDIDATES, LEAST_CANDIDATES = 640, 8


def is_seeded(number: int) -> bool:
    """Whether the solver says how many layers of each block trial `number` gets, once it can tell."""
    return number % EVERY != EVERY - 1


def _with_limits(questions: Sequence[Question]) -> list[Question]:
    """The questions with what their timings predict, which are fitted once for all of them."""
    found, fit = list[Question](), None
    for one in questions:
        fit = fit or fit_of(one.timed, one.kinds)
        known = {budget.name for budget in one.predicted}
        more = (budget for budget in fit.budgets(one.counts, one.params) if budget.name not in known)
        found.append(replace(one, timed=(), predicted=(*one.predicted, *more)))
    return found


def costliest(questions: Sequence[Question]) -> Layers | None:
    """A simple placement at the counts whose simple placements cost most and keep the budgets, if one there is new.

    What they cost is the largest share of a latency budget that is predicted. None without such a prediction.
    """
    most, found = -np.inf, list[Layers]()
    for question in questions:
        limits = latency_limits(question)
        fitting = [one for one in simple(question) if keeps(question, one, limits)] if limits else []
        costs = [_share(question, one, limits) for one in fitting]
        if fitting and max(costs) > most:
            # Of a seed Optuna draws all other values, so that the best one's, by which specs are seen, do not come with it.
            most = max(costs)
            found = [one for one in fitting if not (question.is_seen(one) or question.is_placed(one))]
    return next(iter(found), None)


def _share(question: Question, layers: Layers, limits: Sequence[Budget]) -> float:
    """The largest share of a budget that a placement takes."""
    index = [question.kinds.index(name) for name in layers]
    return max(float(budget.of(index)) / budget.at_most for budget in limits)


def solved(questions: Sequence[Question], history: Sequence[Seen]) -> Layers | None:
    """The placement that a trial is to take, of those of questions that differ in their counts alone.

    The same for equal questions and history. None while nothing is known, or where no placement within the budgets is new.
    """
    questions = _with_limits(questions)
    if len(history) < SIMPLE and (costly := costliest(questions)) is not None:
        return costly
    most = max(LEAST_CANDIDATES, MOST_CANDIDATES // max(1, len(questions)))
    return most_hoped(questions, History.of(history), most)
