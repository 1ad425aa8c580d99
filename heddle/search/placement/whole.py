"""Which placement a search tries next where the numbers of layers are open too: the solver chooses both.

Left to a sampler, the numbers are drawn one trial after the other, and most of them cannot hold the best placement: most
layers of the slow kind that fit a latency budget are a matter of the budget, which the solver knows and the sampler has to learn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heddle.errors import HeddleError
from heddle.search.placement.counts import Array
from heddle.search.placement.history import History, Seen
from heddle.search.placement.limits import CountLimit, Timed, count_limits
from heddle.search.placement.problem import Problem, count_budget
from heddle.search.placement.proposals import DRAWS, Layers
from heddle.search.placement.quality import QualityModel
from heddle.search.placement.table import Gate, Table

# Settings of the other parameters that a draw is solved for, the worthiest in it, and how far down each ranking is looked.
SETTINGS, DEPTH = 4, 64


@dataclass(frozen=True, slots=True)
class WholeQuestion:
    """What is open: layers of `kinds`, so many of each as `ranges` lets there be (least, most).

    `settings` are values of the other parameters to choose from, as labels by name. `is_seen(place, layers)` says whether the
    spec of the setting at that place with these layers was asked for before. `timed` are the trials of this run that were timed.
    """

    kinds: Layers
    length: int
    # None above `length`.
    ranges: Mapping[str, tuple[int, int]]
    settings: Sequence[Mapping[str, Any]]
    is_seen: Callable[[int, Layers], bool]
    timed: Sequence[Timed] = ()


@dataclass(frozen=True, slots=True)
class _Found:
    worth: float
    setting: int
    layers: Layers


def propose_whole(
    question: WholeQuestion, history: Sequence[Seen], *, seed: int, number: int
) -> tuple[int, Layers] | None:
    """The place of a setting, and the layers of trial `number` with it: the same for equal arguments.

    A landscape drawn from what the history says of layers and of parameters (Thompson sampling, as in `propose`), maximised
    exactly over placements, their numbers of layers and settings, within the latency budgets as predicted. None where no new
    spec is found, or the table of the solver would be too large.
    """
    rng = np.random.default_rng([seed, number, 1])
    model = QualityModel(question.kinds, question.length, History.of(history))
    try:
        solver = _Solver(question)
        for draw in range(DRAWS):
            landscape, values = model.draw_all(rng)
            depth = DEPTH if draw == DRAWS - 1 else 1
            found = max(solver.best(landscape, values, depth), key=lambda one: one.worth, default=None)
            if found is not None:
                return found.setting, found.layers
    except HeddleError:
        # So many kinds that their counts make too large a table.
        return None
    return None


class _Solver:
    """The table's budgets count layers; its gate says which numbers may come out at the last of them."""

    def __init__(self, question: WholeQuestion) -> None:
        self.question = question
        self.ranges = [question.ranges[kind] for kind in question.kinds]
        shape = (question.length, len(question.kinds))
        # The number of the last kind follows from the others'.
        self.counts = tuple(
            count_budget(kind, shape, most, least) for kind, (least, most) in enumerate(self.ranges[:-1])
        )
        self._gates: dict[int, Gate] = {}

    def best(
        self, landscape: tuple[Array, Array], values: Mapping[tuple[str, str], float], depth: int
    ) -> Iterator[_Found]:
        """For each of the worthiest settings the best placement that is new, if it is among the first `depth`."""
        unary, pair = landscape
        problem = Problem(unary, pair[None], self.counts)
        worth = [
            sum(values.get((name, repr(value)), 0.0) for name, value in setting.items())
            for setting in self.question.settings
        ]
        for place in sorted(range(len(worth)), key=lambda one: -worth[one])[:SETTINGS]:
            table = Table(problem, bound=False, gate=self._gate(place))
            for ranked in islice(table.ranked(), depth):
                layers = tuple(self.question.kinds[kind] for kind in ranked)
                if not self.question.is_seen(place, layers):
                    yield _Found(worth[place] + float(problem.value(ranked)), place, layers)
                    break

    def _gate(self, place: int) -> Gate:
        """Lets a kind stand at the last layer where all numbers then keep their ranges and the budgets."""
        if place not in self._gates:
            asked, params = self.question, self.question.settings[place]
            limits = count_limits(asked.timed, asked.kinds, asked.length, params)
            masks = [self._allowed(kind, limits) for kind in range(len(asked.kinds))]
            free = np.ones_like(masks[0])

            def gate(layer: int, kind: int) -> NDArray[np.bool_]:
                return masks[kind] if layer == asked.length - 1 else free

            self._gates[place] = gate
        return self._gates[place]

    def _allowed(self, kind: int, limits: Sequence[CountLimit]) -> NDArray[np.bool_]:
        """For so many layers left of each kind but the last, whether `kind` may be the last layer."""
        left = np.indices([most + 1 for _, most in self.ranges[:-1]])
        used = np.array([most for _, most in self.ranges[:-1]]).reshape(-1, *[1] * (left.ndim - 1)) - left
        last = self.question.length - 1 - used.sum(axis=0)
        numbers = np.concatenate([used, last[None]])
        numbers[kind] += 1
        allowed = np.ones(last.shape, dtype=np.bool_)
        for number, (least, most) in zip(numbers, self.ranges, strict=True):
            allowed &= (number >= least) & (number <= most)
        for limit in limits:
            allowed &= limit.constant + np.tensordot(limit.each, numbers, axes=1) <= 1.0
        return allowed
