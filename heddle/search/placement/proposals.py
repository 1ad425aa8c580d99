"""Which placement a search tries next.

How many layers each block gets is Optuna's, drawn by it or put to it (`heddle.search.placement.seeds`); where they stand is
decided here, never by L free binaries.

The first placements are simple ones by turns: evenly spread, and blocks one after another. From LEAST finished trials on a
Bayesian linear model of their quality knows each kind at each layer and pairs of layers at their place; of the placements that
it expects most of, exactly solved, the one is taken of which most may be hoped: what is expected, and twice its deviation. They
are looked for near the best placement found so far, and within the latency budgets as far as a latency model, or the timings of
this run, predict them. With fewer trials a simpler model is drawn from (Thompson sampling).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heddle.errors import HeddleError
from heddle.search.placement.foremost import best_within, in_turn
from heddle.search.placement.grid import Whole
from heddle.search.placement.history import History, Seen
from heddle.search.placement.limits import Timed, fit_of
from heddle.search.placement.near_best import LEAST, near_best
from heddle.search.placement.problem import Budget, Problem, count_budget
from heddle.search.placement.quality import QualityModel
from heddle.search.placement.table import MOST_CELLS, Gate, Table
from heddle.specs.order import Order

# Draws from the posterior before the ranking of the last of them is gone down instead.
DRAWS = 16
# Placements that are looked at for what may be hoped of them: those that most is expected of.
CANDIDATES = 128
# Trials without a better one after which the trust region halves.
PATIENCE = 4
# Steps of a latency budget, fewer where the table would have more cells than this.
STEPS, CELLS = 64, 4 * 10**6
# Layers so far apart have a worth together.
WINDOW = 2
# So many times the steps where all placements are gone through, as far as the table has so many cells.
FINER, MOST_FINE = 16, 16 * 10**6
# A cost that is over a budget by less than this share of it may be so by rounding.
ROUNDED = 1e-9
# Digits, to the base 2, of what may be hoped for: what differs beyond them does so by its rounding.
DIGITS = 36

Layers = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Question:
    """What Optuna asked for: how many layers of each block, and what else is set in this trial.

    `uniform` is the evenly spread placement. `is_seen` says whether the spec with these layers was asked for before. `order` is
    what the layers take from each other; where no placement keeps it, none is spared. `timed` are the trials of this run that
    were timed beside latency budgets, those over one among them; `predicted` are those budgets that a latency model predicts,
    which go before what `timed` says of them. `start` is the placement to take where it is new and keeps the budgets
    (`heddle.search.placement.seeds`); `asked` are layers and parameters of trials that are under way. `is_placed` says whether
    any trial had these layers, whatever else was set.
    """

    counts: Mapping[str, int]
    params: Mapping[str, Any]
    uniform: Layers
    is_seen: Callable[[Layers], bool]
    order: Order = field(default_factory=Order)
    timed: Sequence[Timed] = ()
    predicted: Sequence[Budget] = ()
    start: Layers | None = None
    asked: Sequence[tuple[Layers, Mapping[str, Any]]] = ()
    is_placed: Callable[[Layers], bool] = lambda layers: False  # noqa: ARG005

    @property
    def kinds(self) -> Layers:
        return tuple(self.counts)

    @property
    def length(self) -> int:
        return sum(self.counts.values())


class Draws:
    """Landscapes to maximise, each made when it is first asked for: `count` draws of a posterior, or one that is expected."""

    def __init__(self, make: Callable[[], Problem], count: int) -> None:
        self._make, self.count = make, count
        self._made = list[Problem]()

    def __call__(self, number: int) -> Problem:
        while len(self._made) <= number:
            self._made.append(self._make())
        return self._made[number]

    @property
    def last(self) -> Problem:
        return self(self.count - 1)


def _draws(question: Question, history: History, rng: np.random.Generator) -> Draws:
    """The landscapes of trial `number`: the expected one with pairs at their place once there are trials enough."""
    near = near_best(history, question.kinds, window_of(question))
    if near is not None:
        return Draws(near.landscape.mean, 1)
    model = QualityModel(question.kinds, question.length, history)

    def drawn() -> Problem:
        unary, pair = model.draw(rng)
        return Problem(unary, pair[None])

    return Draws(drawn, DRAWS)


@dataclass(frozen=True, slots=True)
class Region:
    """Where a placement is looked for: among those with the counts of a question, within some limits."""

    question: Question
    limits: tuple[Budget, ...]
    gate: Gate | None

    @property
    def budgets(self) -> tuple[Budget, ...]:
        return (*_counted(self.question), *self.limits)

    def table(self, drawn: Problem, *, bound: bool = False) -> Table:
        """The solver's table of a landscape here; with `bound` it reaches what rounding alone puts outside."""
        return Table(replace(drawn, budgets=self.budgets), bound=bound, gate=self.gate)

    def widest(self, drawn: Problem) -> Table:
        """The table with what rounding alone puts outside, or without it where it is too large with it."""
        try:
            return self.table(drawn, bound=True)
        except HeddleError:
            return self.table(drawn)

    def loose(self) -> Region:
        """The region without the budgets whose costs are rounded, which take far fewer cells."""
        return region_of(self.question, [one for one in self.limits if one.steps is None])

    def is_over(self) -> bool:
        """Whether all that is in the loose region is over one of the others for certain."""
        loose, others = self.loose(), [one for one in self.limits if one.steps is not None]
        # Tables are filled when they are asked for.
        tables = ((budget, loose.table(cheapness(budget))) for budget in others)
        return any(is_over(budget, table.at(table.start)) for budget, table in tables)

    def finer(self, window: int) -> Region:
        """The region with up to FINER times the steps, so that fewer placements are within its budgets by rounding alone."""
        rounded = [one.steps for one in self.limits if one.steps is not None]
        sizes = [*rounded, *(one.at_most + 1.0 for one in self.limits if one.steps is None)]
        sizes += [count + 1.0 for count in list(self.question.counts.values())[:-1]]
        cells = float(len(self.question.kinds)) ** window * (self.question.length + 1) * float(np.prod(sizes))
        more = int(min(FINER, max(1.0, (MOST_FINE / cells) ** (1.0 / max(1, len(rounded))))))
        limits = (one if one.steps is None else replace(one, steps=more * one.steps) for one in self.limits)
        return Region(self.question, tuple(limits), self.gate)

    def likely(self, table: Table, candidates: int) -> tuple[Whole, bool]:
        """As `best_within` gives them, of all that is in a table."""
        starts = np.array([table.tops], dtype=np.int64)
        return best_within(table, starts, [self.limits], candidates)[0]

    def named(self, layers: Sequence[int] | Whole) -> Layers:
        kinds = self.question.kinds
        return tuple([kinds[kind] for kind in layers])


