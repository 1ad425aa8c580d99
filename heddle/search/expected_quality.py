"""Whether the model that places blocks was right: what it predicts of the last round from those before, and of the best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from heddle import specs
from heddle.errors import HeddleError

if TYPE_CHECKING:
    from heddle.search.placement import History, Question
    from heddle.search.record import Run, Trial
    from heddle.specs import SpecFile

# So much of the spread of all scores may the prediction of the best be off where predicted and real are said to agree.
TOLERANCE = 0.02


@dataclass(frozen=True, slots=True)
class LastRound:
    """What was predicted for the trials of a round from those of the rounds before, and what they reached.

    Scores are mean normalised ones. `pairs` are (number, predicted, reached); `spread` is the range of all scores before and in
    the round. `best` is the best trial placed; `is_favourite` says that no placement of its counts and values within the latency
    budgets is expected to be better, and `predicted_best` is what all other placements predict of it.
    """

    round: int
    pairs: tuple[tuple[int, float, float], ...]
    spread: float
    best: int
    reached_best: float
    predicted_best: float
    is_favourite: bool

    @property
    def error(self) -> float:
        """The mean distance of predicted and reached."""
        return sum(abs(told - real) for _, told, real in self.pairs) / len(self.pairs)

    @property
    def agreed(self) -> bool:
        """Whether the loop of predicting and training would stop here: the favourite was trained, and is as predicted."""
        off = abs(self.predicted_best - self.reached_best)
        return self.is_favourite and off <= TOLERANCE * self.spread


def last_round(run: Run) -> LastRound | None:
    """The last round with a trained trial; None where layers are not placed, or too few trials were trained before it.

    Learnt from whole trainings alone: where there are rungs, proposals may have learnt from the scores of one of those.
    """
    try:
        file = specs.loads(str(run.meta.get("spec", "")))
    except HeddleError:
        return None
    placement = file.space.placement
    trained = [one for one in run.trials if one.number >= 0 and one.quality is not None]
    if placement is None or not trained or not all(set(one.layers) <= set(placement.of) for one in trained):
        return None
    # Only here: whoever reads a run needs no numpy.
    from heddle.search.placement.near_best import near_best
    from heddle.search.placement.proposals import favourite, window_of

    newest = max(one.round for one in trained)
    last = [one for one in trained if one.round == newest]
    best = max(trained, key=lambda one: (_quality(one), -one.number))
    question = _question(file, best, run)
    window, kinds = window_of(question), question.kinds
    known = near_best(_history(file, [one for one in trained if one.round < newest]), kinds, window)
    others = near_best(_history(file, [one for one in trained if one.layers != best.layers]), kinds, window)
    if known is None or others is None:
        return None
    pairs = [(one.number, known.predicted(one.layers, _outer(file, one)), _quality(one)) for one in last]
    scores = [_quality(one) for one in trained]
    return LastRound(
        round=newest,
        pairs=tuple(pairs),
        spread=max(scores) - min(scores),
        best=best.number,
        reached_best=_quality(best),
        predicted_best=others.predicted(best.layers, question.params),
        is_favourite=favourite(question, _history(file, trained)) == best.layers,
    )


def _quality(trial: Trial) -> float:
    return trial.quality or 0.0


def _outer(file: SpecFile, trial: Trial) -> dict[str, str]:
    """The values of a trial that do not count layers."""
    assert file.space.placement is not None
    counted = set(file.space.placement.counts.values())
    return {name: repr(value) for name, value in trial.params.items() if name not in counted}


def _history(file: SpecFile, trials: list[Trial]) -> History:
    from heddle.search.placement import History, Seen

    # A spec teaches once, as in the search.
    first = {one.hash: one for one in reversed(trials)}
    return History.of(
        Seen(one.layers, _outer(file, one), _quality(one)) for one in trials if first[one.hash] is one
    )


def _question(file: SpecFile, trial: Trial, run: Run) -> Question:
    """What the solver is asked at the counts and values of a trial, after all timings of the run."""
    from heddle.search.placement import Question, Timed

    placement = file.space.placement
    assert placement is not None
    timed = [
        Timed(one.layers, _outer(file, one), {label: 1.0 + over for label, over in one.constraints.items()})
        for one in run.trials
        if one.number >= 0 and one.constraints
    ]
    counts = {name: trial.layers.count(name) for name in placement.of}
    # By the layers: in runs of before, counts that were drawn could take more layers than there are.
    order, uniform = file.order(trial.params), tuple(file.placed_as(trial.layers, trial.params))
    return Question(counts, _outer(file, trial), uniform, lambda _: False, order, timed)
