"""Mixers that are made of other mixers: what they have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Self

from heddle.specs.cost import State
from heddle.specs.kinds import Contract, MixerSpec, Problem, Reference
from heddle.specs.layer import Site
from heddle.specs.sight import Sight

MAX_PARTS = 8


class CompositeMixer(MixerSpec):
    """A mixer whose fields `mixer` or `mixers` hold others. What they take, see, cost and keep is theirs, and `own_…` beside it.

    The states of a part are named by its path: `mixers.0.keys`.
    """

    @property
    def is_causal(self) -> bool:
        return all(part.is_causal for part in self.parts().values())

    def parts(self) -> Mapping[str, MixerSpec]:
        found: dict[str, MixerSpec] = {}
        for name in ("mixer", "mixers"):
            held = getattr(self, name, None)
            if isinstance(held, MixerSpec):
                found[name] = held
            elif held is not None:
                found |= {f"{name}.{index}": one for index, one in enumerate(held)}
        return found

    def parts_at(self, site: Site) -> Mapping[str, MixerSpec]:  # noqa: ARG002
        """The parts as they are built at `site`, which may be smaller than they are written."""
        return self.parts()

    def computed(self, site: Site) -> Mapping[str, MixerSpec]:
        """The parts that evaluation pays for: their FLOPs and their states are counted."""
        return self.parts_at(site)

    def exemptions(self) -> Mapping[Contract, str]:
        inner = {name: why for part in self.parts().values() for name, why in part.exemptions().items()}
        return {**inner, **self.exempt}

    def roundings(self) -> Mapping[Contract, str]:
        inner = {name: why for part in self.parts().values() for name, why in part.roundings().items()}
        return {**inner, **self.rounded}

    def kernels(self) -> tuple[str, ...]:
        inner = [name for part in self.parts().values() for name in part.kernels()]
        return tuple(dict.fromkeys([*self.ops, *inner]))

    def references(self) -> tuple[Reference, ...]:
        return tuple(
            replace(one, field=f"{path}.{one.field}")
            for path, part in self.parts().items()
            for one in part.references()
        )

    def misfit(self, reference: Reference, source: MixerSpec, site: Site) -> str | None:
        for path, part in self.parts_at(site).items():
            if reference.field.startswith(f"{path}."):
                inner = replace(reference, field=reference.field.removeprefix(f"{path}."))
                return part.misfit(inner, source, site)
        return super().misfit(reference, source, site)

    def sights(self, site: Site) -> tuple[Sight, ...]:
        return tuple(one for part in self.parts_at(site).values() for one in part.sights(site))

    def bounds_width(self, site: Site) -> int:
        return max((part.bounds_width(site) for part in self.parts_at(site).values()), default=0)

    def resolved(self, site: Site) -> Self:
        parts = {path: part.resolved(site) for path, part in self.parts().items()}
        return self.model_copy(update=_by_field(parts))

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
        return self.resolved(site).plain(leave=("mixer", "mixers")) | _by_field(parts)

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

    def frozen_params(self, site: Site) -> int:
        return sum(part.frozen_params(site) for part in self.parts_at(site).values())

    def flops(self, site: Site, context: int) -> int:
        return self.own_flops(site) + sum(part.flops(site, context) for part in self.computed(site).values())

    def prefill_flops(self, site: Site, length: int) -> float:
        return self.own_flops(site) + sum(
            part.prefill_flops(site, length) for part in self.computed(site).values()
        )

    def read_bytes(self, site: Site, context: int, element: int) -> int:
        own = sum(state.bytes(context, element) for state in self.own_states(site))
        return own + sum(part.read_bytes(site, context, element) for part in self.computed(site).values())

    def host_bytes(self, site: Site, context: int, element: int) -> int:
        return sum(part.host_bytes(site, context, element) for part in self.computed(site).values())

    def states(self, site: Site) -> tuple[State, ...]:
        inner = [
            replace(state, name=f"{path}.{state.name}")
            for path, part in self.computed(site).items()
            for state in part.states(site)
        ]
        return (*self.own_states(site), *inner)


def _by_field(parts: Mapping[str, Any]) -> dict[str, Any]:
    """What is given by the paths of `parts()`, as the fields `mixer` and `mixers`."""
    fields: dict[str, Any] = {}
    for path, part in parts.items():
        name, _, index = path.partition(".")
        if index:
            fields.setdefault(name, []).append(part)
        else:
            fields[name] = part
    return fields
