"""In which order the layers of a placement may stand: each after what it takes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from heddle.specs.model import BlockSpec
from heddle.specs.pattern import Layer
from heddle.specs.references import EMBEDDING, references_of


@dataclass(frozen=True, slots=True)
class Order:
    """Which blocks a layer may be made of, by what the layers before it are made of.

    `after`: those that must stand before the first layer of a block. `whole`: of a shared block, whose layers all take from
    one and the same, those that may not stand between its first and its last layer.
    """

    after: Mapping[str, frozenset[str]] = field(default_factory=dict)
    whole: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def allows(self, name: str, used: Mapping[str, int], counts: Mapping[str, int]) -> bool:
        """Whether a layer of block `name` may follow when `used` of the `counts` layers of each block stand already."""
        if not self.after:
            return True
        if any(not used.get(source) for source in self.after.get(name, ())):
            return False
        return not any(
            name in sources and 0 < used.get(block, 0) < counts.get(block, 0)
            for block, sources in self.whole.items()
        )

    def keeps(self, layers: Sequence[str]) -> bool:
        """Whether every layer may stand where it does."""
        counts, used = {name: layers.count(name) for name in {*layers}}, dict.fromkeys({*layers}, 0)
        for name in layers:
            if not self.allows(name, used, counts):
                return False
            used[name] += 1
        return True

    def mended(self, layers: Sequence[str]) -> list[str]:
        """The same layers in an order that is kept, each of them as near to its place as those before it let it.

        As they are, where no order keeps the rules: a source that is not among them, or blocks that take from each other in a
        circle.
        """
        counts, used = {name: layers.count(name) for name in {*layers}}, dict.fromkeys({*layers}, 0)
        left, made = list(layers), list[str]()
        while left:
            place = next((i for i, name in enumerate(left) if self.allows(name, used, counts)), None)
            if place is None:
                return list(layers)
            used[left[place]] += 1
            made.append(left.pop(place))
        return made


def order_of(blocks: Mapping[str, BlockSpec | None]) -> Order:
    """What the references of these blocks ask of the order of their layers; a block that is not known asks for nothing."""
    after, whole = dict[str, frozenset[str]](), dict[str, frozenset[str]]()
    for name, block in blocks.items():
        if block is None:
            continue
        taken = references_of(Layer(0, name, None, block))
        sources = frozenset(one.name for one in taken if one.what != "stream" or one.name != EMBEDDING)
        if sources:
            after[name] = sources
            # It may take from itself only what an earlier of its layers gives, and the first has none.
            if block.shared:
                whole[name] = sources - {name}
    return Order(after, whole)
