"""Runs every test that needs no GPU at its full counts, and appends a row on how it went.

    make test-long

is this in the environment of `make install`. Ends as pytest does; the row is written when tests failed, too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import secrets
import shlex
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

from heddle.search.cores import processor_name

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
SELECTED = ["-m", "not gpu", "--full-counts"]


def counts(report: Path) -> dict[str, int]:
    """How many tests passed, failed and were skipped, of a JUnit report."""
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    total, failures, errors, skipped = (
        sum(int(suite.attrib[name]) for suite in suites)
        for name in ("tests", "failures", "errors", "skipped")
    )
    failed = failures + errors
    return {"passed": total - failed - skipped, "failed": failed, "skipped": skipped}


def commit() -> str | None:
    """The commit that was tested, told apart from one with changes."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=2, help="processes that share the tests")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "evidence-tests-long.jsonl", help="file of rows"
    )
    chosen, rest = parser.parse_known_args()
    seed = int(os.environ.get("HEDDLE_TEST_SEED", random.SystemRandom().randrange(1 << 31)))
    tested, began = commit(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = ["-m", "pytest", "-n", str(chosen.workers), "--dist", "loadfile", *SELECTED, *rest]
        done = subprocess.run(
            [sys.executable, *command, f"--junitxml={report}"],
            cwd=ROOT,
            env={**os.environ, "HEDDLE_TEST_SEED": str(seed)},
            check=False,
        )
        found = counts(report)
    row = {
        "run": secrets.token_hex(4),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": tested,
        "device": "cpu",
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "command": shlex.join(["python", *command]),
        **found,
        "random_seed": seed,
        "wall_s": round(time.perf_counter() - began, 1),
    }
    with chosen.out.open("a") as rows:
        rows.write(json.dumps(row) + "\n")
    print(json.dumps(row, indent=1))
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
