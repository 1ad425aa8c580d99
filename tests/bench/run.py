"""Times the ops and appends rows to a file.

python tests/bench/run.py --ops decay_attention --out tests/bench/results/h200.jsonl
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import torch
from cases import cases

from heddle.kernels.bench import PHASES, TIMED, Row, bench_ops, table

RESULTS = Path(__file__).parent / "results"
IMPLS = ("heddle", "torch", "fla")


def default_file() -> Path:
    """results/<machine>.jsonl"""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return RESULTS / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.jsonl"


def main() -> None:
    known = sorted({name for name, _, _ in cases()})
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--ops", nargs="*", choices=known, default=known, help="ops to time; all if not given"
    )
    parser.add_argument(
        "--impls", nargs="*", choices=IMPLS, default=IMPLS, help="implementations to time; all if not given"
    )
    parser.add_argument("--phases", nargs="*", choices=PHASES, default=PHASES, help="all if not given")
    parser.add_argument("--out", type=Path, default=default_file(), help="file the rows are appended to")
    parser.add_argument("--commit", help="what the code is, where git cannot tell or tells wrong")
    chosen = parser.parse_args()
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    with chosen.out.open("a") as file:

        def report(row: Row) -> None:
            file.write(json.dumps({**row, "commit": chosen.commit or row["commit"]}) + "\n")
            file.flush()

        rows = bench_ops(chosen.ops, impls=chosen.impls, phases=chosen.phases, ops=TIMED, report=report)
    print(table(rows))
    print(f"{len(rows)} rows appended to {chosen.out}")


if __name__ == "__main__":
    main()
