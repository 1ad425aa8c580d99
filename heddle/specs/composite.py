"""Mixers that are made of other mixers: what they have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Self

from heddle.specs.cost import State
from heddle.specs.kinds import MixerSpec, Problem
from heddle.specs.layer import Site

MAX_PARTS = 8


class CompositeMixer(MixerSpec):
    """A mixer whose fields `mixer` or `mixers` hold others. Costs and states are theirs, and `own_…` beside them.

    The states of a part are named by its path: `mixers.0.keys`.
    """

    def parts(self) -> Mapping[str, MixerSpec]:
        found: dict[str, MixerSpec] = {}
        for name in ("mixer", "mixers"):
            held = getattr(self, name, None)
            if isinstance(held, MixerSpec):
                found[name] = held
            elif held is not None:
                found |= {f"{name}.{index}": one for index, one in enumerate(held)}
        return found

    def with_parts(self, parts: Mapping[str, MixerSpec]) -> Self:
        """The same mixer of other parts, by the paths of `parts()`."""
        update: dict[str, Any] = {}
        for path, part in parts.items():
            name, _, index = path.partition(".")
            if index:
                update.setdefault(name, []).append(part)
            else:
                update[name] = part
        return self.model_copy(update=update)

    def resolved(self, site: Site) -> Self:
        return self.with_parts({path: part.resolved(site) for path, part in self.parts().items()})

    def problems(self, site: Site) -> list[Problem]:
        return [
            replace(problem, field=f"{path}.{problem.field}")
            for path, part in self.parts().items()
            for problem in part.problems(site)
        ]

    def runtime(self, site: Site) -> dict[str, Any]:
        return self._data({path: part.runtime(site) for path, part in self.parts_at(site).items()}, site)

    def canonical(self, site: Site) -> dict[str, Any]:
        return self._data({path: part.canonical(site) for path, part in self.parts_at(site).items()}, site)

    def _data(self, parts: Mapping[str, Any], site: Site) -> dict[str, Any]:
        """The resolved fields, those that hold mixers in the form of `parts`."""
        data = self.resolved(site).plain(leave=("mixer", "mixers"))
        for path, part in parts.items():
            name, _, index = path.partition(".")
            if index:
                data.setdefault(name, []).append(part)
            else:
                data[name] = part
        return data

    def own_params(self, site: Site) -> int:  # noqa: ARG002
        """Parameters beside those of the parts."""
        return 0

    def own_flops(self, site: Site) -> int:  # noqa: ARG002
        """FLOPs a token beside those of the parts, in prefill and in decode."""
        return 0

    def own_states(self, site: Site) -> tuple[State, ...]:  # noqa: ARG002
        """Tensors in the cache beside those of the parts."""
        return ()

    def params(self, site: Site) -> int:
        return self.own_params(site) + sum(part.params(site) for part in self.parts_at(site).values())

    def flops(self, site: Site, context: int) -> int:
        return self.own_flops(site) + sum(part.flops(site, context) for part in self.parts_at(site).values())

    def prefill_flops(self, site: Site, length: int) -> float:
        return self.own_flops(site) + sum(
            part.prefill_flops(site, length) for part in self.parts_at(site).values()
        )

    def read_bytes(self, site: Site, context: int, element: int) -> int:
        own = sum(state.bytes(context, element) for state in self.own_states(site))
        return own + sum(part.read_bytes(site, context, element) for part in self.parts_at(site).values())

    def states(self, site: Site) -> tuple[State, ...]:
        inner = [
            replace(state, name=f"{path}.{state.name}")
            for path, part in self.parts_at(site).items()
            for state in part.states(site)
        ]
        return (*self.own_states(site), *inner)
