"""Fits a latency model of a spec's space, as `heddle bench SPEC --fit` does, and appends a row for each place it was fitted at.

    taskset -c 0 python tests/bench/latency_row.py examples/quickstart.yaml --commit "$(git rev-parse --short=12 HEAD)"

What the user's table (HEDDLE_CACHE) holds is not measured again. `effort` says when a timing stops: at the width `precision` or
when `seconds` are over; `timings` what came of it (`heddle.search.timing_quality`). `load` is the least and the greatest load
average of a minute while stacks were timed, null where all were in the table: of a machine that others use, the figures are
worth no more than it lets them be.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from heddle import api
from heddle.bench_commands import held_out_lines
from heddle.search.latency import Effort
from heddle.search.latency_model.model import LatencyModel, PlaceFit
from heddle.specs import load

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("spec", type=Path)
    parser.add_argument("--commit", help="the code that measured")
    parser.add_argument("--stacks", type=int, help="to fit on; three a coefficient if not given")
    parser.add_argument(
        "--seconds", type=float, help="of one timing, over one build of each model in place of three"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the rows")
    parser.add_argument("--note", help="what else a reader must know")
    chosen = parser.parse_args()
    loads: list[float] = []

    def seen(done: int, total: int, known: bool) -> None:
        if not known:
            loads.append(round(os.getloadavg()[0], 1))
        print(f"stack {done} of {total}", flush=True)

    how = {} if chosen.seconds is None else {"warmup": 2, "most": 100, "seconds": chosen.seconds, "builds": 1}
    effort = Effort(**how)
    model, _ = api.bench_fit(chosen.spec, stacks=chosen.stacks, effort=effort, on_stack=seen)
    head = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": chosen.commit,
        "environment": model.environment,
        "spec": load(chosen.spec).spec.name,
        "effort": asdict(effort),
    }
    tail = {"load": [min(loads), max(loads)] if loads else None, "note": chosen.note}
    for fit in model.fits:
        with (chosen.out / "evidence-latency.jsonl").open("a") as rows:
            rows.write(json.dumps({**head, **of_fit(model, fit), **tail}) + "\n")
        print(fit.place.label, *held_out_lines(fit), sep="\n")


def of_fit(model: LatencyModel, fit: PlaceFit) -> dict[str, Any]:
    """What a row says of a fit. `timings` are those that it was fitted on and held against: the median width of their 95 %
    intervals, and how many were wider than 1 %."""
    terms = {model.labels[name[1]]: round(ms, 4) for name, ms in fit.sum.weights.items() if name[0] == "term"}
    return {
        "place": fit.place.label,
        "method": fit.method,
        "reference": fit.reference,
        "reference_ms": round(fit.reference_ms, 4),
        "stacks": fit.measured,
        "way": fit.sum.way.told,
        "cross_validated": round(fit.crossed, 4),
        "terms_ms": terms,
        "held_out": asdict(fit.held_out),
        "timings": None if fit.timings is None else asdict(fit.timings),
    }


if __name__ == "__main__":
    main()
