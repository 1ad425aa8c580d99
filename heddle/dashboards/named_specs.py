"""Spec files that a user named beside the runs, to be compared with trials or with each other.

They are the only files outside of a run that are read: nothing that a spec itself names is opened.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from heddle import specs
from heddle.dashboards import data
from heddle.errors import HeddleError
from heddle.search.costs import model_costs
from heddle.search.record import Trial
from heddle.specs.pattern import layers_of
from heddle.specs.reader import read

# What stands as the number and the state of a trial that is none.
NO_TRIAL, STATE = -2, "spec file"


@dataclass(frozen=True)
class Named:
    """What a spec file says, as a trial that was never measured, and its layers, overrides included."""

    trial: Trial
    cells: tuple[data.Cell, ...]
    context: int


class NamedSpec:
    """A spec file under the name that pages call it by; read anew when it was changed."""

    def __init__(self, key: str, path: Path) -> None:
        self.key, self.path = key, path
        self._held: tuple[str, Named] | None = None

    def version(self) -> str:
        """Another text whenever the file is another."""
        try:
            seen = self.path.stat()
        except OSError as error:
            return type(error).__name__
        return f"{seen.st_mtime_ns} {seen.st_size}"

    def read(self) -> Named:
        """What it says now. Raises HeddleErrors where it is no spec."""
        version = self.version()
        if self._held is None or self._held[0] != version:
            self._held = (version, self._read())
        return self._held[1]

    def _read(self) -> Named:
        # Not by `specs.load`, which also opens the files that budgets name, and tells what is in them.
        text = read(self.path).source.text
        file = specs.loads(text, file=str(self.path))
        layers = layers_of(file.spec.model)
        cells = tuple(data.Cell(one.index, one.block, data.mixer_name(one.spec)) for one in layers)
        context = file.spec.model.context_length
        parameters = int(model_costs(text, context=context, batch=1)["parameters"])
        is_open = bool(file.space.parameters) or file.space.placement is not None
        state = f"{STATE}, open values at their defaults" if is_open else STATE
        trial = Trial(
            number=NO_TRIAL, state=state, params={}, layers=tuple(one.block for one in layers),
            hash=specs.spec_hash(file.spec.model), round=0, spec=text, parameters=parameters, scores={}, latency={},
            constraints={}, reason=None, attempts=0, wall_s=0.0, duplicate_of=None,
        )  # fmt: skip
        return Named(trial, cells, context)


def named_specs(paths: Sequence[Path]) -> dict[str, NamedSpec]:
    """The files by their names; of two with one name the second gets a number.

    Raises:
        HeddleErrors: where one of them is no spec.
    """
    found: dict[str, NamedSpec] = {}
    for path in {path.absolute(): path for path in paths}.values():
        key, count = path.name, 1
        while key in found:
            count += 1
            key = f"{path.name} ({count})"
        found[key] = NamedSpec(key, path)
    for one in found.values():
        one.read()
    return found


def find_spec(known: dict[str, NamedSpec], key: str) -> NamedSpec:
    """The spec of that name. Raises HeddleError "run-not-found"."""
    if key not in known:
        hint = "heddle dashboard RUN --spec FILE names one"
        raise HeddleError("run-not-found", f"no spec file {key[:80]!r} was named", hint=hint)
    return known[key]
