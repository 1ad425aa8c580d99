"""The best placements of a table from several starts at once, layer by layer in arrays: what `Table.ranked` tells one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from heddle.search.placement.counts import Array
from heddle.search.placement.grid import Whole
from heddle.search.placement.problem import Budget, within
from heddle.search.placement.table import Table

# Placements that are gone through, for each that is asked for within budgets that the table does not know to the last digit.
FURTHER = 4

# Placements of a ranking that are told at once, before the rest come one by one.
AT_ONCE = (512, 8192)


class Beginnings:
    """The beginnings of placements that are gone on with, of each start so many, in the order of their layers.

    Shapes:  worth: [starts, m], -inf where there is none;  left: for each budget [starts, m];  state: the last w kinds, of each
    [starts, m];  made: by layer the beginnings that were gone on with and what kind came, [starts, m] each.
    """

    def __init__(self, table: Table, starts: Whole) -> None:
        self.table = table
        self.worth: Array = np.zeros((len(starts), 1))
        self.left = [column[:, None] for column in starts.T]
        self.state = [np.zeros((len(starts), 1), dtype=np.int64)] * table.problem.window
        self.made = list[tuple[Whole, Whole]]()

    def extend(self, most: int) -> None:
        """Put each kind behind each of them, and keep the `most` of each start that can still reach most."""
        table, layer = self.table, len(self.made)
        kinds = np.arange(table.problem.kinds)
        worth = self.worth[..., None] + table.problem.gains[layer][tuple(self.state)]
        left, can = list[Whole](), np.isfinite(worth)
        for grid, have in zip(table.grids, self.left, strict=True):
            left.append(have[..., None] - grid.steps[layer][self.state[-1]])
            can = can & (left[-1] >= 0)
        if table.gate:
            can = can & self._allowed(layer)
        after = [*(one[..., None] for one in self.state[1:]), kinds, *(np.maximum(one, 0) for one in left)]
        reach = np.where(can, worth + table.tails[layer + 1][tuple(after)], -np.inf)
        starts, wide = len(reach), reach.shape[1] * len(kinds)
        # Equals stand in the order of their layers, and what is kept goes back to it.
        chosen = np.sort(np.argsort(-reach.reshape(starts, wide), axis=1, kind="stable")[:, :most], axis=1)
        worth = np.where(np.isneginf(reach), -np.inf, worth)
        parent, kind = np.divmod(chosen, len(kinds))
        self.worth = np.take_along_axis(worth.reshape(starts, wide), chosen, axis=1)
        rests = (one.reshape(starts, wide) for one in left)
        self.left = [np.maximum(np.take_along_axis(one, chosen, axis=1), 0) for one in rests]
        self.state = [*(np.take_along_axis(one, parent, axis=1) for one in self.state[1:]), kind]
        self.made.append((parent, kind))

    def _allowed(self, layer: int) -> NDArray[np.bool_]:
        """What the gate says of each kind behind each: [starts, m, kinds]."""
        each = (self.table.allowed(layer, kind)[tuple(self.left)] for kind in range(self.table.problem.kinds))
        return np.stack(list(each), axis=-1)

    def whole(self) -> list[Whole]:
        """Of each start the placements that came of them, the best first."""
        order = np.argsort(-self.worth, axis=1, kind="stable")
        counts = np.isfinite(self.worth).sum(axis=1)
        columns, place = list[Whole](), order
        for parent, kind in reversed(self.made):
            columns.append(np.take_along_axis(kind, place, axis=1))
            place = np.take_along_axis(parent, place, axis=1)
        layers = np.stack(columns[::-1], axis=-1)
        return [rows[:count] for rows, count in zip(layers, counts, strict=True)]


def foremost(table: Table, starts: Whole, most: int) -> list[Whole]:
    """The first `most` of `table.ranked(start)`, of each row of steps: [at most `most`, L] each.

    The table says exactly what a beginning can still reach, and beginnings of equal length have no placement in common: so the
    `most` best placements begin with some of the `most` beginnings that reach most, at every length. Where worths differ by
    their rounding alone, so may the order.

    Shapes:  starts: [rows, budgets].
    """
    if not table.feasible:
        return [np.zeros((0, table.problem.length), dtype=np.int64)] * len(starts)
    begun = Beginnings(table, starts)
    for _ in range(table.problem.length):
        begun.extend(most)
    return begun.whole()


def best_within(
    table: Table, starts: Whole, limits: Sequence[Sequence[Budget]], most: int
) -> list[tuple[Whole, bool]]:
    """From each row of steps the first `most` of a table's ranking that keep limits of their own: [at most `most`, L] each.

    FURTHER * `most` placements are gone through. Beside them whether those were enough: `most` are found, or there are no others.

    Shapes:  starts: [rows, budgets of the table].
    """
    found, left = dict[int, tuple[Whole, bool]](), list(range(len(starts)))
    for asked in (most, FURTHER * most):
        for place, rows in zip(left, foremost(table, starts[left], asked) if left else (), strict=True):
            kept = rows[within(limits[place], rows)]
            found[place] = kept[:most], len(kept) >= most or len(rows) < asked
        left = [place for place in left if not found[place][1]]
    return [found[place] for place in range(len(starts))]


def in_turn(table: Table) -> Iterator[tuple[int, ...]]:
    """All placements of a table that keep the true budgets, the best first: as `table.ranked(table.tops)` tells them, the first
    ones sooner."""
    told = dict[tuple[int, ...], None]()
    for most in AT_ONCE:
        (rows,) = foremost(table, np.array([table.tops], dtype=np.int64), most)
        kept = rows[table.problem.keeps(rows)]
        new = [one for one in map(tuple, kept.tolist()) if one not in told]
        told |= dict.fromkeys(new)
        yield from new
        if len(rows) < most:
            return
    yield from (one for one in table.ranked(table.tops) if one not in told and table.problem.keeps(one))
