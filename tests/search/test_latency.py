"""Timing: turns, intervals and the ratio are right; what is slower measures slower; the row says how it was
taken."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from functools import partial

import numpy as np
import pytest
import torch

from heddle.compose.build import build_causal_lm
from heddle.search.cores import usable_cores
from heddle.search.intervals import median_interval, ratio_interval
from heddle.search.latency import (
    Effort,
    Place,
    measure,
    measure_spec,
    take_turns,
)
from heddle.search.record import Latency
from heddle.search.workers import Workers
from heddle.specs import ModelSpec, loads

QUICK = Effort(warmup=1, least=5, most=40, seconds=0.5)


def model(layers: int, mixer: str = "{kind: attention, heads: 2}", hidden: int = 64) -> ModelSpec:
    text = f"""
version: 1
name: timed
model:
  vocab_size: 256
  hidden_size: {hidden}
  blocks: {{one: {{mixer: {mixer}, channel: {{kind: gelu}}}}}}
  layers: [{{repeat: {layers}, pattern: [one]}}]
"""
    return loads(text).spec.model


def test_models_take_turns_in_alternating_order() -> None:
    called: list[str] = []
    runs = [lambda: called.append("a") or 1.0, lambda: called.append("b") or 2.0]
    times = take_turns(runs, Effort(warmup=0, least=4, most=4, seconds=10, precision=0))
    assert "".join(called) == "abbaabba"
    assert times.tolist() == [[1.0] * 4, [2.0] * 4]


def test_repeats_end_once_the_interval_is_narrow() -> None:
    steady = take_turns([lambda: 1.0], Effort(warmup=0, least=10, most=200, seconds=10))
    rng = np.random.default_rng(0)
    noisy = take_turns([lambda: float(rng.lognormal(0, 1))], Effort(warmup=0, least=10, most=200, seconds=10))
    assert 10 <= steady.shape[1] < 20
    assert noisy.shape[1] == 200


def test_the_interval_of_the_median_covers_it_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        low, high = median_interval(rng.lognormal(0, 0.3, size=40))
        hits += low <= 1.0 <= high
    assert 180 <= hits <= 200


def test_drift_that_hits_both_models_cancels_in_the_ratio() -> None:
    """The machine slows down to a third; each turn is hit alike, so the ratio stays 2 and its interval
    narrow."""
    rng = np.random.default_rng(0)
    drift = np.linspace(1, 3, 100) * rng.lognormal(0, 0.01, size=(2, 100))
    low, high = ratio_interval(np.stack([2 * drift[0], drift[1]]))
    assert 1.9 < low <= 2.0 <= high < 2.1


@pytest.mark.alone
@pytest.mark.parametrize("phase", ["decode", "prefill", "train"])
def test_more_layers_take_longer(workers: Workers, phase: str) -> None:
    both = {"reference": model(2), "reference_name": "two", "effort": QUICK}
    row = workers.call(partial(measure, **both), model(12), Place(phase, 1, 256))
    assert row.ratio is not None
    assert row.ratio > 1.5
    assert row.reference == "two"
    assert row.reference_ms is not None
    assert row.ratio == pytest.approx(row.median_ms / row.reference_ms)


def on_one_core(spec: ModelSpec, place: Place) -> float:
    """ms of the fastest tenth of steps of one thread, which waits for no other whose core somebody else holds."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        return measure(spec, place, effort=QUICK).p10_ms
    finally:
        os.sched_setaffinity(0, cores)


@pytest.mark.alone
def test_a_decode_step_after_more_context_takes_longer(workers: Workers) -> None:
    """128 KB of keys and values a layer against a thousand times as much, by turns."""
    turns = [
        [
            workers.call(on_one_core, model(2, hidden=128), Place("decode", 2, context))
            for context in (64, 65_536)
        ]
        for _ in range(3)
    ]
    short, long = (min(times) for times in zip(*turns, strict=True))
    assert long > 2 * short


def test_a_row_says_how_it_was_taken_and_goes_through_json() -> None:
    threads = torch.get_num_threads()
    (row,) = measure_spec(model(1), context=32, phases=["decode"], device="cpu", effort=QUICK)
    assert row.label == "decode_ms@1x32"
    assert (row.method, row.dtype, row.ratio) == ("cpu-timer", "float32", None)
    assert row.threads == usable_cores()
    assert row.paths == {"attention": "sdpa"}
    assert row.p10_ms <= row.median_ms <= row.p90_ms
    assert row.low_ms <= row.median_ms <= row.high_ms
    assert torch.get_num_threads() == threads
    assert Latency(**json.loads(json.dumps(asdict(row)))) == row


def test_an_interval_covers_builds_that_differ_more_than_their_turns() -> None:
    rng = np.random.default_rng(0)
    builds = [
        offset + rng.normal(0, 0.001, size=size) for offset, size in ((0.97, 20), (1.0, 30), (1.03, 25))
    ]
    times = np.concatenate(builds)
    narrow = median_interval(times)
    low, high = median_interval(times, builds=[20, 30, 25])
    assert low < 0.98 < 1.02 < high
    assert high - low > narrow[1] - narrow[0]
    both = np.stack([times, np.ones_like(times)])
    low, high = ratio_interval(both, builds=[20, 30, 25])
    assert low < 0.98 < 1.02 < high


def test_a_build_gets_its_share_of_the_effort() -> None:
    whole = Effort(least=10, most=200, seconds=3.0, precision=0.02, builds=4)
    part = whole.of_one_build
    assert (part.least, part.most, part.seconds, part.builds) == (3, 50, 0.75, 1)
    assert part.precision == pytest.approx(0.04)


def test_weights_that_are_drawn_on_the_device_are_those_of_the_seed_there() -> None:
    """On a CPU they are the same as ever, and nothing else's random numbers change."""
    spec = model(1, "{kind: gated_deltanet, heads: 2}")
    before = torch.get_rng_state()
    found, usual = build_causal_lm(spec, seed=3, draw="device"), build_causal_lm(spec, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    for one, other in zip(found.state_dict().values(), usual.state_dict().values(), strict=True):
        assert torch.equal(one, other)
