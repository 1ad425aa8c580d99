"""A latency model of other software is held against specs that are timed as a search begins, and trusted only where it holds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from predicted_search import QUICK, model_of, scored, spec_with

from heddle.dashboards.latency_section import sentences
from heddle.search import changed_software
from heddle.search.latency import Effort, measure
from heddle.search.latency_model.design import design, held_out_stacks
from heddle.search.latency_model.find import RUN_COPY
from heddle.search.latency_model.model import load_model
from heddle.search.latency_model.sentinels import Site, Verdict, judged, verdict
from heddle.search.latency_model.stacks import Stack
from heddle.search.latency_model.table import timing_environment
from heddle.search.lock import LOCK_FILE, read_lock
from heddle.search.record import BudgetInfo, Latency, Run
from heddle.search.replay import replay
from heddle.search.run import search
from heddle.search.workers import Answer, Job
from heddle.specs import SpecFile, load, loads

RATIO = "decode_ms: {at_most: 1.1, relative_to: all-full, context: 64}"

BY_MODEL = "  latency: model\n  latency_model: model.json"
HOW: dict[str, Any] = {"device": "cpu", "effort": Effort()}


def file_of(*budgets: str) -> SpecFile:
    return loads(spec_with(*budgets), file="limits.yaml")


def row(ms: float, reference_ms: float | None) -> Latency:
    ratio = None if reference_ms is None else ms / reference_ms
    return Latency(
        "decode_ms@1x64", "decode", 1, 64, ms, ms, ms, ms, ms, 9, "all-full", reference_ms, ratio, ratio, ratio,
        "cpu", None, "float32", "cpu-timer", 1, {}, None,
    )  # fmt: skip


def off_by(*shares: float, slower: float = 1.0) -> list[tuple[Stack, Latency]]:
    """Timings of sentinels that are off by these shares of the prediction, all on a machine that is slower by a factor."""
    file = file_of(RATIO)
    fit = model_of(file).fits[0]
    found = []
    for stack, share in zip(held_out_stacks(file, len(shares)), shares, strict=True):
        predicted = fit.predict(stack)
        assert predicted is not None
        found.append((stack, row(predicted.ms * (1 + share) * slower, fit.reference_ms * slower)))
    return found


def site(*, is_ratio: bool = True) -> Site:
    file = file_of(RATIO)
    return Site("decode_ms@1x64", model_of(file).fits[0], file.spec.model, is_ratio)


@pytest.mark.parametrize(
    ("shares", "trusted"),
    [
        ((0.01, -0.02, 0.049, -0.049, 0.0), True),
        ((0.0, 0.0, 0.051, 0.0, 0.0), False),
        ((0.0, -0.051, 0.0, 0.0, 0.0), False),
        ((), False),
    ],
)
def test_a_fit_is_trusted_where_every_sentinel_is_within_its_margin(
    shares: tuple[float, ...], trusted: bool
) -> None:
    """The made-up model has a margin of 5 %."""
    found = verdict(site(), off_by(*shares))
    assert found.errors == pytest.approx(shares)
    assert found.is_trusted is trusted


@pytest.mark.parametrize("shares", [(math.nan, 0.01), (0.01, math.nan, -0.02)])
def test_an_error_that_is_no_number_is_the_worst_and_trusts_nothing(shares: tuple[float, ...]) -> None:
    for is_ratio in (True, False):
        found = verdict(site(is_ratio=is_ratio), off_by(*shares))
        assert math.isnan(found.worst)
        assert not found.is_trusted


def test_a_slower_machine_is_seen_where_milliseconds_are_limited_and_not_in_a_ratio() -> None:
    rows = off_by(0.0, 0.01, slower=1.5)
    assert verdict(site(), rows).is_trusted
    found = verdict(site(is_ratio=False), rows)
    assert found.errors == pytest.approx((0.5, 0.515))
    assert not found.is_trusted


def test_a_sentinel_that_cannot_be_timed_is_no_trust() -> None:
    assert not verdict(site(), off_by(0.0), "out-of-memory: no memory").is_trusted


def test_sentinels_are_the_first_of_the_stacks_that_a_fit_is_held_against() -> None:
    file = loads(spec_with(RATIO).replace("length: 3", "length: 9").replace("[1, 2]", "[1, 8]"))
    drawn = design(file)
    fitted = {stack.hash for stack in drawn.fitted}
    first = [stack.hash for stack in held_out_stacks(file, 5)]
    unseen = [stack.hash for stack in drawn.held_out]
    assert [hash_ for hash_ in first if hash_ not in fitted] == unseen[: sum(h not in fitted for h in first)]


class Timer:
    """Notes what it is asked to time, and answers with timings that are off by a share."""

    def __init__(self, *shares: float) -> None:
        self.shares, self.asked = shares, list[Job]()

    def __call__(self, jobs: Sequence[Job]) -> Iterator[Answer]:
        self.asked += jobs
        rows = off_by(*(self.shares * 5)[: len(jobs)])
        for job, (stack, timed) in zip(jobs, rows, strict=True):
            assert job.tag.hash == stack.hash
            yield Answer(job, timed)


def test_each_fit_of_a_budget_is_judged_once_beside_its_reference() -> None:
    file = file_of(RATIO, RATIO.replace("1.1", "2"), "parameters: {at_most: 1M}", RATIO.replace("64", "32"))
    budgets = [
        asdict(BudgetInfo(label, phase, 1.1, beside, 1, context))
        for label, phase, beside, context in (
            ("decode_ms@1x64", "decode", "all-full", 64),
            ("decode_ms@1x64#2", "decode", "all-full", 64),
            ("parameters", "parameters", None, 0),
            ("decode_ms@1x32", "decode", "all-full", 32),
        )
    ]
    timer, model = Timer(0.02), model_of(file)
    (found,) = judged(file, model, budgets, timer, HOW)
    assert (found.label, found.margin, len(found.errors)) == ("decode_ms@1x64", 0.05, 5)
    assert found.is_trusted
    assert len(timer.asked) == 5
    made = timer.asked[0].call
    assert isinstance(made, partial)
    assert made.func is measure
    assert made.keywords["reference_name"] == "all-full"
    # Without a margin there is nothing to lose.
    bare = replace(
        model, fits=(replace(model.fits[0], held_out=replace(model.fits[0].held_out, margin=None)),)
    )
    assert judged(file, bare, budgets, Timer(0.0), HOW) == []


def told(*verdicts: Verdict) -> tuple[str, str]:
    return changed_software.told({"torch": ["1", "2"]}, {"places": [one.data() for one in verdicts]})


def test_what_is_said_follows_from_the_sentinels() -> None:
    good, bad = verdict(site(), off_by(0.01, -0.03)), verdict(site(), off_by(0.01, -0.2))
    assert told(good)[1] == "info"
    assert (
        "trusted all the same; decode_ms@1x64: 2 specs timed now are within its margin (worst -3.0"
        in told(good)[0]
    )
    text, level = told(good, bad)
    assert level == "warning"
    assert "of 2 specs timed now 1 are beyond its margin (worst -20.0 of ± 5.0 %)" in text
    assert "where it is not trusted" in text
    assert "rules nothing out" in told(bad)[0]
    assert "rules nothing out" in told()[0]
    assert "no memory" in told(replace(good, failure="no memory"))[0]


# A search.


def searched(folder: Path, margin: float, **machine: str) -> Run:
    """A search of four trials with a model of other software whose margin is as wide as it is told to be."""
    folder.mkdir()
    text = spec_with(RATIO, more=BY_MODEL).replace("trials: 12\n  round: 12", "trials: 4\n  round: 4")
    (folder / "spec.yaml").write_text(text)
    file = load(folder / "spec.yaml")
    model_of(file, margin=margin, machine=timing_environment("cpu") | machine).save(folder / "model.json")
    return search(file, folder / "run", effort=QUICK, evaluate=scored)


@pytest.mark.usefixtures("workers")
def test_a_model_whose_sentinels_hold_keeps_its_margin_and_is_not_asked_again(tmp_path: Path) -> None:
    """With a margin of a thousand times what it predicts."""
    run = searched(tmp_path / "a", 1e3, torch="1.0")
    assert load_model(run.path / RUN_COPY).fits[0].held_out.margin == 1e3
    (place,) = run.meta["latency_sentinels"]["places"]
    assert place["trusted"]
    assert len(place["errors"]) == 5
    told = [
        event for event in run.events if event["event"] == "message" and "torch 1.0 then" in event["text"]
    ]
    assert [(event["level"], "trusted all the same" in event["text"]) for event in told] == [("info", True)]
    assert any("the model was trusted" in line for line in sentences(run))
    again = search(
        load(tmp_path / "a" / "spec.yaml"), run.path, resume=True, trials=5, effort=QUICK, evaluate=scored
    )
    assert again.meta["latency_sentinels"] == run.meta["latency_sentinels"]
    lock = read_lock(run.path / LOCK_FILE)
    assert lock["latency_model"]["fits"][0]["held_out"]["margin"] == 1e3
    assert (
        replay(run.path / LOCK_FILE, tmp_path / "replay", evaluate=scored).run.meta["latency_sentinels"] == {}
    )


@pytest.mark.usefixtures("workers")
def test_a_model_whose_sentinels_are_off_rules_nothing_out(tmp_path: Path) -> None:
    """The made-up one predicts milliseconds where microseconds pass."""
    run = searched(tmp_path / "a", 1e-3, torch="1.0")
    (place,) = run.meta["latency_sentinels"]["places"]
    assert not place["trusted"]
    assert all(trial.latency and trial.figures["decode_ms@1x64"].margin is None for trial in run.trials)
    warned = [event["text"] for event in run.events if event.get("level") == "warning"]
    assert any("torch 1.0 then" in text and "beyond its margin" in text for text in warned)
    assert any("beyond its margin" in line for line in sentences(run))


@pytest.mark.usefixtures("workers")
def test_with_the_software_of_the_fit_nothing_is_timed_for_it(tmp_path: Path) -> None:
    run = searched(tmp_path / "a", 0.05)
    assert run.meta["latency_sentinels"] == {}
    assert run.meta["latency_changed"] == {}
