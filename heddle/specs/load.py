"""A spec file, read, checked and ready to be resolved: `load`, `loads`, `SpecFile`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from heddle.errors import HeddleError, HeddleErrors, Where
from heddle.specs.base import nearest
from heddle.specs.beside import beside_problems
from heddle.specs.check_file import Checked, check_file, check_model
from heddle.specs.check_references import arranged, order_at
from heddle.specs.model import ModelSpec
from heddle.specs.open_values import OpenValues
from heddle.specs.order import Order
from heddle.specs.pattern import definition_of, expand_layers, layer_paths, layers_of, uniform_layers
from heddle.specs.places import Places
from heddle.specs.reader import Path_, parse, read, steps_of
from heddle.specs.shown import cell
from heddle.specs.space import Placement, Space
from heddle.specs.spec import Spec


def load(path: str | Path) -> SpecFile:
    """The spec in a YAML or JSON file.

    Raises:
        HeddleErrors: every error of the file in one go, each with its place (of a syntax error, the first); else those of the
            files that its budgets are relative to.
    """
    file = _spec_file(check_file(read(Path(path))))
    wrong = list(beside_problems(file.spec, file.file, file.where))
    if wrong:
        raise HeddleErrors(wrong)
    return file


def loads(text: str, file: str = "<string>", *, beside: Mapping[str, str] | None = None) -> SpecFile:
    """The spec in a string of YAML or JSON; errors call it `file`. Raises as `load`.

    `beside` has what the files say that its budgets are relative to, by name; those that it lacks are read when they are needed.
    """
    return replace(_spec_file(check_file(parse(text, file=file))), beside=dict(beside or {}))


def _spec_file(checked: Checked) -> SpecFile:
    return SpecFile(checked.spec, checked.open.space, checked.warnings, checked.open, checked.places)


@dataclass(frozen=True)
class SpecFile:
    """A checked file.

    `spec` has every open value at its default: first choice, low end, evenly placed layers. `warnings` are what is legal and
    probably not meant: located like errors, never raised.
    """

    spec: Spec
    space: Space
    warnings: tuple[HeddleError, ...]
    _open: OpenValues = field(repr=False, compare=False)
    _places: Places = field(repr=False, compare=False)
    # What files say that budgets are relative to, by name, where that was given.
    beside: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    def _repr_html_(self) -> str:
        """What a notebook shows: the layers with every open value at its default, and the text."""
        model, size = self.spec.model, self.space.size()
        layers = layers_of(model)
        facts = [f"{len(layers)} layers, hidden size {model.hidden_size}, vocabulary {model.vocab_size}"]
        if self.space.parameters or self.space.placement is not None:
            facts.append(f"a space of {size:.4g} settings; shown is its default")
        return cell(self.spec.name, facts, [str(layer.spec.mixer.kind) for layer in layers], self.text)

    @property
    def file(self) -> str | None:
        """The name it was read under."""
        return self._open.document.source.file

    @property
    def text(self) -> str:
        """What it says."""
        return self._open.document.source.text

    def resolve(
        self, values: Mapping[str, object] | None = None, layers: Sequence[str] | None = None
    ) -> Spec:
        """The plain spec at `values`, by parameter name; a missing one keeps its default.

        `layers` names the block of each layer of a placement; without it they are those of `placed`.

        Raises:
            HeddleErrors: bad-space or bad-placement for values or layers outside the space, or what makes this one illegal.
        """
        model, places = self._resolve(values or {}, layers)
        checked = check_model(model, places)
        return self.spec.model_copy(update={"model": checked})

    def order(self, values: Mapping[str, object] | None = None) -> Order:
        """The order that the layers of a placement must keep at `values`, so that each stands after what it takes from."""
        return order_at(self._open, values or {})

    def placed(self, values: Mapping[str, object] | None = None) -> list[str] | None:
        """The layers of a placement at `values`: evenly spread, as far as their order lets them; None without a placement.

        Raises:
            HeddleErrors: "bad-placement" where the counts take more layers than there are.
        """
        if self.space.placement is not None:
            self._check_room(self.space.placement, values or {})
        return arranged(self._open, values or {})

    def placed_as(self, layers: Sequence[str], values: Mapping[str, object] | None = None) -> list[str]:
        """As many layers of each block of a placement as in `layers`, evenly spread, as far as their order at `values` lets."""
        placement = self.space.placement
        assert placement is not None
        counts = {name: layers.count(name) for name in placement.of if name != placement.rest}
        return self.order(values or {}).mended(uniform_layers(placement.length, placement.rest, counts))

    def where(
        self, path: str, values: Mapping[str, object] | None = None, layers: Sequence[str] | None = None
    ) -> Where:
        """The place of a field of the resolved spec: `train.tokens`, `blocks.full.mixer.heads`, `layers.3.mixer.heads`.

        A field of a layer leads to the definition of its block. `values` and `layers` are those it was resolved with.
        """
        steps = steps_of(path)
        steps = steps[1:] if steps[:1] == ("model",) and len(steps) > 1 else steps
        if not steps or steps[0] not in ModelSpec.model_fields:
            return self._places.named(steps, path)
        places, model = self._places, self.spec.model
        if values or layers is not None:
            data, places = self._resolve(values or {}, layers)
            model = check_model(data, places)
        return places.named(("model", *_definition(steps, model)), path)

    def _resolve(self, values: Mapping[str, object], layers: Sequence[str] | None) -> tuple[Any, Places]:
        """The data of the model at `values` and `layers`, and the way back to the file."""
        self._check_values(values)
        chosen = {**self.space.defaults(), **values}
        if layers is None and self.space.placement is not None:
            self._check_room(self.space.placement, chosen)
        # The model's pieces may come from elsewhere than those of the defaults.
        moves = {path: source for path, source in self._places.moves.items() if path[0] != "model"}
        placed = arranged(self._open, chosen) if layers is None else layers
        model = self._open.fill_model(chosen, placed, moves)
        places = Places(self._open.document, moves)
        placement = self.space.placement
        if layers is None:
            return model, places
        if placement is None:
            if list(layers) != expand_layers(check_model(model, places)):
                raise _error("bad-placement", "this spec has no placement, so its layers are given", places)
        else:
            strange = next((name for name in layers if name not in placement.of), None)
            if strange is not None or len(layers) != placement.length:
                what = f"{placement.length} layers of {', '.join(placement.of)} are expected"
                raise _error("bad-placement", f"{what}, got {strange or len(layers)}", places)
        return model, places

    def _check_room(self, placement: Placement, values: Mapping[str, Any]) -> None:
        over = -placement.count(self.space.held(values))[placement.rest]
        if over > 0:
            what = f"the counts take {placement.length + over} of {placement.length} layers"
            raise _error("bad-placement", what, self._places)

    def _check_values(self, values: Mapping[str, object]) -> None:
        known = {parameter.name: parameter for parameter in self.space.parameters}
        errors = []
        for name, value in values.items():
            if name not in known:
                close = nearest(name, known)
                hint = f"did you mean {close}?" if close else f"the parameters are {', '.join(known)}"
                errors.append(
                    HeddleError("bad-space", "no such parameter", where=Where(path=name), hint=hint)
                )
            elif not known[name].allows(value):
                place = Places(self._open.document, {}).named(_path_of(self._open, name), name)
                what = f"{value!r} is not a value of this parameter"
                errors.append(HeddleError("bad-space", what, where=place))
        if errors:
            raise HeddleErrors(errors)


def _path_of(found: OpenValues, name: str) -> Path_:
    return next(path for path, parameter in found.parameters.items() if parameter.name == name)


def _error(code: str, what: str, places: Places) -> HeddleErrors:
    return HeddleErrors([HeddleError(code, what, where=places.where(("model", "layers"), key=True))])


def _definition(steps: Path_, model: ModelSpec) -> Path_:
    """From a path through the expanded layers to one through what the file defines."""
    layer = steps[1] if len(steps) > 1 else None
    if steps[0] != "layers" or not isinstance(layer, int):
        return steps
    if layer >= len(expand_layers(model)):
        return ("layers",)
    return (
        definition_of(model, layer, steps[2:]) if len(steps) > 2 else ("layers", *layer_paths(model)[layer])
    )
