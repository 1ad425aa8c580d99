"""What rows of `truth_set.py` tell: scores by the number of full layers, and how hard a task is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import mean, median, variance
from typing import Any

Rows = dict[str, dict[str, Any]]
# Full layers of a placement at the quartiles of all.
QUARTILES = (3, 4, 5)
# Tasks whose score is better lower.
LOWER = ("text",)


def best_rate(scores: Mapping[str, Sequence[float | None]], *, higher: bool) -> list[float]:
    """The scores of the seeds at the learning rate whose mean is best; failed trainings make a rate the worst."""
    whole = [[one for one in seeds if one is not None] for seeds in scores.values() if None not in seeds]
    if not whole:
        return []
    return (max if higher else min)(whole, key=mean)


def tasks_of(rows: Rows) -> list[str]:
    """The tasks that there are scores of."""
    found = {key for row in rows.values() for key, told in row.items() if isinstance(told, dict)}
    return sorted(task for task in found if any("scores" in row.get(task, {}) for row in rows.values()))


def table(rows: Rows) -> Iterator[str]:
    """For each number of full layers: placements done, and the best, median and worst mean score."""
    for task in tasks_of(rows):
        higher = task not in LOWER
        found: dict[int, list[float]] = {}
        for row in rows.values():
            seeds = best_rate(row[task]["scores"], higher=higher) if task in row else []
            if seeds:
                found.setdefault(row["full"], []).append(mean(seeds))
        for full, scores in sorted(found.items()):
            order = sorted(scores, reverse=higher)
            middle = order[len(order) // 2]
            yield f"{task}: {full} full, {len(order):3} placements: {order[0]:.4f} {middle:.4f} {order[-1]:.4f}"


def noise(scores: Mapping[str, Sequence[float]]) -> float:
    """How far from the best is within seed noise: twice the standard error of a difference of two means over seeds, the deviation
    pooled over all placements."""
    count = len(next(iter(scores.values())))
    return 2.0 * math.sqrt(2.0 * mean(variance(seeds) for seeds in scores.values()) / count)


def near_best(scores: Mapping[str, Sequence[float]], *, higher: bool) -> float:
    """The share of the other placements within seed noise of the best; `scores`: of each seed, by placement."""
    means, reach = [mean(seeds) for seeds in scores.values()], noise(scores)
    best = (max if higher else min)(means)
    return (sum(abs(one - best) <= reach for one in means) - 1) / (len(means) - 1)


def hardness(rows: Rows) -> Iterator[str]:
    """How many placements a task cannot tell from the best, for the budgets of a quarter, half and three quarters and for all of
    them; and how the trainings fared."""
    for task in tasks_of(rows):
        higher = task not in LOWER
        told = {
            name: best_rate(row[task]["scores"], higher=higher) for name, row in rows.items() if task in row
        }
        told = {name: seeds for name, seeds in told.items() if len(seeds) > 1}
        for most in (*QUARTILES, None):
            within = {name: seeds for name, seeds in told.items() if most is None or name.count("F") <= most}
            if len(within) > 1:
                share = near_best(within, higher=higher)
                among = f"{len(within)} placements" + (
                    "" if most is None else f" with at most {most} full layers"
                )
                means = [mean(seeds) for seeds in within.values()]
                best = (max if higher else min)(means)
                yield (
                    f"{task}: {share:.0%} of {among} are within noise of the best "
                    f"(best {best:.4f}, median {median(means):.4f}, noise {noise(within):.4f})"
                )
        yield from learned(rows, task)


def learned(rows: Rows, task: str) -> Iterator[str]:
    """The share of trainings that end nearer to the best score of all than to chance; and of placements, at the best rate of
    each, whose seeds all do or all do not."""
    found = [row[task] for row in rows.values() if task in row and "chance" in row[task]]
    every = [one for told in found for seeds in told["scores"].values() for one in seeds if one is not None]
    if not every or task in LOWER:
        return
    half = max(found[0]["chance"], (max(every) + found[0]["chance"]) / 2)
    seeds = [best_rate(told["scores"], higher=True) for told in found]
    agree = mean(len({one > half for one in each}) == 1 for each in seeds if each)
    rates = {
        rate: mean(one is not None and one > half for told in found for one in told["scores"].get(rate, ()))
        for rate in found[0]["scores"]
    }
    by_rate = ", ".join(f"{share:.0%} at {rate}" for rate, share in rates.items())
    yield (
        f"{task}: {mean(one > half for one in every):.0%} of the trainings end above {half:.3f} ({by_rate}); "
        f"the seeds of {agree:.0%} of the placements agree"
    )
