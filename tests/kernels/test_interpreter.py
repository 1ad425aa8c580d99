"""The Triton paths, run by Triton's interpreter: the same tests, in a process of their own.

Triton decides when it is imported whether kernels are compiled or interpreted, so this cannot be switched for one test.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


# Kernels take long to interpret; this takes each road of them once. The two delta rules share theirs.
SOME = "65 or packed or token or scratch"
DELTA = f"gated_delta_rule and ({SOME}) or delta_rule-cpu-float32 and 65 and not gated"


GLA = "gla and not simple"
# All gradients of one form, ragged heads in half precision, a list in three parts.
BLOCKS = "reference and gates and float32 or odd and group and float16 or split and 3-listed and float32"
# Each option once in full precision, one form in half, tiles, and a mixer's decode steps.
LAYER = "gated_delta_layer and (odd and float32 or plain and float16 or tiles or window_moves or mixer and float32)"
# Sinks in half precision, packed sequences by descriptors, keys of a step in three parts.
WINDOWS = "reference and many and float16 or descriptors and packed-1-cpu and float32 or split and 3-cpu and float32"
KDA = "kda-cpu-float32 and 65 or kda-cpu-float16 and packed_sequences"


@pytest.mark.parametrize("op", ["decay_attention", "simple_gla", "delta_rule", GLA, "kda"])
def test_interpreted_kernels_keep_the_contract(op: str, full_counts: bool) -> None:
    some = {"delta_rule": DELTA, GLA: f"{GLA} and (65 or packed)", "kda": KDA}.get(op, f"{op} and ({SOME})")
    _run_interpreted("tests/contracts/test_ops.py", chosen=op if full_counts else some)


def test_interpreted_block_attention_and_layer_step_are_right() -> None:
    files = ("tests/kernels/test_block_attention_kernels.py", "tests/kernels/test_gated_delta_layer.py")
    _run_interpreted(*files, chosen=f"{BLOCKS} or {LAYER}")


def test_interpreted_launchers_are_repeated() -> None:
    _run_interpreted("tests/kernels/test_replay.py", chosen="cpu")


def test_interpreted_sliding_window_attention_is_right() -> None:
    _run_interpreted("tests/kernels/test_sliding_window_attention.py", chosen=WINDOWS)


# Long: the same tests run on a GPU by `make test-gpu`.
@pytest.mark.long
@pytest.mark.parametrize(
    "op",
    [
        "decay_attention",
        "simple_gla",
        "gated_delta_rule",
        "gla",
        "kda",
        "block_attention_kernels",
        "gated_delta_layer",
        "sliding_window_attention",
    ],
)
def test_interpreted_kernels_are_right_where_they_are_peculiar(op: str) -> None:
    _run_interpreted(f"tests/kernels/test_{op}.py", chosen=op)


def _run_interpreted(*files: str, chosen: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    # What xdist tells its own workers is not for this process.
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
    choice = ["-m", "not gpu and not long", "-k", chosen, "-p", "no:cacheprovider", "-q"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *files, *choice],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
