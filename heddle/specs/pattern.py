"""Layer lists: patterns expanded, placements spread, long lists folded again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from heddle.specs.layer import Repeat
from heddle.specs.model import ModelSpec
from heddle.specs.reader import Path_

# Longest pattern that folding looks for.
MAX_FOLD = 32


def expand_layers(model: ModelSpec) -> list[str]:
    """The block name of every layer."""
    names: list[str] = []
    for item in model.layers:
        names += item.pattern * item.repeat if isinstance(item, Repeat) else [item]
    return names


def layer_paths(model: ModelSpec) -> list[Path_]:
    """Where the name of every layer stands, as a path below `layers`."""
    paths: list[Path_] = []
    for index, item in enumerate(model.layers):
        if isinstance(item, Repeat):
            paths += [(index, "pattern", place) for place in range(len(item.pattern))] * item.repeat
        else:
            paths.append((index,))
    return paths


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
