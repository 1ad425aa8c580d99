"""What a report says of predicted and trained placements in the last round."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from heddle.dashboards.placement_section import lines, placements
from heddle.search.expected_quality import LastRound, last_round
from heddle.search.record import Run, Score, read_run

MakeRun = Callable[..., Path]
SPEC = """version: 1
name: made-up
model:
  vocab_size: 256
  hidden_size: 64
  blocks:
    linear: {mixer: {kind: gated_deltanet, heads: 2}, channel: {kind: swiglu}}
    full: {mixer: {kind: attention, heads: 2}, channel: {kind: swiglu}}
  layers: {placement: {length: 6, of: [linear, full], count: {full: {int: [1, 5]}}}}
"""


def worth(layers: tuple[str, ...]) -> float:
    """The later the full layers, the better, and two that stand together a little more."""
    late = sum(0.1 * place for place, name in enumerate(layers) if name == "full")
    return late + 0.05 * sum(a == b == "full" for a, b in pairwise(layers))


def trained(folder: Path, order: Callable[[int], int], count: int = 56) -> Run:
    """The made-up run with placements of six layers, in rounds of eight."""
    run = read_run(folder)
    trials = []
    for number in range(count):
        layers = tuple("full" if order(number) >> layer & 1 else "linear" for layer in range(6))
        score = Score("mqar", "accuracy", 0.0, 0.0, 1, worth(layers), 0, 1, 1, 0.0, ())
        params = {"layers.placement.count.full": layers.count("full")}
        told = {"params": params, "scores": {"mqar": score}, "constraints": {}, "round": number // 8}
        told["hash"] = f"{order(number):016x}"
        trials.append(replace(run.trials[4], number=number, layers=layers, **told))
    return replace(run, trials=tuple(trials), meta={**run.meta, "spec": SPEC})


@pytest.fixture
def run(make_run: MakeRun) -> Run:
    return trained(make_run(), lambda number: number * 37 % 64)


def test_the_last_round_is_predicted_from_those_before_it(run: Run) -> None:
    found = last_round(run)
    assert found is not None
    assert found.round == 6
    assert [number for number, _, _ in found.pairs] == list(range(48, 56))
    assert [real for _, _, real in found.pairs] == [trial.quality for trial in run.trials[48:]]
    assert found.error < 0.05 * found.spread
    # What the round itself reached is not in its predictions.
    last = {"mqar": replace(run.trials[50].scores["mqar"], normalised=-1.0)}
    other = replace(
        run, trials=tuple(replace(one, scores=last) if one.number > 47 else one for one in run.trials)
    )
    changed = last_round(other)
    assert changed is not None
    assert [told for _, told, _ in changed.pairs] == [told for _, told, _ in found.pairs]


def test_predicted_and_real_agree_where_the_favourite_was_trained(run: Run) -> None:
    found = last_round(run)
    assert found is not None
    assert found.best == max(run.trials, key=lambda one: one.quality or 0.0).number
    assert found.is_favourite
    assert found.agreed == (abs(found.predicted_best - found.reached_best) <= 0.02 * found.spread)


def test_the_report_says_whether_they_agree(run: Run) -> None:
    html = placements(run)
    assert html is not None
    assert "Predicted placements" in html
    assert "Round 6, predicted from the rounds before it" in html
    one = LastRound(3, ((9, 0.5, 0.6),), 0.5, 9, 0.6, 0.6, True)
    assert "predicted and real agree." in lines(one)[1]
    assert "do not agree yet" in lines(replace(one, predicted_best=0.5))[1]
    assert "more trials may find it" in lines(replace(one, is_favourite=False))[1]


def test_few_trials_and_runs_that_place_nothing_say_nothing(run: Run) -> None:
    assert last_round(replace(run, trials=run.trials[:8])) is None
    assert last_round(replace(run, meta={**run.meta, "spec": ""})) is None
    assert last_round(replace(run, trials=())) is None
