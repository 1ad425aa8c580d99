"""The best places of so many layers of each block, in whatever order the blocks ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
# Whether a kind may follow where so many layers of each kind stand already.
Allows = Callable[[tuple[int, ...], int], bool]


def best_assignment(
    unary: Array,
    pair: Array,
    counts: Sequence[int],
    allows: Allows = lambda used, kind: True,  # noqa: ARG005
) -> list[int]:
    """The kinds k_1 … k_L with exactly `counts[k]` layers of each kind k that maximise

        Σ_l unary[l, k_l] + Σ_{l>1} pair[k_{l-1}, k_l]

    among those that `allows` lets stand, of which there must be one. Exact, by dynamic programming over (layer, counts used,
    last kind). Ties go to the lowest kind, earliest layer.

    Shapes:  unary: [L, kinds];  pair: [kinds, kinds];  counts: kinds numbers that add up to L.
    """
    length, kinds = unary.shape
    assert sum(counts) == length, f"counts {list(counts)} do not add up to {length} layers"
    # Filled from the last layer back, so that the choices can be read forward and ties go to the lowest kind.
    state = tuple[tuple[int, ...], int]
    tail: dict[state, tuple[float, int]] = {}
    for layer in reversed(range(length)):
        tail.update(_extend(tail, unary, pair, (counts, allows), layer))
    used, last, chosen = (0,) * kinds, -1, []
    for _ in range(length):
        kind = tail[used, last][1]
        chosen.append(kind)
        used, last = _plus(used, kind), kind
    return chosen


def _extend(
    tail: Mapping[tuple[tuple[int, ...], int], tuple[float, int]],
    unary: Array,
    pair: Array,
    rules: tuple[Sequence[int], Allows],
    layer: int,
) -> dict[tuple[tuple[int, ...], int], tuple[float, int]]:
    """The best value of layers `layer` … L-1, and its first choice, for every way to have come to `layer`."""
    (length, kinds), (counts, allows) = unary.shape, rules
    best: dict[tuple[tuple[int, ...], int], tuple[float, int]] = {}
    for used in _uses(counts, layer):
        # From some places no way leads to an end.
        options = [
            kind
            for kind in range(kinds)
            if used[kind] < counts[kind]
            and allows(used, kind)
            and (layer + 1 == length or (_plus(used, kind), kind) in tail)
        ]
        if not options:
            continue
        rest = {
            kind: float(unary[layer, kind])
            + (tail[_plus(used, kind), kind][0] if layer + 1 < length else 0.0)
            for kind in options
        }
        for last in range(kinds) if layer else (-1,):
            if layer and used[last] == 0:
                continue
            value = {kind: rest[kind] + (float(pair[last, kind]) if layer else 0.0) for kind in options}
            kind = max(options, key=lambda option: (value[option], -option))
            best[used, last] = (value[kind], kind)
    return best


def _uses(counts: Sequence[int], total: int) -> Iterator[tuple[int, ...]]:
    """Every way to have used `total` of `counts`."""
    for head in product(*(range(count + 1) for count in counts[:-1])):
        last = total - sum(head)
        if 0 <= last <= counts[-1]:
            yield (*head, last)


def _plus(used: tuple[int, ...], kind: int) -> tuple[int, ...]:
    return (*used[:kind], used[kind] + 1, *used[kind + 1 :])
