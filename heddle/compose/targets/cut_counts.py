"""How many layers each block may have, as far as the classes that a search must fit say. No torch."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from heddle.specs import Space, SpecFile, expand_layers
from heddle.specs.layer import MAX_LAYERS


@dataclass
class Counts:
    """The least and the most layers of each block; `length` of all together, or None where they are not counted.

    `unfit` blocks have none, and `why` says what forbids them. What a block `provides` are kinds of mixers that fit; "" stands
    for any.
    """

    least: dict[str, int]
    most: dict[str, int]
    length: int | None
    unfit: list[str] = field(default_factory=list)
    why: dict[str, str] = field(default_factory=dict)
    _kinds: dict[str, Collection[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, file: SpecFile) -> Counts:
        """What the file says."""
        placement = file.space.placement
        if placement is None:
            names = file.spec.model.blocks
            if any(one.name.partition(".")[0] == "layers" for one in file.space.parameters):
                return cls(dict.fromkeys(names, 0), dict.fromkeys(names, MAX_LAYERS), None)
            layers = expand_layers(file.spec.model)
            counts = {name: layers.count(name) for name in names}
            return cls(dict(counts), dict(counts), None)
        by_name = {one.name: one for one in file.space.parameters}
        ends = {
            name: by_name[count].ends() if isinstance(count, str) else (count, count)
            for name, count in placement.counts.items()
        }
        ends[placement.rest] = (0, placement.length)
        found = cls(
            {name: ends[name][0] for name in ends}, {name: ends[name][1] for name in ends}, placement.length
        )
        found._spread()
        return found

    @property
    def possible(self) -> bool:
        """Whether any numbers are left."""
        self._spread()
        return all(self.least[name] <= self.most[name] for name in self.least)

    def may_stand(self, name: str) -> bool:
        return self.most[name] > 0

    def must_stand(self, name: str) -> bool:
        return self.least[name] > 0

    def forbid(self, name: str, why: str) -> None:
        """No layer of this block."""
        self.unfit.append(name)
        self.why[name] = why
        self.most[name] = 0

    def provides(self, name: str, kinds: Collection[str]) -> None:
        self._kinds[name] = kinds

    def need(self, kind: str) -> bool:
        """That there is a layer of this kind; whether no block is left that could be one."""
        able = [
            name
            for name in self.most
            if self.may_stand(name) and {kind, ""} & set(self._kinds.get(name, {""}))
        ]
        if len(able) == 1:
            self.least[able[0]] = max(1, self.least[able[0]])
        return not able

    def kept(self, space: Space) -> dict[str, list[int]] | None:
        """The numbers that are left of each open count which loses some; None where nothing is left."""
        if not self.possible:
            return None
        placement, found = space.placement, dict[str, list[int]]()
        by_name = {one.name: one for one in space.parameters}
        for name, count in ({} if placement is None else placement.counts).items():
            if not isinstance(count, str) or count not in by_name:
                continue
            values = by_name[count].values()
            kept = [value for value in values if self.least[name] <= value <= self.most[name]]
            if kept and len(kept) < len(values):
                found[count] = kept
        return found

    def _spread(self) -> None:
        """What one block takes the others cannot have."""
        if self.length is None:
            return
        before = None
        while before != (self.least, self.most) and all(
            self.least[name] <= self.most[name] for name in self.least
        ):
            before = (dict(self.least), dict(self.most))
            for name in self.least:
                rest = [one for one in self.least if one != name]
                self.most[name] = min(self.most[name], self.length - sum(self.least[one] for one in rest))
                self.least[name] = max(self.least[name], self.length - sum(self.most[one] for one in rest))
