"""How far a shorter training orders specs as a longer one does: Kendall's tau-b with a bootstrap interval."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from heddle.search.record import RANKS_EVENT, RankCorrelation, TaskInfo, Trial

if TYPE_CHECKING:
    from heddle.search.driver import Driver

# Specs of which fewer say nothing; of more than MOST the latest are taken, since each pair of them is looked at.
LEAST, MOST = 5, 1000
RESAMPLES, SEED = 2000, 0

Pairs = NDArray[np.float32]


def tau_b(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Kendall's tau-b; None where one of the two has a single value.

        tau_b = (C - D) / sqrt(pairs that differ in `first` x pairs that differ in `second`)

    with C pairs in the same order in both, and D in opposite order.
    """
    told = _taus(first, second, np.ones((1, len(first)), dtype=np.float32))
    return None if np.isnan(told[0]) else float(told[0])


def interval(first: Sequence[float], second: Sequence[float]) -> tuple[float, float] | None:
    """The 2.5 and 97.5 % points of tau-b over specs drawn with replacement, with a fixed seed; None where no draw has one."""
    rng = np.random.default_rng(SEED)
    drawn = rng.multinomial(len(first), np.full(len(first), 1 / len(first)), size=RESAMPLES)
    taus = _taus(first, second, drawn.astype(np.float32))
    taus = taus[~np.isnan(taus)]
    if not len(taus):
        return None
    low, high = np.quantile(taus, [0.025, 0.975])
    return float(low), float(high)


def _taus(first: Sequence[float], second: Sequence[float], often: Pairs) -> NDArray[np.float64]:
    """tau-b where each row of `often` says how often each spec counts; a spec makes no pair with itself."""
    signs = [_signs(first), _signs(second)]
    same, *differ = (_sums(pairs, often) for pairs in (signs[0] * signs[1], *map(np.abs, signs)))
    with np.errstate(invalid="ignore", divide="ignore"):
        return same / np.sqrt(differ[0] * differ[1])


def _signs(values: Sequence[float]) -> Pairs:
    column = np.asarray(values, dtype=np.float64)
    return np.sign(column[:, None] - column[None, :]).astype(np.float32)


def _sums(pairs: Pairs, often: Pairs) -> NDArray[np.float64]:
    return np.asarray((often @ pairs * often).sum(axis=1, dtype=np.float64))


def rank_correlations(
    trials: Sequence[Trial], rungs: Sequence[Sequence[str]], last: Sequence[TaskInfo]
) -> Iterator[RankCorrelation]:
    """For each rung and the one after it: of the mean normalised score, and of each task that both have, if there are several.

    Each spec counts once. Those that were left at a rung have no later score, so what is told is of the promoted alone.
    """
    names = [*rungs, [task.name for task in last]]
    specs = list({trial.hash: trial for trial in reversed(trials)}.values())[::-1]
    scored = [[_scores(trial, at, len(rungs)) for trial in specs] for at in range(len(names))]
    for at in range(len(rungs)):
        both = [(one, other) for one, other in zip(scored[at], scored[at + 1], strict=True) if one and other][
            -MOST:
        ]
        tasks = [name for name in names[at] if name in names[at + 1]]
        yield _told(at, None, [(_mean(one), _mean(other)) for one, other in both])
        if len(names[at]) > 1 or len(names[at + 1]) > 1:
            for task in tasks:
                yield _told(at, task, [(one[task], other[task]) for one, other in both])


def _scores(trial: Trial, rung: int, rungs: int) -> dict[str, float]:
    """The normalised scores of a trial at a rung by task; none where it did not get there."""
    whole = trial.scores if trial.quality is not None else {}
    found = whole if rung == rungs else trial.rungs[rung] if rung < len(trial.rungs) else {}
    return {task: score.normalised for task, score in found.items()}


def _mean(scores: dict[str, float]) -> float:
    return sum(scores.values()) / len(scores)


def _told(rung: int, task: str | None, pairs: Sequence[tuple[float, float]]) -> RankCorrelation:
    first, second = ([pair[side] for pair in pairs] for side in (0, 1))
    tau = tau_b(first, second) if len(pairs) >= LEAST else None
    low, high = (None, None) if tau is None else interval(first, second) or (None, None)
    return RankCorrelation(rung + 1, task, len(pairs), tau, low, high)


def compare_rungs(driver: Driver) -> None:
    """Record how far the rungs of a search agree; a search without rungs records nothing."""
    setting = driver.setting
    if not setting.rungs:
        return
    trials = [trial for number, trial in sorted(driver.trials.items()) if number >= 0]
    names = [[each.info.name for each in rung] for rung in setting.rungs]
    ranks = [asdict(one) for one in rank_correlations(trials, names, setting.infos)]
    driver.log.write(RANKS_EVENT, ranks=ranks)
