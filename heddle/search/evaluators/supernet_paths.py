"""The paths of a supernet: which models a space has, and one of them drawn with equal chances."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, product
from random import Random
from typing import Any

from heddle.errors import HeddleError
from heddle.search.space import label_of, outer
from heddle.search.tasks.task import digest_of, seed_of
from heddle.specs import ModelSpec, SpecFile, spec_hash

FIELD = "search.evaluator"
# Settings of the open values beside the placement itself that are looked at one by one.
MOST_SETTINGS = 4096


@dataclass(frozen=True, slots=True)
class Counts:
    """One setting of the open values: how many layers each column has, in any order, and how many orders there are."""

    layers: tuple[tuple[int, int], ...]
    orders: int


@dataclass(frozen=True, slots=True)
class Paths:
    """`columns` are models with one block in every layer, or of a spec without a placement all its models."""

    columns: tuple[ModelSpec, ...]
    settings: tuple[Counts, ...]

    @property
    def count(self) -> int:
        """How many models there are."""
        return sum(one.orders for one in self.settings)

    def digest(self) -> str:
        """16 hex digits that name the models and their chances."""
        columns = [spec_hash(model) for model in self.columns]
        return digest_of(columns, [(one.layers, one.orders) for one in self.settings])

    def draw(self, *, seed: int, step: int) -> tuple[int, ...]:
        """The column that each layer is of, in one model of the space: each model is as likely as any other."""
        random = Random(seed_of("supernet", seed, step))
        ends = list(accumulate(one.orders for one in self.settings))
        setting = self.settings[bisect_right(ends, random.randrange(ends[-1]))]
        layers = [column for column, count in setting.layers for _ in range(count)]
        random.shuffle(layers)
        return tuple(layers)


def paths_of(file: SpecFile) -> Paths:
    """All models of a space whose open values are the placement, choices and whole numbers.

    Limits that a spec may break (`min_reach`, budgets, `export`) are not looked at: what breaks them is trained along.

    Raises `bad-argument`, located, for a space with an open float, with too many settings, or with a block that cannot stand in
    every layer, since it takes from an earlier one.
    """
    space, columns = file.space, _Columns(file)
    settings = []
    for values in _settings(file):
        if space.placement is None:
            length = len(file.resolve(values).model.layers)
            settings.append(Counts(((columns.at(values, None), length),), 1))
            continue
        counts = space.placement.count(space.held(values))
        if min(counts.values()) < 0:
            continue
        layers = tuple((columns.at(values, block), count) for block, count in counts.items() if count)
        orders = math.factorial(space.placement.length)
        for count in counts.values():
            orders //= math.factorial(count)
        settings.append(Counts(layers, orders))
    return Paths(tuple(columns.models), tuple(settings))


class _Columns:
    """The models of one block, each made once."""

    def __init__(self, file: SpecFile) -> None:
        self.file, self.models = file, list[ModelSpec]()
        self._numbers: dict[str, int] = {}

    def at(self, values: Mapping[str, Any], block: str | None) -> int:
        """The number of the column of `block`, or of the whole model, at these values."""
        key = repr((block, sorted(outer(self.file, values).items())))
        if key not in self._numbers:
            self._numbers[key] = len(self.models)
            self.models.append(self._made(values, block))
        return self._numbers[key]

    def _made(self, values: Mapping[str, Any], block: str | None) -> ModelSpec:
        placement = self.file.space.placement
        layers = None if block is None or placement is None else [block] * placement.length
        try:
            return self.file.resolve(values, layers=layers).model
        except HeddleError as error:
            what = f"a supernet has every block in every layer, and all-{block} is no model: {error.what}"
            raise HeddleError("bad-argument", what, where=self.file.where(FIELD)) from error


def _settings(file: SpecFile) -> Iterator[dict[str, Any]]:
    """The values of what is open, each setting once."""
    parameters = file.space.parameters
    floats = [one.name for one in parameters if one.kind == "float" and one.size() > 1]
    total = math.prod(one.size() for one in parameters)
    if floats or total > MOST_SETTINGS:
        told = f"{floats[0]} has no end of values" if floats else f"there are {total:.0f} settings"
        what = f"a supernet holds each kind of layer of a space, and {told}"
        hint = f"a choice in its place; at most {MOST_SETTINGS} settings beside the placement"
        raise HeddleError("bad-argument", what, where=file.where(FIELD), hint=hint)
    seen = set()
    for values in product(*(one.values() if one.kind != "float" else (one.low,) for one in parameters)):
        opened, _ = file.space.at(dict(zip((one.name for one in parameters), values, strict=True)))
        key = repr(sorted((name, label_of(value)) for name, value in opened.items()))
        if key not in seen:
            seen.add(key)
            yield opened
