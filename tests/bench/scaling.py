"""How many evaluations a second a search gets out of 1 and of N simulated Ray nodes, with evaluations that sleep.

python tests/bench/scaling.py --nodes 16 --slots 20 --commit "$(git rev-parse --short=12 HEAD)"

The engine hands evaluations to workers and writes results to ledger and events as ever, synced; what is left out is asking
for trials. Starting clusters and workers is not in the figures: one wave of evaluations goes before the clock. The evaluation
needs no torch, so neither do the workers: 320 of them with torch would take more memory than most machines have. Nodes are
those of `ray.cluster_utils.Cluster`: processes of one machine, whose cores they share with the driver.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
# Ray reads it when it is imported, and asks for one.
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

import ray.cloudpickle  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402

from heddle.search.durable import read_lines  # noqa: E402
from heddle.search.environment import device_name, package_versions  # noqa: E402
from heddle.search.evaluations import Evaluations, Request  # noqa: E402
from heddle.search.events import EventLog  # noqa: E402
from heddle.search.ledger import key_of  # noqa: E402
from heddle.search.record import EVENTS_FILE  # noqa: E402
from heddle.search.results import Evaluation  # noqa: E402
from heddle.search.workers import KEEP_IDLE_MS, Workers  # noqa: E402

# The workers cannot import this file.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

STORE_BYTES = 80_000_000
# Hundreds of processes that start at once on a few cores take minutes.
PATIENT = {
    "idle_worker_killing_time_threshold_ms": KEEP_IDLE_MS,
    "worker_register_timeout_seconds": 1800,
    "health_check_failure_threshold": 100,
}


def nap(seconds: float, number: int) -> Evaluation:
    time.sleep(seconds)
    return Evaluation({"value": number, "worker": os.getpid()})


def request(number: int, seconds: float) -> Request:
    inputs = {"number": number}
    return Request(number, key_of(inputs), "nap", inputs, nap, (seconds, number))


@contextmanager
def cluster(nodes: int, slots: int) -> Iterator[str]:
    own = {"num_cpus": slots, "object_store_memory": STORE_BYTES}
    made = Cluster(
        initialize_head=True, head_node_args={**own, "include_dashboard": False, "_system_config": PATIENT}
    )
    try:
        for _ in range(nodes - 1):
            made.add_node(wait=True, **own)
        yield made.address
    finally:
        made.shutdown()


def measured(nodes: int, chosen: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Evaluations a second of `nodes` nodes, and what they took."""
    began = time.monotonic()
    with (
        cluster(nodes, chosen.slots) as address,
        Workers("cpu", address=address) as workers,
        closing(EventLog(folder)) as log,
    ):
        assert workers.parallel == nodes * chosen.slots
        engine = Evaluations(folder, log, workers, on_tick=lambda: None, is_stopping=lambda: False)
        count = workers.parallel
        engine.train_all(request(number, chosen.seconds) for number in range(count))
        started, total = time.monotonic() - began, count * (1 + chosen.waves)
        clock, cpu = time.monotonic(), time.process_time()
        engine.train_all(request(number, chosen.seconds) for number in range(count, total))
        wall, cpu = time.monotonic() - clock, time.process_time() - cpu
        pids = {entry.result["worker"] for entry in engine.ledger.entries() if entry.result}
        used = [psutil.Process(pid).memory_full_info().pss for pid in pids if psutil.pid_exists(pid)]
    ended = [event for event in read_lines(folder / EVENTS_FILE) if event["event"] == "evaluation_finished"]
    assert len(ended) == total
    assert all(event["ok"] for event in ended)
    return {
        "nodes": nodes,
        "evaluations": total - count,
        "wall_s": round(wall, 2),
        "per_s": round((total - count) / wall, 3),
        "of_ideal": round(chosen.waves * chosen.seconds / wall, 3),
        "driver_cpu_ms": round(1e3 * cpu / (total - count), 2),
        "workers": len(pids),
        "worker_mb": round(median(used) / 1e6, 1),
        "start_s": round(started, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=16)
    parser.add_argument("--slots", type=int, default=20, help="evaluations side by side on a node")
    parser.add_argument("--seconds", type=float, default=5.0, help="that an evaluation sleeps")
    parser.add_argument("--waves", type=int, default=6, help="evaluations of each slot")
    parser.add_argument("--commit", help="the code that searched")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "evidence-scaling.jsonl"
    )
    chosen = parser.parse_args()
    found = []
    for nodes in (1, chosen.nodes):
        with tempfile.TemporaryDirectory() as folder:
            found.append(measured(nodes, chosen, Path(folder)))
        print(found[-1], flush=True)
    row = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": chosen.commit,
        "device": device_name("cpu"),
        "cores": len(os.sched_getaffinity(0)),
        "packages": package_versions(),
        "slots": chosen.slots,
        "seconds": chosen.seconds,
        "runs": found,
        "efficiency": round(found[1]["per_s"] / found[0]["per_s"] / chosen.nodes, 3),
        "load": psutil.getloadavg()[0],
    }
    with chosen.out.open("a") as rows:
        rows.write(json.dumps(row) + "\n")
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
