"""Layer lists: patterns expanded, placements spread, long lists folded again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from heddle.specs.layer import MAX_LAYERS, OneLayer, Repeat
from heddle.specs.model import BlockSpec, ModelSpec
from heddle.specs.reader import Path_

# Longest pattern that folding looks for.
MAX_FOLD = 32


def expand_layers(model: ModelSpec) -> list[str]:
    """The block name of every layer."""
    return [name for item in model.layers for name in _names(item)]


def _names(item: str | Repeat | OneLayer) -> list[str]:
    if isinstance(item, Repeat):
        return item.pattern * item.repeat
    return [item.block if isinstance(item, OneLayer) else item]


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer: the name of its block, its own name if it has one, and what it is, overrides included."""

    index: int
    block: str
    name: str | None
    spec: BlockSpec
    is_overridden: bool = False


def layers_of(model: ModelSpec) -> list[Layer]:
    """Every layer of a model whose layers name blocks that are there."""
    made: list[Layer] = []
    written: dict[str, dict[str, Any]] = {}
    for item in model.layers:
        if not isinstance(item, OneLayer):
            made += [
                Layer(len(made) + i, name, None, model.blocks[name]) for i, name in enumerate(_names(item))
            ]
            continue
        spec = model.blocks[item.block]
        if item.override:
            if item.block not in written:
                written[item.block] = spec.written()
            spec = _block(json.dumps(overridden(written[item.block], item.override), sort_keys=True))
        made.append(Layer(len(made), item.block, item.name, spec, bool(item.override)))
    return made


@lru_cache(maxsize=MAX_LAYERS)
def _block(text: str) -> BlockSpec:
    """The block that is written in JSON. A model's layers are asked for several times, and blocks never change."""
    return BlockSpec.model_validate(json.loads(text))


def overridden(data: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """`data` with the fields of `override` in their place; what is of another kind is not merged but replaced."""
    made = dict(data)
    for key, value in override.items():
        old = made.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            is_same_kind = value.get("kind", old.get("kind")) == old.get("kind")
            made[key] = overridden(old, value) if is_same_kind else value
        else:
            made[key] = value
    return made


def layer_paths(model: ModelSpec) -> list[Path_]:
    """Where the name of the block of every layer stands, as a path below `layers`."""
    paths: list[Path_] = []
    for index, item in enumerate(model.layers):
        if isinstance(item, Repeat):
            paths += [(index, "pattern", place) for place in range(len(item.pattern))] * item.repeat
        else:
            paths.append((index, "block") if isinstance(item, OneLayer) else (index,))
    return paths


def definition_of(model: ModelSpec, layer: int, steps: Path_) -> Path_:
    """Where the field `steps` of a layer is said, as a path below the model: in its override, or in its block."""
    place = layer_paths(model)[layer]
    item = model.layers[place[0]] if isinstance(place[0], int) else None
    if isinstance(item, OneLayer):
        held: Any = item.override
        for step in steps:
            held = held.get(step) if isinstance(held, Mapping) else None
        if held is not None:
            return ("layers", place[0], "override", *steps)
    return ("blocks", expand_layers(model)[layer], *steps)


def uniform_layers(length: int, rest: str, counts: Mapping[str, int]) -> list[str]:
    """`counts` layers of each counted block, evenly spread, the remaining ones `rest`.

    Of K counted layers in L, the i-th stands last in its group: at (i+1) L // K - 1, all counted from 0. Which of them is
    which block is settled in the same way: the commonest of the counted blocks is the rest among them.
    """
    counted = {name: count for name, count in counts.items() if count > 0}
    if not counted:
        return [rest] * length
    layers, total = [rest] * length, sum(counted.values())
    commonest = max(counted, key=lambda name: counted[name])
    names = uniform_layers(
        total, commonest, {name: one for name, one in counted.items() if name != commonest}
    )
    for index, name in enumerate(names):
        layers[(index + 1) * length // total - 1] = name
    return layers


def fold_items(items: Sequence[str | Repeat | OneLayer]) -> list[Any]:
    """A list of layers written short: runs of plain names folded, layers in full as they are."""
    folded: list[Any] = []
    run: list[str] = []
    for item in items:
        if isinstance(item, OneLayer):
            folded += [*fold_layers(run), item.written()]
            run = []
        else:
            run += _names(item)
    return [*folded, *fold_layers(run)]


def fold_layers(names: Sequence[str]) -> list[Any]:
    """The shortest way to write a list of layers, with repeated patterns of at most 32 layers.

    By dynamic programming from the last layer back; a name costs 1, a repeat 2.5 more than its pattern.
    """
    count = len(names)
    # equal[size][i]: for how many layers from i on each equals the one `size` further.
    equal = {size: _runs(names, size) for size in range(1, min(MAX_FOLD, count // 2) + 1)}
    cost = [0.0] * (count + 1)
    # For each layer: size of the pattern that begins here, and how often it stands; 0 for a single name.
    taken = [(0, 1)] * count
    for start in reversed(range(count)):
        cost[start] = cost[start + 1] + 1.0
        for size, runs in equal.items():
            repeat = runs[start] // size + 1
            if repeat == 1:
                continue
            folded_cost = size + 2.5 + cost[start + size * repeat]
            # Of two that are equally short, the one that folds earlier reads better.
            if folded_cost < cost[start] or (folded_cost == cost[start] and not taken[start][0]):
                cost[start], taken[start] = folded_cost, (size, repeat)
    folded: list[Any] = []
    start = 0
    while start < count:
        size, repeat = taken[start]
        folded.append(
            {"repeat": repeat, "pattern": list(names[start : start + size])} if size else names[start]
        )
        start += size * repeat or 1
    return folded


def _runs(names: Sequence[str], size: int) -> list[int]:
    runs = [0] * (len(names) + 1)
    for index in reversed(range(len(names) - size)):
        runs[index] = runs[index + 1] + 1 if names[index] == names[index + size] else 0
    return runs
