"""The scripts of tests/bench that wait for a GPU run here in their small form."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent / "bench"


SCRIPTS = {
    "layer_check": (),
    "learning_check": ("--workers", "1", "--kinds", "dense", "nats_l", "--rows", "none.jsonl"),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_for_the_gpu_finds_nothing_wrong_in_its_small_form(script: str, tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH / f"{script}.py"), "--tiny", "--out", str(tmp_path)]
    command += [*SCRIPTS[script], "--budget", "100", "--commit", "none"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = [json.loads(line) for path in tmp_path.glob("*.jsonl") for line in path.read_text().splitlines()]
    assert rows
    assert all(row["commit"] == "none" for row in rows)
