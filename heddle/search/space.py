"""From a trial to a spec: the values Optuna is asked for, and the layers the placement solver adds."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import optuna

from heddle.errors import HeddleError
from heddle.search.equal_blocks import merge
from heddle.search.placement import Budget, Question, Seen, Timed, propose
from heddle.search.study import Study
from heddle.specs import (
    ModelSpec,
    Parameter,
    Site,
    Space,
    Spec,
    SpecFile,
    expand_layers,
    spec_hash,
)
from heddle.specs.beside import spec_beside
from heddle.specs.pattern import layers_of
from heddle.specs.search import names_file
from heddle.specs.sight import reach

# Placements that turn out to be a spec that was asked for under another one, before the next of them is taken: blocks may be
# written otherwise and compute the same, and to make the spec of each of 24 layers takes 0.7 ms of a core.
TWINS = 200

Layers = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A resolved spec of the space, with the values and layers it came from."""

    spec: Spec
    values: dict[str, Any]
    layers: tuple[str, ...]
    hash: str

    @property
    def model(self) -> ModelSpec:
        return self.spec.model


def suggest_all(study: Study, number: int, space: Space) -> dict[str, Any]:
    """The values of trial `number`, as the spec file spells them; what is not open beside them has none.

    Optuna draws each count of a placement for itself. Where they take more layers than there are, all get fewer in proportion,
    and the block without a count as many as one of them in the mean.
    """
    fewer = dict[str, int]()

    def draw(parameter: Parameter) -> Any:
        drawn = study.suggest(number, parameter.name, partial(suggest, parameter=parameter))
        return fewer.get(parameter.name, drawn)

    while True:
        values, held = space.settle(draw)
        cut = cut_to_room(space, values, held)
        if not cut:
            return values
        fewer |= cut


def cut_to_room(space: Space, values: Mapping[str, Any], held: Mapping[str, Any]) -> dict[str, int]:
    """Lower values of the counts of a placement that take more layers than there are, where they have any: those that are closest
    to equal shares of what was drawn, with the mean of the counts for the rest."""
    placement = space.placement
    if placement is None or (over := -placement.count(held)[placement.rest]) <= 0:
        return {}
    counts = [one for one in space.parameters if one.name in placement.counts.values() and one.name in values]
    drawn = sum(values[one.name] for one in counts)
    share = (drawn - over) / (drawn * (1.0 + 1.0 / len(counts))) if drawn else 0.0
    for is_below in (False, True):
        cut = {
            one.name: _nearest(one, values[one.name], share * values[one.name], is_below=is_below)
            for one in counts
        }
        if any(cut[one.name] < values[one.name] for one in counts):
            return cut
    return {}


def _nearest(one: Parameter, drawn: int, wanted: float, *, is_below: bool) -> int:
    """The value up to `drawn` that is closest to `wanted`, and not above it with `is_below` unless it is the least."""
    allowed = sorted(value for value in one.values() if value <= drawn)
    below = [value for value in allowed if value <= wanted] or allowed[:1]
    return int(min(below if is_below else allowed, key=lambda value: abs(value - wanted)))


def suggest(trial: optuna.Trial, parameter: Parameter) -> Any:
    """The value of one parameter in `trial`."""
    name = parameter.name
    if parameter.kind == "choice":
        labels = [label_of(choice) for choice in parameter.choices]
        return parameter.choices[labels.index(trial.suggest_categorical(name, labels))]
    low, high = parameter.low, parameter.high
    assert low is not None
    assert high is not None
    if parameter.kind == "int":
        values = parameter.values()
        return trial.suggest_int(name, values[0], values[-1], step=int(parameter.step or 1))
    return trial.suggest_float(name, low, high, log=parameter.log)


