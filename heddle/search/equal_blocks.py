"""Blocks of a placement that come out equal are one kind to the solver: their order among each other makes no other model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from heddle.search.placement import Budget, History, Seen, Timed
from heddle.specs import ModelSpec

Layers = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Merged:
    """`names` gives each block the first one that is equal to it; `counts` and `uniform` are those of the spec."""

    names: Mapping[str, str]
    counts: Mapping[str, int]
    uniform: Layers

    @property
    def any(self) -> bool:
        """Whether two blocks are equal."""
        return any(name != first for name, first in self.names.items())

    def merged_counts(self) -> dict[str, int]:
        """How many layers each kind gets."""
        found: dict[str, int] = {}
        for name, count in self.counts.items():
            found[self.names[name]] = found.get(self.names[name], 0) + count
        return found

    def merged(self, layers: Sequence[str]) -> Layers:
        """The kinds of some layers."""
        return tuple(self.names.get(name, name) for name in layers)

    def layers(self, merged: Sequence[str]) -> Layers:
        """Layers of the blocks for those of the kinds: the uniform ones where they fit, else equal blocks one after the other."""
        if not self.any:
            return tuple(merged)
        if tuple(merged) == self.merged(self.uniform):
            return self.uniform
        left = {
            kind: [
                name for name, count in self.counts.items() if self.names[name] == kind for _ in range(count)
            ]
            for kind in set(self.names.values())
        }
        return tuple(left[kind].pop(0) for kind in merged)

    def history(self, history: Sequence[Seen]) -> History:
        """The trials with kinds for blocks."""
        known = History.of(history)
        if not self.any:
            return known
        key = "merged", tuple(self.names.items())
        return known.once(
            key, lambda: History.of(replace(one, layers=self.merged(one.layers)) for one in known.trials)
        )

    def timed(self, timed: Sequence[Timed]) -> Sequence[Timed]:
        """The timings with kinds for blocks."""
        return [replace(one, layers=self.merged(one.layers)) for one in timed] if self.any else timed

    def budgets(self, budgets: Sequence[Budget]) -> list[Budget]:
        """Budgets over the blocks as those over the kinds: equal blocks cost the same."""
        blocks = list(self.counts)
        kept = np.array([blocks.index(kind) for kind in self.merged_counts()])
        return [
            replace(
                one,
                cost=one.cost[:, kept],
                pair=None if one.pair is None else one.pair[np.ix_(kept, kept)],
            )
            for one in budgets
        ]


def merge(model: ModelSpec, counts: Mapping[str, int], uniform: Layers) -> Merged:
    """Which blocks of a placement are equal in `model`.

    None are where one is `shared`, whose layers have their weights in common, or takes from a layer that it names.
    """
    blocks = {name: model.blocks[name] for name in counts}
    names = {name: name for name in counts}
    if not any(block.shared or block.skip or block.mixer.references() for block in blocks.values()):
        for name, block in blocks.items():
            names[name] = next(first for first, other in blocks.items() if other == block)
    return Merged(names, counts, uniform)
