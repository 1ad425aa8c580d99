"""Specs are read at once: importing them loads nothing heavy, and what is done with a layer is done once a layer."""

from __future__ import annotations

import os
import resource
import runpy
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from heddle.compose.plan import plan
from heddle.specs import load, loads

ROOT = Path(__file__).parents[2]
PYDANTIC = "from pydantic import BaseModel, Discriminator, Field, TypeAdapter"
# Importing heddle.specs takes 1.8 times the instructions of that. Seconds are for tests/bench/spec_speed.py to tell.
TIMES = 3
HEAVY = ("torch", "numpy", "transformers", "ray", "optuna", "networkx", "rich", "plotly")
# Python, pydantic, ruamel.yaml and ours were 271 in November 2026.
MODULES = 400
thousand_layers = runpy.run_path(str(ROOT / "tests/bench/spec_speed.py"))["spec"]


def _seconds(code: str, bytecode: Path) -> float:
    """What a process computes: a busy machine makes it wait, and waiting is not counted."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(bytecode)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_importing_specs_loads_no_torch_and_takes_little_more_than_pydantic(tmp_path: Path) -> None:
    code = (
        f"import sys, heddle.specs; assert not [name for name in {HEAVY} if name in sys.modules]; "
        f"assert len(sys.modules) < {MODULES}"
    )
    # The first run leaves bytecode, as an installation does.
    _seconds(code, tmp_path)
    # One after the other, so that a busy machine slows all alike; of what each takes the best is nearest to the truth.
    rounds = [[_seconds(one, tmp_path) for one in (code, PYDANTIC, "pass")] for _ in range(7)]
    whole, pydantic, bare = map(min, zip(*rounds, strict=True))
    assert whole - bare < TIMES * (pydantic - bare)


def test_checking_a_spec_imports_nothing_to_draw_to_train_or_to_search(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(thousand_layers(1))
    code = f"""
import sys
from heddle.cli import main
try:
    main(["check", {str(path)!r}])
except SystemExit as done:
    assert done.code == 0
parts = ("heddle.search", "heddle.kernels", "heddle.dashboards.report", "heddle.compose.picture")
assert not [name for name in sys.modules if name.startswith(parts)]
assert not [name for name in {HEAVY} if name != "networkx" and name in sys.modules]
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, *fits = done.stdout.splitlines()
    assert first == f"{path}: ok – thousand, 20 layers, no search space"
    assert "  fits remote            code in the folder" in fits


def _calls(path: Path) -> int:
    """How many functions are called while a spec is read, checked and planned."""
    count = 0

    def counted(frame: FrameType, event: str, argument: Any) -> None:  # noqa: ARG001
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(counted)
    try:
        file = load(path)
        plan(file.spec.model, where=file.where)
    finally:
        sys.setprofile(None)
    return count


def test_four_times_the_layers_are_four_times_the_work(tmp_path: Path) -> None:
    # Validators are built at their first use.
    file = loads(thousand_layers(2))
    plan(file.spec.model, where=file.where)
    counts = []
    for parts in (10, 40):
        path = tmp_path / f"{parts}.yaml"
        path.write_text(thousand_layers(parts))
        counts.append(_calls(path))
    assert counts[1] < 4.4 * counts[0], counts
    # 1,064 calls a layer in November 2026. 1,500 would be one more walk over everything, or a copy of each layer.
    assert counts[1] < 1500 * 800, counts