def region_of(question: Question, limits: Sequence[Budget]) -> Region:
    """The placements with the counts of a question, in an order that its layers take, within some limits."""
    return Region(question, tuple(limits), _gate(question, limits))


def cheapness(budget: Budget) -> Problem:
    """The landscape on which a placement is worth what it costs less."""
    return Problem(-budget.cost, None if budget.pair is None else -budget.pair[None])


def is_over(budget: Budget, cheapest: float) -> bool:
    """Whether a budget is missed, by more than rounding, where the best of its `cheapness` is this."""
    return bool(budget.excess(budget.constant - cheapest) > ROUNDED)


def propose(question: Question, history: Sequence[Seen], *, seed: int, number: int) -> Layers:
    """The layers of trial `number`: the same for equal (question, history, seed, number).

    Never a spec that was asked for before, while one with these counts and parameters is left; never one that is predicted
    to be over a latency budget, while one that is not is left (unless budgets are so many that they have no table).
    """
    history = History.of(history)
    limits = latency_limits(question)
    for start in _starts(question, history, number):
        if keeps(question, start, limits) and not question.is_seen(start):
            return start
    draws = _draws(question, history, np.random.default_rng([seed, number]))
    for budgets in _regions(question, history, limits):
        region = region_of(question, budgets)
        try:
            if region.is_over():
                continue
            layers = next(_hoped(region, history, CANDIDATES), None) or next(_unseen(region, draws), None)
        except HeddleError as error:
            # Three budgets of fine steps, say. One region more or less is no reason to end a trial.
            if error.code != "bad-argument":
                raise
            continue
        if layers is not None:
            return layers
    last = next(region.table(draws.last).ranked(), None)
    if last is None:
        raise HeddleError(
            "bad-placement", f"no placement has {dict(question.counts)} of {question.length} layers"
        )
    return region.named(last)


