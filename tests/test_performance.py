"""The page of figures says what the committed rows say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent / "bench" / "rivals.py"


def test_the_table_beside_the_rival_is_of_the_committed_rows() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--check"], check=False)
    assert done.returncode == 0, "python tests/bench/rivals.py writes it anew"
