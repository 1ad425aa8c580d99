"""The Triton paths, run by Triton's interpreter: the same tests, in a process of their own.

Triton decides when it is imported whether kernels are compiled or interpreted, so this cannot be switched for one test.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


# Kernels take long to interpret; this takes each road of them once, packed sequences in half precision. The two delta rules
# share theirs.
SOME = "65 or packed and not float32 or token or scratch"
OPS = {
    "decay_attention": SOME,
    "simple_gla": SOME,
    "delta_rule": f"gated and ({SOME}) or delta_rule-cpu-float32 and 65 and not gated",
    "gla and not simple": "65 or packed and not float32",
    "kda": "kda-cpu-float32 and 65 or kda-cpu-float16 and packed_sequences",
}
# All gradients of one form, ragged heads in half precision, a list in three parts.
BLOCKS = "reference and gates and float32 or odd and group and float16 or split and 3-listed and float32"
CONTRACTS, BLOCK_TESTS = "tests/contracts/test_ops.py", "tests/kernels/test_block_attention_kernels.py"


def test_interpreted_kernels_keep_the_contract_and_block_attention_is_right(full_counts: bool) -> None:
    # In one process: each imports torch anew, and collects all tests.
    chosen = [f"test_ops and {op}" + ("" if full_counts else f" and ({some})") for op, some in OPS.items()]
    chosen.append(f"test_block_attention_kernels and ({BLOCKS})")
    done = _run_interpreted([CONTRACTS, BLOCK_TESTS], " or ".join(f"({one})" for one in chosen))
    for op in ("decay_attention", "simple_gla", "gated_delta_rule", "delta_rule", "gla", "kda"):
        assert re.search(rf"PASSED .*test_ops.py::.*[-\[]{op}-cpu", done), (
            f"no test of {op} in:\n{done[-4000:]}"
        )
    assert "PASSED tests/kernels/test_block_attention_kernels.py" in done


# Long: the same tests run on a GPU by `make test-gpu`.
@pytest.mark.long
@pytest.mark.parametrize(
    "op", ["decay_attention", "simple_gla", "gated_delta_rule", "gla", "kda", "block_attention_kernels"]
)
def test_interpreted_kernels_are_right_where_they_are_peculiar(op: str) -> None:
    _run_interpreted([f"tests/kernels/test_{op}.py"], op)


def _run_interpreted(files: list[str], chosen: str) -> str:
    """What pytest tells of those tests, all of which pass."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    # What xdist tells its own workers is not for this process.
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
    choice = ["-m", "not gpu and not long", "-k", chosen]
    told = ["-p", "no:cacheprovider", "-q", "-rAp", "--no-header"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *files, *choice, *told],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout
