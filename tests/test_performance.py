"""The page of figures says what the committed rows say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent / "bench"


@pytest.mark.parametrize("script", ["rivals", "encoder_table"])
def test_a_table_is_of_the_committed_rows(script: str) -> None:
    done = subprocess.run([sys.executable, str(BENCH / f"{script}.py"), "--check"], check=False)
    assert done.returncode == 0, f"python tests/bench/{script}.py writes it anew"
