"""Medians of timings that were taken turn by turn, and their bootstrap 95 % intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
RESAMPLES = 1000


def median_interval(
    times: Array, *, builds: Sequence[int] | None = None, seed: int = 0
) -> tuple[float, float]:
    """The bootstrap 95 % interval of the median of `times`, which hold so many turns of each build. [turns]"""
    medians = np.median(times[_resamples(builds or [times.shape[-1]], seed)], axis=-1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return float(low), float(high)


def ratio_interval(
    times: Array, *, builds: Sequence[int] | None = None, seed: int = 0
) -> tuple[float, float]:
    """The bootstrap 95 % interval of median(times[0]) / median(times[1]), whole turns drawn together. [2,
    turns]"""
    medians = np.median(times[:, _resamples(builds or [times.shape[-1]], seed)], axis=-1)
    low, high = np.percentile(medians[0] / medians[1], [2.5, 97.5])
    return float(low), float(high)


def _resamples(builds: Sequence[int], seed: int) -> NDArray[np.int64]:
    """Indices of turns: as many builds as there are, drawn with replacement, and turns of each drawn likewise."""
    generator, sizes = np.random.default_rng(seed), np.array(builds)
    drawn = generator.integers(0, len(sizes), size=(RESAMPLES, len(sizes)))
    places = generator.random((RESAMPLES, len(sizes), int(sizes.mean())))
    starts = np.cumsum(sizes) - sizes
    found = starts[drawn][..., None] + (places * sizes[drawn][..., None]).astype(np.int64)
    indices: NDArray[np.int64] = found.reshape(RESAMPLES, -1)
    return indices


def width(times: Array) -> float:
    """The width of the interval of the first median over that median, or of the ratio's, whichever is
    more."""
    low, high = median_interval(times[0])
    width = (high - low) / float(np.median(times[0]))
    if len(times) == 1:
        return width
    low, high = ratio_interval(times)
    return max(width, (high - low) / float(np.median(times[0]) / np.median(times[1])))


def summary(times: Array, builds: Sequence[int]) -> dict[str, Any]:
    """The figures of a `Latency` that follow from the times."""
    low, high = median_interval(times[0], builds=builds)
    p10, median, p90 = (float(value) for value in np.percentile(times[0], [10, 50, 90]))
    row: dict[str, Any] = {"median_ms": median, "low_ms": low, "high_ms": high, "p10_ms": p10, "p90_ms": p90}
    row |= {"n": times.shape[1], "reference_ms": None, "ratio": None, "ratio_low": None, "ratio_high": None}
    if len(times) == 2:
        row["reference_ms"] = float(np.median(times[1]))
        row["ratio"] = median / row["reference_ms"]
        row["ratio_low"], row["ratio_high"] = ratio_interval(times, builds=builds)
    return row
