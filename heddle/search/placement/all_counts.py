"""What may be hoped most of where the counts are open too: the placements of all counts side by side.

Without latency budgets one table holds all counts, since how many layers of each kind are left says where to begin in it. Where
enough of the best placements with some counts keep the budgets, those are the answer; where even the cheapest does not, there is
none. Only counts in between need a table of their own, with the budgets in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from heddle.search.placement.foremost import best_within
from heddle.search.placement.grid import Whole
from heddle.search.placement.history import History
from heddle.search.placement.near_best import near_best
from heddle.search.placement.problem import Budget, Problem, count_budget
from heddle.search.placement.proposals import (
    CELLS,
    Layers,
    Question,
    Region,
    cheapness,
    in_order,
    is_over,
    latency_limits,
    likely,
    region_of,
    window_of,
)
from heddle.search.placement.table import Table


def most_hoped(questions: Sequence[Question], history: History, candidates: int) -> Layers | None:
    """The new placement within the latency budgets of which most may be hoped, among so many of each question that most is
    expected of. The questions differ in their counts alone.

    None while there are too few trials to tell, or where no such placement is left among those looked at.
    """
    placed, hoped = list[tuple[Question, Whole]](), [np.zeros(0)]
    for mine in _alike(questions):
        near = near_best(history, mine[0].kinds, window_of(mine[0]))
        if near is None:
            return None
        found = _expected_most(mine, near.landscape.mean(), candidates)
        rows = [(question, row) for question, some in zip(mine, found, strict=True) for row in some]
        if rows:
            placed += rows
            hoped.append(near.hoped(np.stack([row for _, row in rows]), mine[0].params, mine[0].asked))
    for place in in_order(np.concatenate(hoped)):
        question, row = placed[place]
        layers = tuple(question.kinds[kind] for kind in row)
        if not question.is_seen(layers):
            return layers
    return None


def _alike(questions: Sequence[Question]) -> list[list[Question]]:
    """The questions that one landscape answers, for the same parameters: large tables know closer pairs alone."""
    found = dict[Any, list[Question]]()
    for one in questions:
        found.setdefault((window_of(one), repr(sorted(one.params.items()))), []).append(one)
    return list(found.values())


def _expected_most(questions: Sequence[Question], drawn: Problem, candidates: int) -> list[Whole]:
    """Of each question the placements within its latency budgets that most is expected of: [at most `candidates`, L] each."""
    regions = [region_of(question, latency_limits(question)) for question in questions]
    table, least = _all_counts(questions, drawn), Least(questions)
    found = [np.zeros((0, drawn.length), dtype=np.int64)] * len(questions)
    can = [place for place, region in enumerate(regions) if not least.is_over(region)]
    both = [place for place in can if regions[place].gate is None and table is not None]
    if table is not None and both:
        starts, limits = _counts(questions)[both], [regions[place].limits for place in both]
        for place, (rows, is_all) in zip(both, best_within(table, starts, limits, candidates), strict=True):
            region = regions[place]
            found[place] = rows if is_all else region.likely(region.widest(drawn), candidates)[0]
    for place in set(can) - set(both):
        found[place] = likely(regions[place], drawn, candidates)
    return found


class Least:
    """What the cheapest placement costs, from one table of all counts for each budget that differs in more than its constant."""

    def __init__(self, questions: Sequence[Question]) -> None:
        self._questions, self._tables = questions, dict[tuple[bytes, bytes], Table | None]()

    def is_over(self, region: Region) -> bool:
        """Whether every placement is over one of the limits of a region for certain."""
        (left,) = _counts([region.question])
        tables = ((budget, self._table(budget)) for budget in region.limits)
        return any(table is not None and is_over(budget, table.at(tuple(left))) for budget, table in tables)

    def _table(self, budget: Budget) -> Table | None:
        drawn = cheapness(budget)
        key = drawn.unary.tobytes(), b"" if drawn.pair is None else drawn.pair.tobytes()
        if key not in self._tables:
            self._tables[key] = _all_counts(self._questions, drawn)
        return self._tables[key]


def _counts(questions: Sequence[Question]) -> Whole:
    """How many layers of each kind there are but the last, of which those that are left follow: [questions, kinds - 1]."""
    return np.array([list(one.counts.values())[:-1] for one in questions], dtype=np.int64)


def _all_counts(questions: Sequence[Question], drawn: Problem) -> Table | None:
    """A table for all counts, which begin in it with as many layers left as they have; None where it is too large."""
    most = _counts(questions).max(axis=0)
    cells = (drawn.length + 1) * float(drawn.kinds) ** drawn.window * float(np.prod(most + 1.0))
    if cells > CELLS:
        return None
    shape = drawn.length, drawn.kinds
    budgets = (count_budget(kind, shape, int(count), int(count)) for kind, count in enumerate(most))
    return Table(Problem(drawn.unary, drawn.pair, tuple(budgets)))
