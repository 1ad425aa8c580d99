"""What is told of timings beside their figures: widths, disturbances, and what was measured again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

from heddle.search.intervals import median_interval
from heddle.search.latency import AGAIN, Effort, Place, measure, take_turns, undisturbed
from heddle.search.record import Latency
from heddle.search.timing_quality import NARROW, from_data, quality_of, width
from heddle.specs import loads

SPEC = """
version: 1
name: one
model:
  vocab_size: 256
  hidden_size: 16
  blocks: {full: {mixer: {kind: attention, heads: 2}, channel: {kind: none}}}
  layers: [full]
"""
QUICK = Effort(warmup=1, least=3, most=4, seconds=0.1, builds=1)
CALM = {"reasons": ["idle"], "throttled": False}
CAPPED = {"reasons": ["power cap"], "throttled": True}
HOT = {"reasons": ["hardware thermal slowdown"], "throttled": True}


@pytest.fixture(scope="module")
def timed() -> Latency:
    return measure(loads(SPEC).spec.model, Place("decode", 1, 16), device="cpu", effort=QUICK)


def rows(timed: Latency, *seen: tuple[int | None, dict[str, Any] | None]) -> Iterator[Latency]:
    return (replace(timed, foreign=foreign, gpu=gpu) for foreign, gpu in seen)


@pytest.mark.parametrize(
    ("seen", "repeated"),
    [
        ([(None, None)], 0),
        ([(0, CALM)], 0),
        ([(2, CALM), (0, CALM)], 1),
        ([(0, HOT), (1, CALM), (0, CALM)], 2),
        ([(0, HOT), (0, HOT), (0, HOT)], 2),
        # A cap does not pass.
        ([(0, CAPPED)], 0),
    ],
)
def test_a_disturbed_timing_is_taken_again_twice_at_most(
    timed: Latency, seen: list[tuple[int | None, dict[str, Any] | None]], repeated: int
) -> None:
    left = rows(timed, *seen)
    found = undisturbed(lambda: next(left))
    assert (found.repeated, found.foreign, found.gpu) == (repeated, *seen[-1])
    assert next(left, None) is None
    assert found.repeated <= AGAIN


def test_quality_counts_what_was_seen_and_says_what_nobody_looked_at(timed: Latency) -> None:
    narrow = replace(timed, median_ms=100.0, low_ms=99.8, high_ms=100.2)
    wide = replace(narrow, ratio=1.0, ratio_low=0.97, ratio_high=1.01)
    found = quality_of(
        [
            narrow,
            replace(wide, foreign=1, gpu=CALM, repeated=2),
            replace(wide, foreign=0, gpu=CAPPED),
        ]
    )
    assert found is not None
    assert (found.n, found.wide, found.foreign, found.throttled) == (3, 2, 1, 1)
    assert (found.unchecked, found.repeated) == (1, 1)
    assert found.median_width == pytest.approx(width(wide)) == pytest.approx(0.04)
    text = "; ".join(found.told)
    assert "2 of 3 wider than 1 %" in text
    assert "not checked for 1 of 3" in text
    assert from_data(asdict(found)) == found
    assert quality_of([]) is None


def test_a_narrower_interval_is_given_more_time_and_turns() -> None:
    usual = Effort()
    asked = usual.to(usual.precision / 2)
    assert (asked.precision, asked.seconds, asked.most) == (0.005, 4 * usual.seconds, 4 * usual.most)
    assert usual.to(0.1).seconds == usual.seconds


def test_a_timing_stops_where_its_interval_is_no_longer_counted_as_wide(timed: Latency) -> None:
    assert Effort().precision == NARROW == 0.01
    calm, ended = np.random.default_rng(0), Effort(warmup=0, most=1000, seconds=60, builds=1)
    times = take_turns([lambda: float(calm.normal(1, 0.02))], ended)
    low, high = median_interval(times[0])
    assert 10 < times.shape[1] < 1000
    found = quality_of([replace(timed, median_ms=float(np.median(times)), low_ms=low, high_ms=high)])
    assert found is not None
    assert found.wide == 0
