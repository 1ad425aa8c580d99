"""The script that times the engine runs against the engine of today: its workers stand in for those of a search."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "bench" / "engine_overhead.py"


def test_a_search_is_timed_without_its_workers(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    asked = ["--trials", "16", "--last", "8", "--folder", str(tmp_path), "--out", str(rows)]
    subprocess.run([sys.executable, str(SCRIPT), *asked], check=True, capture_output=True)
    row = json.loads(rows.read_text())
    assert row["trials"] == 16
    assert row["wall_ms"]["engine"] > 0.0
    assert row["wall_ms"]["without_sampler"] > row["wall_ms"]["placement"]
