"""What a notebook shows of a run: the outcome, the winner's scores and layers, and the commands that go on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from heddle import specs
from heddle.errors import HeddleError
from heddle.specs.pattern import layers_of
from heddle.specs.shown import cell

if TYPE_CHECKING:
    from heddle.search.record import Run, Trial


def run_cell(run: Run) -> str:
    """A run as one cell of HTML, every name in it escaped."""
    counts = ", ".join(f"{run.count(state)} {state}" for state in run.states if run.count(state))
    lines = [
        f"{run.status}; {len(run.trials)} trials: {counts or 'none yet'}",
        f"front: trials {list(run.front)}",
    ]
    best = run.best_trial
    if best is None:
        return cell(f"search {run.name}", [*lines, "no winner"], [])
    scores = [f"{score.task} {score.value:.4f} ± {score.se:.4f}" for score in best.scores.values()]
    ratios = [
        f"{each.label} {each.median_ms:.3f} ms" + ("" if each.ratio is None else f" (ratio {each.ratio:.3f})")
        for each in best.latency.values()
    ]
    lines += [f"trial {best.number} wins: {'; '.join([*scores, *ratios])}"]
    lines += [f"heddle dashboard {run.path}  |  heddle report {run.path}"]
    return cell(f"search {run.name}", lines, _mixers(best), best.spec)


def _mixers(trial: Trial) -> list[str]:
    """The kind of mixer at each layer; the names of blocks where this heddle cannot read the spec."""
    try:
        return [str(layer.spec.mixer.kind) for layer in layers_of(specs.loads(trial.spec).spec.model)]
    except HeddleError:
        return list(trial.layers)
