"""The example notebook runs from top to bottom, in a kernel of its own, on the test run's search."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples/notebook.ipynb"


def test_the_notebook_holds_no_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code
    assert not [cell for cell in code if cell["outputs"] or cell["execution_count"] is not None]


@pytest.mark.slow
def test_the_notebook_shows_a_spec_and_a_search(search_run: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/quickstart").symlink_to(search_run, target_is_directory=True)
    (tmp_path / "examples").symlink_to(ROOT / "examples", target_is_directory=True)
    code = (
        "import json, sys, nbformat; from nbclient import NotebookClient\n"
        f"held = nbformat.read({str(NOTEBOOK)!r}, as_version=4)\n"
        "NotebookClient(held, timeout=120, kernel_name='python3').execute()\n"
        "json.dump([cell.get('outputs', []) for cell in held.cells], sys.stdout)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "IPYTHONDIR": str(tmp_path / "ipython")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    shown = [out.get("data", {}) for outputs in json.loads(done.stdout) for out in outputs]
    pages = ["".join(data["text/html"]) for data in shown if "text/html" in data]
    assert "a space of" in pages[0]
    assert "search tiny" in pages[1]
    assert "gated_deltanet" in pages[2] or "decay_attention" in pages[2]
    assert any("| Spec |" in "".join(data.get("text/markdown", "")) for data in shown)
    assert any("<svg" in "".join(data.get("image/svg+xml", "")) for data in shown)
