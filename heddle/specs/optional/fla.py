"""A layer of the flash-linear-attention package, by its name there."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, StringConstraints

from heddle.errors import HeddleError
from heddle.specs.base import nearest
from heddle.specs.cost import State
from heddle.specs.kinds import Contract, MixerSpec, Problem
from heddle.specs.layer import Site

ArgumentName = Annotated[str, StringConstraints(pattern=r"^[a-z_][a-z0-9_]{0,63}$")]


def _plain(value: Any) -> Any:
    """One word for what is none of the types below."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError("expected a number, true, false, a text or null")


Argument = bool | int | float | str | None


class Fla(MixerSpec):
    """A layer of flash-linear-attention (https://github.com/fla-org/flash-linear-attention), built and run by that package.

    What its constructor takes, which sizes fit and how many parameters it has only the package can tell: the layer is made on
    the meta device and asked, which imports torch. Costs are lower bounds: FLOPs are those of its parameters, twice each for a
    token, the recurrence left out; the state it keeps is not counted.
    """

    module: ClassVar[str | None] = "heddle.compose.optional.fla:FlaModule"
    exempt: ClassVar[Mapping[Contract, str]] = {
        "written": "the layers of that package cannot be told what to leave out of their memory"
    }
    kind: Literal["fla"] = "fla"
    layer: Annotated[
        str,
        Field(
            pattern=r"^[A-Z][A-Za-z0-9]{0,63}$",
            description="The class in fla.layers.",
            examples=["GatedDeltaNet", "GatedLinearAttention"],
        ),
    ]
    options: Annotated[
        dict[ArgumentName, Annotated[Argument, BeforeValidator(_plain)]],
        Field(
            max_length=64,
            description="Arguments of its constructor by name. hidden_size and layer_idx follow from the place, norm_eps from "
            "the model where it is not given.",
        ),
    ] = Field(default_factory=dict)

    def resolved(self, site: Site) -> Fla:  # noqa: ARG002 - sizes that are left out are the package's own
        return self

    def problems(self, site: Site) -> list[Problem]:
        try:
            return self._layer_problems() or self._option_problems(site)
        except HeddleError as error:
            return [Problem("layer", error.what, error.hint, error.code)]

    def _layer_problems(self) -> list[Problem]:
        twin = _twin()
        names = twin.layer_names()
        if self.layer not in names:
            what = f"fla.layers has no {self.layer!r}"
            return [Problem("layer", what, _meant(self.layer, names, "one of"), "unknown-kind")]
        unfit = twin.unfit(self.layer)
        return [] if unfit is None else [Problem("layer", f"{self.layer} {unfit}", code="conflicting-fields")]

    def _option_problems(self, site: Site) -> list[Problem]:
        twin = _twin()
        takes = [name for name in twin.arguments(self.layer) if name not in twin.GIVEN]
        found = [
            Problem(
                f"options.{name}",
                f"{self.layer} takes no {name!r}" + (" from a spec" if name in twin.GIVEN else ""),
                _meant(name, takes, "it takes"),
                "unknown-field",
            )
            for name in self.options
            if name not in takes
        ]
        refusal = None if found else self._measured(site).refusal
        if refusal is not None:
            what = f"{self.layer} cannot be made: {refusal}"
            found.append(Problem("options", what, code="out-of-range"))
        return found

    def runtime(self, site: Site) -> dict[str, Any]:  # noqa: ARG002
        return {"kind": self.kind, "layer": self.layer, "options": dict(self.options)}

    def canonical(self, site: Site) -> dict[str, Any]:  # noqa: ARG002
        # As text: in the data of a spec what is false counts as absent, and here it is an argument.
        return {"kind": self.kind, "layer": self.layer, "options": self._options()}

    def _options(self) -> str:
        """The arguments in one spelling."""
        return json.dumps({name: _number(value) for name, value in self.options.items()}, sort_keys=True)

    def params(self, site: Site) -> int:
        count: int = self._measured(site).parameters
        return count

    def _measured(self, site: Site) -> Any:
        """The layer as it is made at `site`: its parameters, or why it cannot be."""
        return _twin().measured(self.layer, self._options(), site.hidden_size, site.layer_index)

    def flops(self, site: Site, context: int) -> int:  # noqa: ARG002
        return 2 * self.params(site)

    def prefill_flops(self, site: Site, length: int) -> float:  # noqa: ARG002
        return 2 * self.params(site)

    def states(self, site: Site) -> tuple[State, ...]:  # noqa: ARG002
        return ()


def _meant(name: str, known: list[str], else_: str) -> str:
    close = nearest(name, known)
    return f"did you mean {close}?" if close else f"{else_} {', '.join(known)}"


def _number(value: Argument) -> Argument:
    """2.0 as 2."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _twin() -> Any:
    """The file of its module, found as `MixerSpec.module` is: by name, because specs import no torch."""
    where, _, _ = (Fla.module or "").partition(":")
    return importlib.import_module(where)