def simple(question: Question) -> tuple[Layers, ...]:
    """The evenly spread placement, and the blocks one after another: the first kind last, and first."""
    kinds, order, even = question.kinds, question.order, question.uniform
    runs = [order.mended(sorted(even, key=kinds.index, reverse=reverse)) for reverse in (True, False)]
    return (even, *(tuple(one) for one in runs if order.keeps(one) or not order.keeps(even)))


def _starts(question: Question, history: History, number: int) -> tuple[Layers, ...]:
    """What goes before all that is learnt: the start of the question, or simple placements by turns while little is known."""
    if question.start is not None:
        return (question.start,) if sorted(question.start) == sorted(question.uniform) else ()
    found = simple(question) if len(history) < LEAST else ()
    turn = number % max(1, len(found))
    return (*found[turn:], *found[:turn])


def keeps(question: Question, layers: Layers, limits: Sequence[Budget]) -> bool:
    """Whether a placement keeps these budgets."""
    index = [question.kinds.index(name) for name in layers]
    return all(budget.excess(budget.of(index)) == 0 for budget in limits)


def favourite(question: Question, history: Sequence[Seen]) -> Layers | None:
    """The placement of the highest expected quality with these counts within the latency budgets, asked for before or not.

    None while there are too few trials to tell, or where nothing is predicted to keep the budgets.
    """
    near = near_best(History.of(history), question.kinds, window_of(question))
    if near is None:
        return None
    region = region_of(question, latency_limits(question))
    best = likely(region, near.landscape.mean(), 1)
    return region.named(best[0]) if len(best) else None


def likely(region: Region, drawn: Problem, candidates: int) -> Whole:
    """So many placements of a region that most is expected of, the most first: [at most `candidates`, L]."""
    found, is_all = region.likely(region.loose().table(drawn), candidates)
    return found if is_all else region.likely(region.widest(drawn), candidates)[0]


def in_order(hoped: NDArray[np.float64]) -> NDArray[np.intp]:
    """Where the most may be hoped, where less, and so on; what differs by rounding alone stays in the order that it has."""
    step = np.ldexp(1.0, np.frexp(np.abs(hoped).max(initial=0.0))[1] - DIGITS)
    return np.argsort(-np.rint(hoped / step), kind="stable")


def _hoped(region: Region, history: History, candidates: int) -> Iterator[Layers]:
    """What is new of so many candidates that most is expected of, that of which most may be hoped first."""
    question = region.question
    near = near_best(history, question.kinds, window_of(question))
    if near is None:
        return
    placed = likely(region, near.landscape.mean(), candidates)
    if not len(placed):
        return
    for place in in_order(near.hoped(placed, question.params, question.asked)):
        layers = region.named(placed[place])
        if not question.is_seen(layers):
            yield layers


def _unseen(region: Region, draws: Draws) -> Iterator[Layers]:
    """The best of each draw if it is new; then all that is new in the order of the last draw."""
    is_seen = region.question.is_seen
    for number in range(draws.count):
        best = next(region.table(draws(number)).ranked(), None)
        if best is None:
            break
        if not is_seen(region.named(best)):
            yield region.named(best)
    for layers in map(region.named, in_turn(_fine(region, draws.last))):
        if not is_seen(layers):
            yield layers


def _fine(region: Region, drawn: Problem) -> Table:
    """The widest table, in finer steps where one with its bound has room: what keeps the budgets is the same, and so is its
    order, but less is gone through that does not: millions, at 24 layers."""
    try:
        return region.finer(drawn.window).table(drawn, bound=True)
    except HeddleError:
        return region.widest(drawn)


