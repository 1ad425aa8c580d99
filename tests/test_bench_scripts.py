"""The scripts of tests/bench that wait for a GPU run here in their small form."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
from bench import evidence

BENCH = Path(__file__).parent / "bench"


SCRIPTS = {
    "layer_check": (),
    "learning_check": ("--workers", "1", "--kinds", "dense", "nats_l", "--rows", "none.jsonl"),
    "glue_check": (),
    "misses_check": (),
    "truth_step": (),
    "packed_check": (),
    "padded_check": (),
    "peak_memory": ("--only", "head_sparse_attention", "layer, landmark"),
    "example_models": ("--workers", "1", "--kinds", "layer_router", "--rows", "none.jsonl"),
}
LONG = {"example_models", "truth_step"}


@pytest.mark.parametrize(
    "script", [pytest.param(name, marks=pytest.mark.long if name in LONG else ()) for name in SCRIPTS]
)
def test_a_script_for_the_gpu_finds_nothing_wrong_in_its_small_form(script: str, tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH / f"{script}.py"), "--tiny", "--out", str(tmp_path)]
    command += [*SCRIPTS[script], "--budget", "100", "--commit", "none"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = [json.loads(line) for path in tmp_path.glob("*.jsonl") for line in path.read_text().splitlines()]
    assert rows
    assert all(row["commit"] == "none" for row in rows)


def test_rows_of_the_truth_set_are_joined_and_tell_how_hard_it_is(tmp_path: Path) -> None:
    # Two placements that no seed tells apart, one that is worse; the parts of two GPUs.
    scores = {"FLLLLLLL": [0.90, 0.91, 0.92], "LFLLLLLL": [0.905, 0.90, 0.92], "LLFLLLLL": [0.5, 0.52, 0.51]}
    for part, names in enumerate((["FLLLLLLL", "LLFLLLLL"], ["LFLLLLLL"])):
        rows = [{"placement": name, "full": 1, "mqar": {"scores": {"0.001": scores[name]}}} for name in names]
        (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parts = [str(tmp_path / f"{part}.jsonl") for part in range(2)]
    command = [sys.executable, str(BENCH / "truth_set.py"), "join", *parts]
    command += ["--rows", str(tmp_path / "none.jsonl"), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "50% of 3 placements with at most 3 full layers are within noise of the best" in done.stdout
    assert len((tmp_path / "none.jsonl").read_text().splitlines()) == 3


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
    job = (kind, index, "cpu", 3e-3, 0, True, 512)
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
