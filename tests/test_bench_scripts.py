"""The scripts of tests/bench that wait for a GPU run here in their small form."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import evidence, latency_row, truth_told
from predicted_search import DECODE, model_of, spec_with
from torch._subclasses.fake_tensor import FakeTensorMode

from heddle.compose.modules.softmax import softmax_attention
from heddle.search.timing_quality import TimingQuality
from heddle.specs import loads

BENCH = Path(__file__).parent / "bench"


# Tells of each script that it is told how it ended. What all of them import takes seconds, so each is run by a fork that has it.
FORKS = """
import json, os, runpy, sys
import heddle.compose.build, heddle.kernels.bench, heddle.search.tasks
for line in sys.stdin:
    told, *arguments = json.loads(line)
    child = os.fork()
    if child:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    file = os.open(told, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = arguments
    sys.path.insert(0, os.path.dirname(arguments[0]))
    runpy.run_path(arguments[0], run_name="__main__")
    sys.exit()
"""
Script = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def run_script(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Script]:
    """Runs a script of tests/bench in a process of its own; gives its exit status and what it told."""
    told, pipe = tmp_path_factory.mktemp("told") / "told.txt", subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", FORKS], stdin=pipe, stdout=pipe, text=True) as forks:

        def run(script: str, *arguments: str) -> tuple[int, str]:
            assert forks.stdin is not None
            assert forks.stdout is not None
            told.unlink(missing_ok=True)
            forks.stdin.write(json.dumps([str(told), str(BENCH / f"{script}.py"), *arguments]) + "\n")
            forks.stdin.flush()
            return int(forks.stdout.readline()), told.read_text()

        yield run


SCRIPTS = {
    "layer_check": (),
    "learning_check": ("--workers", "1", "--kinds", "dense", "nats_l", "--rows", "none.jsonl"),
    "glue_check": (),
    "layer_times": (),
    "misses_check": (),
    "truth_step": (),
    "packed_check": (),
    "padded_check": (),
    "peak_memory": ("--only", "head_sparse_attention", "token_split_attention", "layer, landmark"),
    "window_check": ("--only", "capped"),
    "example_models": ("--workers", "1", "--kinds", "layer_router", "--rows", "none.jsonl"),
}
LONG = {"example_models", "truth_step"}


@pytest.mark.parametrize(
    "script", [pytest.param(name, marks=pytest.mark.long if name in LONG else ()) for name in SCRIPTS]
)
def test_a_script_for_the_gpu_finds_nothing_wrong_in_its_small_form(
    script: str, run_script: Script, tmp_path: Path
) -> None:
    always = ("--tiny", "--out", str(tmp_path), "--budget", "100", "--commit", "none")
    status, told = run_script(script, *SCRIPTS[script], *always)
    assert status == 0, told[-6000:]
    rows = [json.loads(line) for path in tmp_path.glob("*.jsonl") for line in path.read_text().splitlines()]
    assert rows
    assert all(row["commit"] == "none" for row in rows)


@pytest.mark.parametrize("kind", ["still", "nats_l", pytest.param("token_router", marks=pytest.mark.long)])
def test_a_layer_keeps_its_goal_of_memory_by_a_count_of_live_tensors(kind: str, run_script: Script) -> None:
    status, told = run_script("live_tensors", kind)
    assert status == 0, told[-6000:]


def test_a_long_mask_that_wants_a_gradient_keeps_no_weights_of_grouped_heads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    tensors = import_module("live_tensors")
    with tensors.as_on_cuda(), FakeTensorMode(), tensors.Live() as live:
        q, k, v = (
            torch.empty(1, heads, count, 128, dtype=torch.bfloat16, requires_grad=True)
            for heads, count in ((16, 128), (2, 16_384), (2, 16_384))
        )
        mask = torch.empty(1, 1, 128, 16_384, requires_grad=True)
        o = softmax_attention(q, k, v, mask)
        torch.autograd.grad(o, (q, k, v, mask), o)
    # Keys, values, their gradients and one of each mask: 2.3 times the weights in float32. By the math path it was 6.5 times.
    assert live.most < 3 * 16 * 128 * 16_384 * 4


def test_rows_of_the_truth_set_are_joined_and_tell_how_hard_it_is(tmp_path: Path) -> None:
    # Two placements that no seed tells apart, one that is worse; the parts of two GPUs.
    scores = {"FLLLLLLL": [0.90, 0.91, 0.92], "LFLLLLLL": [0.905, 0.90, 0.92], "LLFLLLLL": [0.5, 0.52, 0.51]}
    for part, names in enumerate((["FLLLLLLL", "LLFLLLLL"], ["LFLLLLLL"])):
        told = {name: {"scores": {"0.001": scores[name]}, "chance": 0.05} for name in names}
        rows = [{"placement": name, "full": 1, "mqar": told[name]} for name in names]
        (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parts = [str(tmp_path / f"{part}.jsonl") for part in range(2)]
    command = [sys.executable, str(BENCH / "truth_set.py"), "join", *parts]
    command += ["--rows", str(tmp_path / "none.jsonl"), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "50% of 3 placements with at most 3 full layers are within noise of the best" in done.stdout
    assert len((tmp_path / "none.jsonl").read_text().splitlines()) == 3


def truth_row(name: str) -> dict[str, Any]:
    """A placement that is the better and the slower the more full layers it has, of jobs of a second on a GPU."""
    full, told = name.count("F"), {"device": "none", "workers": 2, "job_seconds": 2.0}
    scores = {"0.003": [0.1 * full + 0.01 * seed for seed in range(3)]}
    recall = {"scores": scores, "chance": 0.05, "seconds": 1.0, **told}
    ms = {"ratio": 0.5 + full, "reference_ms": 2.0, **told, "workers": 1}
    return {"placement": name, "full": full, "multi_hop_recall": recall, "decode_ms@1x64": ms}


def test_rows_of_the_truth_set_tell_its_ratio_curve_and_what_it_took() -> None:
    rows = {name: truth_row(name) for name in map("".join, product("LF", repeat=3))}
    curve = list(truth_told.ratio_curve(rows))
    assert curve[0] == "| full layers | placements | multi_hop_recall | decode, ms |"
    assert curve[4] == "| 2 | 3 | 0.2100 (0.2100 – 0.2100) | 5.0000 (5.0000 – 5.0000) |"
    assert list(truth_told.spent(rows))[-1] == "in all 24 GPU seconds, 0.01 hours"
    assert any("of 4 placements within the 25 % quantile" in line for line in truth_told.hardness(rows))


def test_a_row_of_a_latency_model_tells_how_wide_its_timings_were() -> None:
    model = model_of(loads(spec_with(DECODE)))
    labels = {name[1]: name[1] for name in model.fits[0].sum.weights}
    seen = TimingQuality(n=50, median_width=0.012, wide=31, foreign=0, throttled=0, unchecked=50, repeated=0)
    (fit,) = model.fits
    row = json.loads(
        json.dumps(latency_row.of_fit(replace(model, labels=labels), replace(fit, timings=seen)))
    )
    assert row["timings"] == asdict(seen)
    assert len(row["held_out"]["pairs"]) == 4


def test_rows_of_the_truth_set_tell_which_rate_was_best() -> None:
    # At the second rate all do better, and the order of the first is turned round.
    rows = {name: truth_row(name) for name in map("".join, product("LF", repeat=3))}
    for row in rows.values():
        scores = row["multi_hop_recall"]["scores"]
        scores["0.009"] = [2.0 - one for one in scores["0.003"]]
    rate, *_, whole = truth_told.by_rate(rows)
    assert (
        "of 8 placements is 0.003 of 0 (mean 0.1600), 0.009 of 8 (mean 1.8400); tau-b between two rates -1.00"
        in rate
    )
    # In the mean over rates all are equal, so the first counts.
    assert whole.startswith(
        "multi_hop_recall: at 0.009 alone the best is LLL, and the best of all rates, LLL, 0% off"
    )
    assert not list(truth_told.by_rate({name: truth_row(name) for name in ("LF", "FF")}))


def test_a_training_on_text_tells_of_recall_as_well() -> None:
    extras = {"repeated_bits_per_byte": [1.5, 1.4, 1.6], "other_bits_per_byte": [2.0, 2.1, 2.2]}
    text = {"scores": {"0.003": [1.9, 1.8, 2.0]}, "extras": {"0.003": extras}, "chance": 8.0}
    failed = {"scores": {"0.01": [None] * 3, **text["scores"]}, "extras": {"0.01": {}, "0.003": extras}}
    assert truth_told.told_of({"text": failed}, "text recall")["scores"]["0.01"] == [None] * 3
    rows = {"FL": {"placement": "FL", "full": 1, "text": text}}
    assert truth_told.tasks_of(rows) == ["text", "text recall"]
    assert truth_told.scores_of(rows, "text recall") == {"FL": [1.5, 1.4, 1.6]}
    assert truth_told.sign("text recall") < 0.0


def test_more_seeds_stand_behind_the_first() -> None:
    parts = []
    for seeds, workers in (([1.9, 1.8, 2.0], 6), ([1.7, 1.6, 1.5], 3)):
        extras = {"0.003": {"repeated_bits_per_byte": [one - 1.0 for one in seeds]}}
        told = {"scores": {"0.003": seeds}, "extras": extras, "chance": 8.0}
        parts.append({**told, "seconds": 30.0, "workers": workers, "job_seconds": 36.0, "device": "none"})
    row = {"placement": "FL", "full": 1, "text": parts[0], "text, more seeds": parts[1]}
    rows = {"FL": row, "LF": {**row, "placement": "LF"}}
    assert truth_told.tasks_of(rows) == ["text", "text recall"]
    assert truth_told.scores_of(rows, "text")["FL"] == [1.9, 1.8, 2.0, 1.7, 1.6, 1.5]
    assert truth_told.scores_of(rows, "text recall")["FL"] == pytest.approx([0.9, 0.8, 1.0, 0.7, 0.6, 0.5])
    assert truth_told.told_of(row, "text")["seconds"] == 90.0
    assert list(truth_told.spent(rows))[-1] == "in all 36 GPU seconds, 0.01 hours"
    # A piece that was cut off: not all have them yet.
    del rows["LF"]["text, more seeds"]
    assert truth_told.scores_of(rows, "text")["FL"] == [1.9, 1.8, 2.0]
    assert list(truth_told.hardness(rows))
    # All trainings of the second three failed.
    lost = {**parts[1], "scores": {"0.003": [None] * 3}, "extras": {"0.003": {}}}
    told = truth_told.told_of({**row, "text, more seeds": lost}, "text recall")
    first = parts[0]["extras"]["0.003"]["repeated_bits_per_byte"]
    assert told["scores"]["0.003"] == [*first, None, None, None]


def test_more_seeds_are_trained_of_all_tasks_where_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCH)
    truth_set = import_module("truth_set")
    kind = truth_set.Kind(truth_set.train, ["text" + truth_told.MORE], [1], "scores", 1)
    space = truth_set.Space(truth_set.load(truth_set.SPEC))
    chosen = argparse.Namespace(tasks=None, only=2, share="0/1")
    assert len(truth_set.jobs(space, {}, kind, chosen)) == 2
    with pytest.raises(SystemExit, match="no recal: there is text"):
        truth_set.jobs(space, {}, kind, argparse.Namespace(tasks=["recal"], only=2, share="0/1"))


def test_what_all_placements_share_of_a_seed_is_no_noise() -> None:
    scores = {"FL": [1.0, 2.0, 3.0], "LF": [1.5, 2.5, 3.5]}
    assert truth_told.noise(scores) == pytest.approx(0.0)
    scores["LF"] = [1.5, 2.5, 3.8]
    # Two placements that differ by 0.5, 0.5 and 0.8: the standard error of the mean of three differences is 0.1.
    assert truth_told.noise(scores) == pytest.approx(0.2)


def test_the_score_of_a_seed_is_its_mean_over_rates_and_a_failed_training_is_at_chance() -> None:
    told = {"scores": {"0.002": [0.9, None, 0.7], "0.003": [0.5, 0.4, 0.9]}, "chance": 0.2}
    assert truth_told.seed_scores(told) == pytest.approx([0.7, 0.3, 0.8])


@pytest.mark.parametrize("control", [None, "duplicate", "infeasible"])
def test_ways_to_search_are_judged_at_the_tasks_of_the_rows(control: str | None, tmp_path: Path) -> None:
    rows, out = tmp_path / "rows.jsonl", tmp_path / "judged.jsonl"
    names = map("".join, product("LF", repeat=5))
    rows.write_text("".join(json.dumps(truth_row(name)) + "\n" for name in names))
    command = [sys.executable, str(BENCH / "truth_judge.py"), "--rows", str(rows), "--out", str(out)]
    command += ["--repeats", "1", *(["--control", control] if control else [])]
    command += ["--ways", "first K", "loop", "heddle search"]
    subprocess.run(command, capture_output=True, check=True)
    judged = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["task"] for row in judged} == {"multi_hop_recall"}
    gaps = {(row["impl"], row["budget_quantile"]): row["gap"][-1] for row in judged}
    assert len(gaps) == 9
    if control is None:
        # Full layers alone decide: whatever places as many as fit is right.
        assert gaps["first K", 0.5] == gaps["loop", 0.5] == gaps["heddle search", 0.5] == 0.0
    assert (set(gaps.values()) == {None}) == (control == "infeasible")


def test_a_regret_has_an_interval_over_draws_of_placements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCH)
    judge = import_module("evaluators_judge")
    names = list(map("".join, product("LF", repeat=6)))
    score = {name: float(int(name.replace("F", "1").replace("L", "0"), 2)) for name in names}
    assert judge.regret_interval(score, score, names) == [0.0, 0.0]
    low, high = judge.regret_interval({name: -one for name, one in score.items()}, score, names)
    # The worst five: twice the way from the best to the median, less four of 31.5 steps.
    assert low < judge.regret({name: -one for name, one in score.items()}, score, names) == 59 / 31.5 < high
    equal = dict.fromkeys(names, 0.0)
    low, high = judge.regret_interval(equal, score, names)
    assert 0.0 < low < judge.regret(equal, score, names) < high < 1.0
    assert judge.regret_interval(score, equal, names) is None


def test_evaluators_value_each_placement_of_a_spec(tmp_path: Path) -> None:
    none, spec = str(tmp_path / "none.jsonl"), str(BENCH / "truth_tiny.yaml")
    command = [
        sys.executable,
        str(BENCH / "evaluators_judge.py"),
        "--only",
        "short",
        "counting",
        "--spec",
        spec,
    ]
    command += ["--workers", "1", "--out", str(tmp_path), "--truth", none, "--values", none, "--dry"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "failed" not in done.stdout
    lines = (tmp_path / "evaluators_8x2.jsonl").read_text().splitlines()
    short = [row for row in map(json.loads, lines) if row["kind"] == "short"]
    assert {(row["task"], row["share"]) for row in short} == set(product(("mqar", "text"), (0.1, 0.25)))
    assert all(len(row["values"]) == 8 and None not in row["values"].values() for row in short)


@pytest.mark.parametrize(
    ("spec", "index", "task", "readout"),
    [
        ("encoders", 0, "paragraph_topic", "ep"),
        ("encoders", 1, "masked_bytes", "ep"),
        ("encoders_masked", 0, "masked_bytes", None),
    ],
)
def test_evidence_of_an_encoder_is_a_row_that_is_not_made_again(
    spec: str, index: int, task: str, readout: str | None, tmp_path: Path
) -> None:
    path, kind = str(BENCH / f"{spec}.yaml"), "inline, causal false"
    job = (kind, index, "cpu", 3e-3, 0, True, 512, "eager")
    row = evidence.told(path, job, math.inf)
    assert row is not None
    assert (row["task"], row.get("readout"), row.get("error")) == (task, readout, None)
    assert row["extras"]
    assert evidence.told(path, job, 0.0) is None
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({**row, "device": device}) + "\n" for device in ("one", "other")))
    assert evidence.scored(rows, "one") == {(task, row["spec_hash"], 3e-3, 0)}
    assert evidence.scored(rows, "third") == set()


@pytest.mark.parametrize("spec", ["encoders", "encoders_masked"])
def test_the_kinds_of_encoders_have_names_of_their_own(spec: str) -> None:
    names = [name for name, _ in evidence.kinds(str(BENCH / f"{spec}.yaml"), pure=True)]
    assert len(set(names)) == len(names) == 13
    assert "attention, causal false" in names