def _regions(
    question: Question, history: Sequence[Seen], limits: tuple[Budget, ...]
) -> Iterator[tuple[Budget, ...]]:
    """Where to look, the narrowest first: around the best found, within the latency budgets, anywhere."""
    trust = trust_budget(question, history)
    if trust is not None:
        yield (*limits, trust)
    if limits:
        yield limits
    yield ()


def trust_budget(question: Question, history: Sequence[Seen]) -> Budget | None:
    """At most so many layers that differ from the best placement found with these counts and parameters; None for all.

    All may differ at first, and after each better one. The number halves with every PATIENCE trials that found none, down
    to 2, one swap; after that it starts again.
    """
    mine = History.of(history).group(question.counts, question.params)
    if mine is None:
        return None
    widths = [question.length]
    while widths[-1] > 2:
        widths.append(max(2, widths[-1] // 2))
    width = widths[(mine.count - 1 - mine.best) // PATIENCE % len(widths)]
    if width == question.length:
        return None
    cost = np.ones((question.length, len(question.kinds)))
    cost[range(question.length), [question.kinds.index(name) for name in mine.layers]] = 0.0
    return Budget("layers that differ", cost, width)


def _counted(question: Question) -> tuple[Budget, ...]:
    """Exactly so many layers of each kind; those of the last follow."""
    shape = (question.length, len(question.kinds))
    counts = list(question.counts.values())
    return tuple(count_budget(kind, shape, count, count) for kind, count in enumerate(counts[:-1]))


def latency_limits(question: Question) -> tuple[Budget, ...]:
    """The latency budgets as a latency model predicts them, or else this run's timings.

    No margin is kept: the best placements are often close to the budget, and on made-up landscapes with noisy timings what was
    found was worse with one (docs/search.md).
    """
    fit, known = fit_of(question.timed, question.kinds), {budget.name for budget in question.predicted}
    steps = _steps(question, len(known.union(fit.labels)))
    mine = fit.budgets(question.counts, question.params, steps)
    told = (replace(budget, steps=steps) for budget in question.predicted)
    return (*told, *(budget for budget in mine if budget.name not in known))


def _steps(question: Question, limits: int) -> int:
    counts, length = list(question.counts.values()), question.length
    # With the layers that differ from the best placement, of which half are the most that a region has.
    states = float(len(counts)) ** window_of(question) * (length + 1) * (length // 2 + 1)
    cells = float(np.prod([count + 1.0 for count in counts[:-1]])) * states
    return int(max(4, min(STEPS, (MOST_CELLS / 4 / cells) ** (1.0 / max(1, limits)))))


def window_of(question: Question) -> int:
    """How far apart pairs are whose worth is learnt at their place: WINDOW, or neighbours where that makes too large a table."""
    counts = list(question.counts.values())
    cells = float(np.prod([count + 1.0 for count in counts[:-1]])) * (question.length + 1) * STEPS
    return WINDOW if cells * len(counts) ** WINDOW <= CELLS else 1


def _gate(question: Question, budgets: Sequence[Budget]) -> Gate | None:
    """What the layers take from each other, as which kinds may stand with so many of each kind left."""
    order, counts, kinds = question.order, list(question.counts.values()), question.kinds
    if not order.after or not order.keeps(question.uniform):
        return None
    grid = tuple(count + 1 for count in counts[:-1])
    masks = np.zeros((question.length, len(kinds), *grid), dtype=np.bool_)
    for used in product(*(range(count + 1) for count in counts)):
        layer = sum(used)
        if layer == question.length:
            continue
        left = tuple(count - have for count, have in zip(counts[:-1], used[:-1], strict=True))
        stand = dict(zip(kinds, used, strict=True))
        for kind, name in enumerate(kinds):
            masks[(layer, kind, *left)] = order.allows(name, stand, question.counts)

    def gate(layer: int, kind: int) -> NDArray[np.bool_]:
        mask: NDArray[np.bool_] = masks[layer, kind].reshape(grid + (1,) * len(budgets))
        return mask

    return gate
