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


# The kernels of the delta rules take long to interpret; the two ops share them.
DELTA = (
    "gated_delta_rule and (65 or packed or token or scratch) or delta_rule-cpu-float32 and 65 and not gated"
)


@pytest.mark.parametrize("op", ["decay_attention", "simple_gla"])
@pytest.mark.parametrize("file", ["tests/contracts/test_ops.py", "tests/kernels/test_{op}.py"])
def test_interpreted_kernels_keep_the_contract(file: str, op: str) -> None:
    _run_interpreted(file.format(op=op), op)


@pytest.mark.parametrize(
    ("file", "choice"),
    [("tests/contracts/test_ops.py", DELTA), ("tests/kernels/test_gated_delta_rule.py", "delta_rule")],
)
def test_interpreted_kernels_of_the_delta_rules_keep_the_contract(file: str, choice: str) -> None:
    _run_interpreted(file, choice)


def _run_interpreted(file: str, chosen: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    # What xdist tells its own workers is not for this process.
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
    choice = ["-m", "not gpu and not long", "-k", chosen, "-p", "no:cacheprovider", "-q"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", file, *choice],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
