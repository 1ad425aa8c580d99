"""What the placement model of a finished or running search has learnt, worked out again from its record."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from heddle import specs
from heddle.errors import HeddleError
from heddle.search.record import Run, Trial

# Fewer trained trials say nothing of single layers; of more than `MOST` an even sample is taken, so that a page does
# not take longer the longer a search runs.
LEAST, MOST = 8, 300


@dataclass(frozen=True, slots=True)
class Term:
    """A weight in units of the mean normalised score: its posterior mean and standard deviation."""

    mean: float
    sd: float


@dataclass(frozen=True, slots=True)
class Terms:
    """The worth of a block at each layer against the `baseline` there, and of one block right above another.

    `singles` has for each block but the baseline one term a layer; `pairs` is by (lower block, upper block).
    `trials` of `trained` went into them.
    """

    baseline: str
    singles: dict[str, list[Term]]
    pairs: dict[tuple[str, str], Term]
    trials: int
    trained: int


def placement_terms(run: Run) -> Terms | None:
    """The terms of the model that places blocks (`QualityModel`), from all trained trials of a run; None where it says nothing.

    That is with fewer than `LEAST` trained trials of one depth, or where all have the same layers.
    """
    trained = [trial for trial in run.trials if trial.quality is not None and trial.layers]
    depth = Counter(len(trial.layers) for trial in trained).most_common(1)
    held = [trial for trial in trained if len(trial.layers) == depth[0][0]]
    if len(held) < LEAST or len({trial.layers for trial in held}) < 2:
        return None
    step = max(1, -(-len(held) // MOST))
    kinds, counted = _placed(run, held)
    return _terms(held[::step], kinds, counted, len(trained))


def _placed(run: Run, held: list[Trial]) -> tuple[list[str], set[str]]:
    """The blocks of the placement, in the order of the spec, and the parameters that only count them."""
    names = sorted({name for trial in held for name in trial.layers})
    try:
        placement = specs.loads(str(run.meta.get("spec", ""))).space.placement
    except HeddleError:
        placement = None
    if placement is None or set(placement.counts) < set(names):
        return names, set()
    return list(placement.counts), {name for name in placement.counts.values() if isinstance(name, str)}


def _terms(held: list[Trial], kinds: list[str], counted: set[str], trained: int) -> Terms:
    # Only here: whoever reads a run needs no numpy.
    import numpy as np

    from heddle.search.placement import QualityModel, Seen

    seen = [
        Seen(
            trial.layers,
            {name: repr(value) for name, value in trial.params.items() if name not in counted},
            trial.quality or 0.0,
        )
        for trial in held
    ]
    length, count = len(held[0].layers), len(kinds)
    model = QualityModel(kinds, length, seen)
    # The model's target is standardised; a pair counts as its share of all neighbours.
    unit = float(np.std([one.quality for one in seen])) or 1.0
    mean, sd = unit * model.mean, unit * np.sqrt(np.clip(np.diag(model.covariance), 0.0, None))
    split = (count - 1) * length
    singles = {
        kind: [Term(float(mean[at]), float(sd[at])) for at in range(index * length, (index + 1) * length)]
        for index, kind in enumerate(kinds[:-1])
    }
    share = max(1, length - 1)
    pairs = {}
    for at, pair in enumerate((low, high) for low in kinds for high in kinds):
        pairs[pair] = Term(float(mean[split + at]) / share, float(sd[split + at]) / share)
    return Terms(kinds[-1], singles, pairs, len(held), trained)
