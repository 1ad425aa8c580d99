"""A fit as the placement solver takes it: what each block costs in a layer, and what two that meet cost."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from heddle.search.latency_model.model import PlaceFit
from heddle.search.latency_model.stacks import Stack

Array = NDArray[np.float64]


def costs_of_placements(
    fit: PlaceFit, stack: Stack, kinds: Sequence[str]
) -> tuple[Array, Array, float] | None:
    """Milliseconds of each block of `kinds` in a layer, of each pair of them that meets, and of all around the layers.

    The sum over the layers of any placement of the blocks of `stack` is what the fit predicts for it. Blocks that `stack` does
    not have cost nothing here. None where the fit has not seen a block, two of them meet, or what is around; or where a block is
    not the same in every layer.

    Shapes:  [L, kinds];  [kinds, kinds].
    """
    terms, weights = dict(zip(stack.blocks, stack.terms, strict=True)), fit.sum.weights
    if any(terms[name] != term for name, term in zip(stack.blocks, stack.terms, strict=True)):
        return None
    alone, pair = np.zeros(len(kinds)), np.zeros((len(kinds), len(kinds)))
    constant = weights.get(("frame", stack.frame))
    if constant is None or not terms.keys() <= set(kinds):
        return None
    for at, name in enumerate(kinds):
        if name not in terms:
            continue
        if ("term", terms[name]) not in weights:
            return None
        alone[at] = weights["term", terms[name]]
        for beside, other in enumerate(kinds):
            if other not in terms or terms[other] == terms[name] or not fit.sum.way.has_pairs:
                continue
            column = ("pair", *sorted((terms[name], terms[other])))
            if column not in weights:
                return None
            pair[at, beside] = weights[column]
    return np.tile(alone, (len(stack.blocks), 1)), pair, constant
