"""Which values of open parameters some setting that fits has. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from heddle.compose.targets.demand import Demand
from heddle.compose.targets.target import Refusal
from heddle.specs import Parameter, Space
from heddle.specs.space_cut import looked_at


@dataclass(frozen=True, slots=True)
class Judged:
    """A setting: what forbids it in which target, if anything does, and the kind of its mixer where it is one block's."""

    refusals: tuple[Refusal, ...] = ()
    kind: str = ""
    target: Demand | None = None

    def told(self, path: str = "") -> str:
        """The first of what forbids it, after the class's name; the field is named unless it is the one at `path`."""
        first = self.refusals[0]
        told = [] if self.target is None else [self.target.name]
        return ": ".join([*told, first.why if first.path == path else str(first)])


@dataclass
class Support:
    """What was judged of the settings of the parameters `names` of a space."""

    space: Space
    names: Sequence[str]
    fits: bool = False
    _held: dict[str, set[str]] = field(default_factory=dict)
    _refused: list[tuple[Mapping[str, Any], Judged]] = field(default_factory=list)

    def add(self, values: Mapping[str, Any], judged: Judged) -> None:
        """A setting and what came of it."""
        if judged.refusals:
            self._refused.append((values, judged))
            return
        self.fits = True
        for name in self.names:
            if name in values:
                self._held.setdefault(name, set()).add(label(values[name]))

    @property
    def first(self) -> Judged | None:
        """The first setting that does not fit."""
        return self._refused[0][1] if self._refused else None

    def kept(self) -> dict[str, list[Any]]:
        """The values that fit somewhere, of each parameter that loses some; of a float none is ever lost."""
        found = {}
        for one in self.space.parameters:
            if one.kind == "float" or one.name not in self._held:
                continue
            kept = [value for value in looked_at(one) if label(value) in self._held[one.name]]
            if len(kept) < len(one.values()):
                found[one.name] = kept
        return found

    def whys(self, kept: Mapping[str, Sequence[Any]]) -> dict[str, str]:
        """What forbids the first value that each parameter loses, in the setting with the fewest others that are lost."""
        by_name = {one.name: one for one in self.space.parameters}
        return {name: self._why(by_name[name], kept) for name in kept}

    def _why(self, parameter: Parameter, kept: Mapping[str, Sequence[Any]]) -> str:
        lost = next(value for value in parameter.values() if not _among(value, kept[parameter.name]))
        with_it = [
            (sum(name in kept and not _among(value, kept[name]) for name, value in values.items()), place)
            for place, (values, _) in enumerate(self._refused)
            if parameter.name in values and label(values[parameter.name]) == label(lost)
        ]
        return self._refused[min(with_it)[1]][1].told(parameter.name) if with_it else ""


def label(value: object) -> str:
    """A value as text, the same for the same value; true is not 1."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _among(value: object, values: Sequence[Any]) -> bool:
    return any(label(value) == label(one) for one in values)
