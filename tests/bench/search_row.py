"""Appends what a finished search found, as one row: its device, counts, winner, the comparison with uniform placement, and how
far its rungs agree.

python tests/bench/search_row.py runs/quickstart --commit "$(git rev-parse --short=12 HEAD)"
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from heddle.search.record import read_run

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of the search")
    parser.add_argument("--commit", help="the code that searched")
    chosen = parser.parse_args()
    run = read_run(chosen.run)
    told = run.summary()
    budgets = [
        {"label": one.label, "at_most": one.at_most, "relative_to": one.relative_to} for one in run.budgets
    ]
    row = {
        "time": run.meta["created"],
        "commit": chosen.commit,
        "device": run.meta["environment"]["device_name"],
        "budgets": budgets,
        **{key: told[key] for key in ("name", "status", "trials", "wall_s", "front", "best", "confirm")},
    }
    if ranks := [asdict(one) for one in run.ranks]:
        row["rank_correlations"] = ranks
    with (RESULTS / "evidence-search.jsonl").open("a") as rows:
        rows.write(json.dumps(row) + "\n")
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
