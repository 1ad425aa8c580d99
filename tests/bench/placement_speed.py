"""Times the placement solver on the two sizes of its goals, and appends a row for each.

python tests/bench/placement_speed.py --commit "$(git rev-parse --short=12 HEAD)"

64 layers of 8 kinds with pair terms: one budget of 1,000 steps, the 16 best and the whole Pareto curve; two budgets of 200
steps each. `cpu_s` is the processor time of this process, nearly the same beside others; `wall_s` is
not, and `load` tells how many there were.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import secrets
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from heddle.search.placement import Budget, Problem, curve, solve

RESULTS = Path(__file__).parent / "results"
LAYERS, KINDS = 64, 8


def problems() -> tuple[Problem, Problem]:
    """With one budget of 1,000 steps, and with two of 200."""
    rng = np.random.default_rng(0)
    cost, other = 0.2 + rng.random((LAYERS, KINDS)), rng.random((LAYERS, KINDS))
    worth, pair = rng.normal(size=(LAYERS, KINDS)), 0.3 * rng.normal(size=(1, KINDS, KINDS))
    beside = 0.1 * rng.random((KINDS, KINDS))
    one = (Budget("ms", cost, 0.6 * LAYERS, pair=beside, steps=1000),)
    two = (
        Budget("ms", cost, 0.6 * LAYERS, pair=beside, steps=200),
        Budget("mb", other, 0.4 * LAYERS, steps=200),
    )
    return Problem(worth, pair, one), Problem(worth, pair, two)


def timed(call: Callable[[], Any], runs: int) -> tuple[Any, dict[str, Any]]:
    """What the call gives, and its times in seconds."""
    wall, cpu = [], []
    for _ in range(runs):
        began, used = time.perf_counter(), time.process_time()
        made = call()
        wall.append(time.perf_counter() - began)
        cpu.append(time.process_time() - used)
    return made, {
        "wall_s": statistics.median(wall),
        "cpu_s": statistics.median(cpu),
        "cpu_s_worst": max(cpu),
        "runs": runs,
        "load": os.getloadavg()[0],
        "cores": os.cpu_count(),
        "cores_shared": os.getloadavg()[0] > 1.5,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "evidence-placement.jsonl")
    parser.add_argument("--commit", help="what the code is")
    chosen = parser.parse_args()
    common = {
        "run": secrets.token_hex(4),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": chosen.commit,
        "device": "cpu",
        "numpy": np.__version__,
        "layers": LAYERS,
        "kinds": KINDS,
    }
    one, two = problems()
    tasks: list[tuple[str, list[int], float, Callable[[], Any]]] = [
        ("placement: 16 best and curve", [1000], 2.0, lambda: (solve(one, best=16), curve(one, "ms"))),
        ("placement: best of two budgets", [200, 200], 10.0, lambda: (solve(two), None)),
    ]
    with chosen.out.open("a") as rows:
        for task, steps, goal, call in tasks:
            (answer, points), times = timed(call, chosen.runs)
            found = {
                "best": len(answer.solutions),
                "points": None if points is None else len(points),
                "objective": answer.certificate.objective,
                "upper": answer.certificate.upper,
                "gap": answer.certificate.gap,
                "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            }
            row = {**common, "task": task, "steps": steps, "goal_s": goal, **times, **found}
            rows.write(json.dumps(row) + "\n")
            print(
                f"{task}: {times['cpu_s']:.2f} s of processor, {times['wall_s']:.2f} s wall, gap {found['gap']:.3g}"
            )


if __name__ == "__main__":
    main()
