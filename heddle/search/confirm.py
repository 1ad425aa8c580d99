"""Is the winner's placement better than the uniform one? Both trained again with seeds the search has not
seen."""

from __future__ import annotations

import math
from collections.abc import Sequence

from heddle.search.record import Difference, TaskInfo

# Two-sided 95 % quantiles of Student's t by degrees of freedom (1 to 30).
_T95 = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
    2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)  # fmt: skip


def unseen_seeds(trained_with: int, count: int) -> tuple[int, ...]:
    """`count` seeds, none of them the one the search trained with."""
    return tuple(trained_with + 1 + index for index in range(count))


def t_quantile(degrees: int) -> float:
    """The two-sided 95 % quantile of Student's t; beyond 30 degrees by its expansion around the normal
    one."""
    assert degrees >= 1
    if degrees <= len(_T95):
        return _T95[degrees - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def paired_difference(task: TaskInfo, winner: Sequence[float], uniform: Sequence[float]) -> Difference:
    """Winner minus uniform with its 95 % t interval; entry i of both was trained with the same seed.

        d̄ ± t(0.975, n-1) · s_d / √n

    At least two pairs are needed.
    """
    assert len(winner) == len(uniform) >= 2
    differences = [a - b for a, b in zip(winner, uniform, strict=True)]
    count = len(differences)
    mean = sum(differences) / count
    variance = sum((value - mean) ** 2 for value in differences) / (count - 1)
    half = t_quantile(count - 1) * math.sqrt(variance / count)
    return Difference(
        task=task.name,
        metric=task.metric,
        higher_is_better=task.higher_is_better,
        winner=tuple(winner),
        uniform=tuple(uniform),
        mean=mean,
        low=mean - half,
        high=mean + half,
    )
