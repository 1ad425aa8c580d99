"""Which tokens a model favours by the shape of its masks alone, before any weight is trained        (arXiv 2502.01951).

Each layer moves content by  P <- (lam I + (1 - lam) A) P,  with A the row-normalised weights that its mask and decay leave
to a token when contents say nothing, and lam the share that the residual stream keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from heddle.compose.plan import Plan
from heddle.specs.layer import Site
from heddle.specs.pattern import layers_of
from heddle.specs.sight import Sight, reach

Matrix = NDArray[np.float64]
# Sequences up to this length are looked at token by token; hops take length³ steps a layer.
MAX_LENGTH = 512
# Tokens that are looked at unless told otherwise.
POSITIONS = 128
# What the residual stream keeps in a layer; trained models keep more than half.
RESIDUAL_SHARE = 0.5
# Tokens that count as the most recent ones.
RECENT = 8


@dataclass(frozen=True, slots=True)
class PositionBias:
    """How the output of a token depends on where in the sequence content stands.

    `reach` counts tokens (None: all), of what is certain to be seen. `layers_to_reach_all` is the number of layers,
    from the first on, after which every token has a say in all that may see it (None: never). `most_hops` is the longest
    shortest way in mixers. `centre` are the positions that all others hear from: with depth, all weight gathers there.
    `primacy` is the mean weight of the first token, `recency` that of the last RECENT ones, `middle` that of a token in the
    middle third, `uniform` what each token would have if none were favoured; `mean_distance` is in tokens, `entropy` in nats.
    """

    length: int
    residual_share: float
    reach: int | None
    layers_to_reach_all: int | None
    most_hops: int | None
    centre: tuple[int, ...]
    primacy: float
    recency: float
    middle: float
    uniform: float
    mean_distance: float
    entropy: float

    def data(self) -> dict[str, Any]:
        """Plain data, as `heddle show --position-bias --json` prints it."""
        return asdict(self)


def position_bias(plan: Plan, length: int, *, residual_share: float = RESIDUAL_SHARE) -> PositionBias:
    """The analysis of a plan at sequences of `length` tokens; what a selection may hide counts as hidden."""
    assert 1 <= length <= MAX_LENGTH
    sights = [layer.spec.mixer.sights(_site(plan, layer.index)) for layer in layers_of(plan.model)]
    weights = [layer_weights(one, length) for one in sights]
    seen = transport(weights, residual_share)
    hops, layers_needed = _hops([one > 0 for one in weights])
    back = np.abs(np.arange(length)[:, None] - np.arange(length)[None])
    positive = np.where(seen > 0, seen, 1.0)
    thirds = slice(length // 3, max(length // 3 + 1, 2 * length // 3))
    return PositionBias(
        length=length,
        residual_share=residual_share,
        reach=reach(layers_of(plan.model), _site(plan, 0)),
        layers_to_reach_all=layers_needed,
        most_hops=None if layers_needed is None else int(hops.max()),
        centre=_centre([one > 0 for one in weights]),
        primacy=float(seen[:, 0].mean()),
        recency=float(np.where(back < RECENT, seen, 0.0).sum(1).mean()),
        middle=float(seen[-1, thirds].mean()),
        uniform=1.0 / length,
        mean_distance=float((seen * back).sum(1).mean()),
        entropy=float(-(seen * np.log(positive)).sum(1).mean()),
    )


def layer_weights(sights: Sequence[Sight], length: int) -> Matrix:
    """The weights of one layer when contents say nothing: the mean over its heads.

    Shapes:  out: [length, length]; row i: what token i hears, summing to 1
    """
    lag = np.arange(length)[:, None] - np.arange(length)[None]
    total = np.zeros((length, length))
    certain = [one for one in sights if one.is_certain] or [Sight(window=1)]
    for one in certain:
        allowed = lag >= 0 if one.is_causal else np.full((length, length), True)
        if one.window is not None:
            allowed &= (np.abs(lag) < one.window) | (np.arange(length) < one.sinks)
        head = np.where(allowed, np.exp(one.log_decay * np.abs(lag)), 0.0)
        total += head / head.sum(1, keepdims=True)
    return total / len(certain)


def transport(weights: Sequence[Matrix], residual_share: float) -> Matrix:
    """How much of the output of token i comes from the input of token j, through all layers.  Shapes:  [length, length]"""
    moved = np.eye(len(weights[0]))
    for one in weights:
        moved = residual_share * moved + (1.0 - residual_share) * (one @ moved)
    return moved


def _site(plan: Plan, index: int) -> Site:
    model = plan.model
    return Site(model.hidden_size, index, len(plan.layers), model.norm_eps, model.context_length)


def _hops(masks: Sequence[NDArray[np.bool_]]) -> tuple[Matrix, int | None]:
    """The fewest mixers on a way from token j to token i, and after how many layers all ways are there."""
    length = len(masks[0])
    wanted = np.tril(np.ones((length, length), dtype=bool))
    if any(np.triu(mask, 1).any() for mask in masks):
        wanted = np.ones_like(wanted)
    hops = np.where(np.eye(length, dtype=bool), 0.0, np.inf)
    needed = 0 if np.isfinite(hops[wanted]).all() else None
    for count, mask in enumerate(masks, start=1):
        before, best = hops.copy(), hops
        for k in range(length):
            # Through token k: i hears k in this layer, and k has heard j before.
            best = np.minimum(best, np.where(mask[:, k, None], 1.0 + before[None, k], np.inf))
        hops = best
        if needed is None and np.isfinite(hops[wanted]).all():
            needed = count
    return np.where(wanted, hops, 0.0), needed


def _centre(masks: Sequence[NDArray[np.bool_]]) -> tuple[int, ...]:
    """The members of the source components of the graph in which j leads to i if some layer lets i hear j."""
    graph = nx.DiGraph()
    graph.add_nodes_from(range(len(masks[0])))
    for mask in masks:
        heard = np.argwhere(mask)
        graph.add_edges_from((int(j), int(i)) for i, j in heard)
    condensed = nx.condensation(graph)
    sources = [node for node in condensed if condensed.in_degree(node) == 0]
    return tuple(sorted(member for node in sources for member in condensed.nodes[node]["members"]))