def suggested(space: Space, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` as Optuna has them, by the names of their parameters."""
    kinds = {parameter.name: parameter.kind for parameter in space.parameters}
    return {name: label_of(value) if kinds[name] == "choice" else value for name, value in values.items()}


def label_of(choice: object) -> str:
    """A choice as one short string: Optuna's storages take no mappings, and a string reads well in a
    dashboard."""
    return choice if isinstance(choice, str) else json.dumps(choice, sort_keys=True)


def candidate(file: SpecFile, values: Mapping[str, Any], layers: Sequence[str]) -> Candidate:
    """The model of `file` at `values` and `layers`. Raises HeddleError where that combination is not a legal
    one."""
    spec = file.resolve(values, layers=layers)
    return Candidate(spec, dict(values), tuple(layers), spec_hash(spec.model))


@dataclass(frozen=True, slots=True)
class Known:
    """What the layers of a trial are proposed from.

    `history` and `timed` are the trials of the rounds before, `asked` layers and outer values of those asked for in its own.
    `predict` is what a latency model says of placements (`heddle.search.limits.Limits.of_placements`). `is_asked(hash)` tells
    whether a trial of this run has that spec already; `tried(values)` whether one had these very values, and what layers it is
    asked about, and `is_placed(layers)` whether one had the layers, with whatever values.
    """

    history: Sequence[Seen]
    is_asked: Callable[[str], bool]
    timed: Sequence[Timed] = ()
    asked: Sequence[tuple[Layers, Mapping[str, Any]]] = ()
    tried: Callable[[Mapping[str, Any]], Callable[[Layers], bool]] = lambda values: lambda layers: False  # noqa: ARG005
    predict: Callable[[ModelSpec, Sequence[str]], Sequence[Budget]] | None = None
    is_placed: Callable[[Layers], bool] = lambda layers: False  # noqa: ARG005


class Asked:
    """The question at some values, with kinds for blocks that are equal. `like` is one of the same outer values, which has what
    does not depend on counts. After TWINS of the specs that were asked for under other layers one of them may come again, which
    the ledger answers."""

    def __init__(
        self, file: SpecFile, values: Mapping[str, Any], known: Known, like: Asked | None = None
    ) -> None:
        assert file.space.placement is not None
        self.file, self.values, self._known = file, values, known
        # Late in a search it is asked of hundreds of placements for one trial.
        self._is_tried = known.tried(values)
        # The placement that is taken was looked at before.
        self.at = cache(lambda layers: candidate(file, values, layers))
        self._twins = set[Layers]()
        counts = file.space.placement.count(file.space.held(values))
        evenly = uniform(file, values)
        if like is None:
            self.blocks = merge(file.resolve(values, layers=evenly).model, counts, evenly)
            self.order, self.timed = file.order(values), self.blocks.timed(known.timed)
        else:
            self.blocks = replace(like.blocks, counts=counts, uniform=evenly)
            self.order, self.timed = like.order, like.timed
        # What a block costs is predicted from a model that has it.
        has_all = like is not None and all(
            like.blocks.counts[name] or not own for name, own in counts.items()
        )
        self.predicted: Sequence[Budget] = (
            like.predicted if like is not None and has_all else self._predicted(counts, evenly)
        )
        self.question = Question(
            self.blocks.merged_counts(),
            outer(file, values),
            self.blocks.merged(evenly),
            self._is_seen,
            order=self.order,
            timed=self.timed,
            predicted=self.predicted,
            asked=[(self.blocks.merged(layers), params) for layers, params in known.asked],
            is_placed=lambda kinds: known.is_placed(self.blocks.layers(kinds)),
        )

    def _predicted(self, counts: Mapping[str, int], evenly: Layers) -> Sequence[Budget]:
        predict = self._known.predict
        if predict is None:
            return ()
        model = self.file.resolve(self.values, layers=evenly).model
        return self.blocks.budgets(predict(model, tuple(counts)))

    @property
    def history(self) -> Sequence[Seen]:
        return self.blocks.history(self._known.history)

    def _is_seen(self, kinds: Layers) -> bool:
        layers = self.blocks.layers(kinds)
        if self._is_tried(layers):
            return True
        if not self._known.is_asked(self.at(layers).hash):
            return False
        self._twins.add(layers)
        return len(self._twins) <= TWINS


def place(
    file: SpecFile,
    values: Mapping[str, Any],
    known: Known,
    *,
    seed: int,
    number: int,
    start: Layers | None = None,
) -> Candidate:
    """The candidate of trial `number`: `values` are Optuna's, the layers are proposed from what is `known`, `start` the first."""
    if file.space.placement is None:
        return candidate(file, values, expand_layers(file.resolve(values).model))
    asked = Asked(file, values, known)
    question = replace(asked.question, start=None if start is None else asked.blocks.merged(start))
    return asked.at(asked.blocks.layers(propose(question, asked.history, seed=seed, number=number)))


def uniform(file: SpecFile, values: Mapping[str, Any]) -> tuple[str, ...]:
    """The evenly spread placement with the counts of `values`, as far as the layers' order lets it be."""
    placed = file.placed(values)
    assert placed is not None
    return tuple(placed)


def outer(file: SpecFile, values: Mapping[str, Any]) -> dict[str, str]:
    """The values that say something about quality besides the counts of the placement, as labels."""
    placement = file.space.placement
    counted = (
        set() if placement is None else {name for name in placement.counts.values() if isinstance(name, str)}
    )
    return {name: label_of(value) for name, value in values.items() if name not in counted}


def check_reach(model: ModelSpec, least: int | None) -> None:
    """Raises HeddleError "reach-too-short" for a model whose windows carry content less than `least` tokens."""
    site = Site(model.hidden_size, 0, 1, model.norm_eps, model.context_length)
    seen = None if least is None else reach(layers_of(model), site)
    if least is not None and seen is not None and seen < least:
        raise HeddleError(
            "reach-too-short", f"the layers together see {seen} tokens back, and {least} are asked for"
        )


def reference(file: SpecFile, name: str) -> Candidate:
    """The model that a budget's `relative_to` means: of all-<block> every layer is that block, the rest as the
    file's first choices; else it is that of the spec file of this name."""
    if names_file(name):
        beside = spec_beside(file.file, name, file.beside)
        spec = file.spec.model_copy(update={"model": beside.model})
        return Candidate(spec, {}, tuple(expand_layers(spec.model)), spec_hash(spec.model))
    model = file.spec.model
    layers = [name.removeprefix("all-")] * len(expand_layers(model))
    spec = file.spec.model_copy(update={"model": model.model_copy(update={"layers": layers})})
    return Candidate(spec, {}, tuple(layers), spec_hash(spec.model))
