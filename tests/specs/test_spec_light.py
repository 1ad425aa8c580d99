"""Specs are read at once: importing them loads nothing heavy."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECONDS = 0.4


def _seconds(code: str) -> float:
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    return time.perf_counter() - begin


def test_importing_specs_loads_no_torch_and_takes_no_time() -> None:
    heavy = "torch", "numpy", "transformers", "ray", "optuna"
    code = f"import sys, heddle.specs; assert not [name for name in {heavy} if name in sys.modules]"
    _seconds(code)
    # What Python itself takes to start is not ours; the machine may be busy, so the two take turns.
    pairs = [(_seconds(code), _seconds("pass")) for _ in range(5)]
    assert statistics.median(whole - bare for whole, bare in pairs) < SECONDS
