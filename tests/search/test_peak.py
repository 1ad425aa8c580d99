"""The peak of memory beside a timing: exact for tensors, the same each time, budgeted, recorded and replayed."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from predicted_search import DECODE, QUICK, scored, spec_with

from heddle.compose.build import build_causal_lm
from heddle.compose.plan import plan
from heddle.dashboards import words
from heddle.dashboards.report import write_report
from heddle.errors import HeddleError
from heddle.search.latency import Place, measure
from heddle.search.limits import budgets_on
from heddle.search.lock import LOCK_FILE
from heddle.search.peak import held_bytes, peak_bytes
from heddle.search.record import Latency, Run
from heddle.search.replay import Replay, replay
from heddle.search.run import search
from heddle.search.workers import Workers
from heddle.specs import loads

KB = 256
# All that have one full layer take less, not all that have two.
LIMIT = 0.87
PEAK = f"peak_bytes: {{at_most: {LIMIT}, relative_to: all-full, batch: 16, context: 64}}"


def test_the_peak_of_a_call_is_exact_to_the_byte() -> None:
    held = torch.ones(2 * KB)

    def call() -> torch.Tensor:
        first = torch.add(held, held)
        second = torch.add(first, held)
        del first
        return torch.add(second[:KB], second[KB:])

    # 2 KB are held; the two of 2 KB are there at once, the second and 1 KB for the sum later.
    assert peak_bytes(call, [held], "cpu") == 6 * 1024
    assert peak_bytes(lambda: None, [held], "cpu") == 2 * 1024


def test_memory_that_tensors_share_is_counted_once() -> None:
    whole = torch.ones(4 * KB)
    assert held_bytes([whole, whole[:KB], whole.view(2, -1), torch.ones(KB)]) == 5 * 1024


def test_an_operation_that_takes_memory_for_itself_is_seen() -> None:
    """The attention of a CPU has a buffer of its own, which is no tensor of Python's."""
    q = torch.ones(1, 2, 128, 32)
    taken = peak_bytes(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q), [], "cpu")
    assert taken > q.numel() * 4


def test_a_row_has_the_peak_of_the_model_and_of_its_reference() -> None:
    file = loads(spec_with(DECODE))
    narrow, wide = (file.resolve({"blocks.full.channel.ratio": ratio}).model for ratio in (1.0, 2.0))
    place = Place("prefill", 4, 64)
    row = measure(wide, place, reference=narrow, reference_name="narrow", device="cpu", effort=QUICK)
    assert row.peak_bytes is not None
    assert row.reference_peak_bytes is not None
    assert row.peak_ratio == row.peak_bytes / row.reference_peak_bytes
    weights = plan(wide).parameters * 4
    cost = plan(wide).cost(64, 4)
    assert row.peak_bytes > weights + 2 * (cost["cache_bytes"] + cost["state_bytes"])
    more = (plan(wide).parameters - plan(narrow).parameters) * 4
    assert row.peak_bytes - row.reference_peak_bytes > more
    alone = measure(narrow, place, device="cpu", effort=QUICK)
    assert (alone.peak_bytes, alone.peak_ratio) == (row.reference_peak_bytes, None)
    assert Latency(**json.loads(json.dumps(asdict(row)))) == row


def test_a_decode_step_holds_weights_and_cache_and_little_else() -> None:
    model = loads(spec_with(DECODE)).spec.model
    held = []
    for context in (64, 4096):
        row = measure(model, Place("decode", 2, context), device="cpu", effort=QUICK)
        cached = build_causal_lm(model, seed=0).decode_cache(2, context)
        tensors = [tensor for layer in cached.layers for tensor in layer.tensors().values()]
        assert row.peak_bytes is not None
        held.append(row.peak_bytes - plan(model).parameters * 4 - held_bytes(tensors))
    # One token's activations, and a mask and buffers by the context.
    assert 0 < held[0] < 64 * 1024
    assert 0 < held[1] < 64 * 1024 + 4096 * 2 * 16


def test_a_peak_and_a_time_of_one_place_are_of_one_timing() -> None:
    budgets = (
        "peak_bytes: {at_most: 1M, batch: 16, context: 64}",
        "prefill_ms: {at_most: 50, batch: 16, context: 64}",
        "peak_bytes: {at_most: 1.5, relative_to: all-full, batch: 16, context: 64}",
        "peak_bytes: {at_most: 1M, of: decode, context: {cpu: 64, cuda: 4096}}",
    )
    found = budgets_on(loads(spec_with(*budgets)), "cpu")
    assert [one.label for one in found] == [
        "prefill_peak_bytes@16x64",
        "prefill_ms@16x64",
        "prefill_peak_bytes@16x64#2",
        "decode_peak_bytes@1x64",
    ]
    assert [one.timing for one in found] == [
        "prefill_ms@16x64",
        "prefill_ms@16x64",
        "prefill_ms@16x64#2",
        "decode_ms@1x64",
    ]
    assert [one.is_timed for one in found] == [False, True, False, False]
    assert all(one.is_measured for one in found)
    assert [words.budget_text(one) for one in found[::2]] == [
        "prefill peak bytes at most 977 KiB (batch 16, context 64)",
        "prefill peak bytes at most 1.5 × all-full (batch 16, context 64)",
    ]


@pytest.fixture(scope="module")
def run(workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A search whose one budget is a peak."""
    assert workers.parallel
    file = loads(spec_with(PEAK))
    return search(file, tmp_path_factory.mktemp("peak") / "run", effort=QUICK, evaluate=scored, trials=6)


@pytest.fixture(scope="module")
def again(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Replay:
    out = tmp_path_factory.mktemp("peak-replay") / "run"
    return replay(run.path / LOCK_FILE, out, evaluate=scored, effort=QUICK)


def test_a_search_keeps_a_budget_of_the_peak(run: Run) -> None:
    states = set()
    for trial in run.trials:
        row = trial.latency["prefill_ms@16x64"]
        here = measure(loads(trial.spec).spec.model, Place("prefill", 16, 64), device="cpu", effort=QUICK)
        assert row.peak_bytes == here.peak_bytes
        assert row.peak_ratio is not None
        assert trial.constraints == {"prefill_peak_bytes@16x64": row.peak_ratio / LIMIT - 1.0}
        assert trial.state == ("infeasible" if row.peak_ratio > LIMIT else "complete")
        states.add(trial.state)
    assert states == {"infeasible", "complete"}
    assert run.best_trial is not None
    again = run.best_trial.remeasured["prefill_ms@16x64"]
    assert again.peak_bytes == run.best_trial.latency["prefill_ms@16x64"].peak_bytes


def test_the_report_and_the_summary_tell_the_peak(run: Run, tmp_path: Path) -> None:
    best = run.best_trial
    assert best is not None
    row = best.latency["prefill_ms@16x64"]
    page = write_report(run, tmp_path / "report.html").read_text()
    assert f"prefill peak bytes ÷ all-full (allowed {LIMIT})" in page
    assert "Peak memory" in page
    assert words.peak_text(row) in page
    assert f"prefill peak bytes {row.peak_ratio:.3f} × all-full, allowed {LIMIT}" in words.headline(run)
    assert best.summary()["latency"]["prefill_ms@16x64"]["peak_bytes"] == row.peak_bytes


def test_a_replay_takes_peaks_from_the_lockfile(run: Run, again: Replay) -> None:
    assert again.changes == ()
    for ours, theirs in zip(again.run.trials, run.trials, strict=True):
        assert ours.latency == theirs.latency
        assert ours.constraints == theirs.constraints
    timed = [e for e in again.run.events if e["event"] == "evaluation_started" and e["stage"] == "latency"]
    assert {event["number"] for event in timed} == {-1, *run.front}
    assert again.moved
    for moved in again.moved:
        assert moved.then_bytes == moved.now_bytes is not None
        assert not moved.is_peak_other
        assert replace(moved, now_bytes=1).is_peak_other
        assert not replace(moved, then_bytes=None).is_peak_other


def test_a_row_of_before_peaks_were_measured_is_still_read(run: Run) -> None:
    old = asdict(run.trials[0].latency["prefill_ms@16x64"])
    del old["peak_bytes"], old["reference_peak_bytes"]
    row = Latency(**old)
    assert (row.peak_bytes, row.peak_ratio, words.peak_text(row)) == (None, None, "–")


def test_a_peak_of_what_is_never_run_is_told_at_the_field() -> None:
    with pytest.raises(HeddleError) as caught:
        loads(spec_with("peak_bytes: {at_most: 1G, of: prefil, context: 64}"))
    assert caught.value.where.path == "search.budgets.0.peak_bytes.of"
    assert "prefill" in str(caught.value)
