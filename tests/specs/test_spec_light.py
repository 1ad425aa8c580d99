"""Specs are read at once: importing them loads nothing heavy."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECONDS = 0.4


def _seconds(code: str, bytecode: Path) -> float:
    """What a process computes: a busy machine makes it wait, and waiting is not counted."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(bytecode)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_importing_specs_loads_no_torch_and_takes_no_time(tmp_path: Path) -> None:
    heavy = "torch", "numpy", "transformers", "ray", "optuna"
    code = f"import sys, heddle.specs; assert not [name for name in {heavy} if name in sys.modules]"
    # The first run leaves bytecode, as an installation does.
    _seconds(code, tmp_path)
    # What Python itself takes to start is not ours; beside other processes only the best of several is.
    whole, bare = (min(_seconds(one, tmp_path) for _ in range(7)) for one in (code, "pass"))
    assert whole - bare < SECONDS
