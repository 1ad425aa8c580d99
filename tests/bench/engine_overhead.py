"""What the engine itself costs a trial late in a long search: seconds of the driver, and memory, without sampler and placement.

python tests/bench/engine_overhead.py --trials 10000 --last 1000 --commit "$(git rev-parse --short=12 HEAD)"

Evaluations are arithmetic and are answered in this process, so that neither Ray nor the workers are in the figure; ledger,
events and journal are written and synced as ever. The sampler's time and the placement solver's are given beside it, that for
the counts which it puts to Optuna included; `without_sampler` is engine and placement together.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

# As the command line does, before NumPy is there.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import psutil

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from fast_search import fast_file, scored  # noqa: E402

from heddle.search import run as search_run  # noqa: E402
from heddle.search import seeding, space, study  # noqa: E402
from heddle.search.environment import device_name, package_versions  # noqa: E402
from heddle.search.progress import Silent  # noqa: E402
from heddle.search.record import Run, Trial  # noqa: E402
from heddle.search.workers import Answer, Job, Watcher  # noqa: E402


class Here:
    """Workers that answer in this process and at once."""

    device, parallel, gpus, timed_on = "cpu", 4, 0, None

    def __init__(self, **_: object) -> None:
        pass

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def warm_up(self) -> None:
        pass

    def share(self, value: Any) -> Any:
        return value

    def call(self, call: Callable[..., Any], *arguments: Any) -> Any:
        return call(*arguments)

    def side_by_side(self, jobs: Iterable[Job], watcher: Watcher) -> Iterator[Answer]:
        for job in jobs:
            watcher.begun([job])
            yield Answer(job, value=job.call(*job.arguments), wall_s=0.0)

    on_whole_device = side_by_side


Times = np.ndarray


def now() -> Times:
    """Seconds on the wall, and of this process on a core: the second hardly depends on who else is on the machine."""
    return np.array([time.perf_counter(), time.process_time()])


class Clock(Silent):
    """When each trial was told, what of it was the sampler's and the placement's, and the memory at that time."""

    def __init__(self) -> None:
        self.told, self.memory = list[Times](), list[int]()
        self.spent: dict[str, Times] = {"sampler": np.zeros(2), "placement": np.zeros(2)}
        self.others = list[dict[str, Times]]()

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def within(*arguments: Any, **named: Any) -> Any:
            began = now()
            try:
                return call(*arguments, **named)
            finally:
                self.spent[name] = self.spent[name] + now() - began

        return within

    def trial_finished(self, trial: Trial) -> None:
        self.told.append(now())
        self.others.append(dict(self.spent))
        self.memory.append(psutil.Process().memory_info().rss)
        if trial.number % 500 == 0:
            print(trial.number, self.told[-1] - self.told[0], self.spent, flush=True)

    def rounds(self, size: int, last: int) -> list[dict[str, Times]]:
        """Seconds a trial of each of the last rounds, which are asked and told whole."""
        found = []
        ends = range(len(self.told) - 1, len(self.told) - 1 - last, -size)
        for end in ends:
            start = end - size
            whole = (self.told[end] - self.told[start]) / size
            parts = {name: (self.others[end][name] - self.others[start][name]) / size for name in self.spent}
            without = whole - parts["sampler"]
            found.append({"engine": without - parts["placement"], **parts, "without_sampler": without})
        return found


def measured(chosen: argparse.Namespace) -> tuple[Run, Clock]:
    """The search, with samplers and placement on the clock."""
    clock = Clock()
    make = study.make_sampler

    def on_the_clock(*arguments: Any) -> Any:
        sampler = clock.timed("sampler", make)(*arguments)
        for name in (
            "infer_relative_search_space",
            "sample_relative",
            "sample_independent",
            "before_trial",
            "after_trial",
        ):
            setattr(sampler, name, clock.timed("sampler", getattr(sampler, name)))
        return sampler

    study.make_sampler = on_the_clock
    space.propose = clock.timed("placement", space.propose)
    seeding.solved = clock.timed("placement", seeding.solved)
    search_run.Workers = Here
    file = fast_file(trials=chosen.trials, round=chosen.round, length=12, sampler=chosen.sampler)
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        return search_run.search(file, Path(folder, "run"), evaluate=scored, progress=clock), clock


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--last", type=int, default=1000, help="trials at the end that count")
    parser.add_argument("--round", type=int, default=8)
    parser.add_argument("--sampler", default="random")
    parser.add_argument(
        "--folder",
        type=Path,
        help="where the run is written: a local disk; the temporary folder if not given",
    )
    parser.add_argument("--commit", help="the code that searched")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "evidence-engine.jsonl"
    )
    chosen = parser.parse_args()
    _, clock = measured(chosen)
    rounds = clock.rounds(chosen.round, chosen.last)
    half = len(clock.memory) // 2
    row = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": chosen.commit,
        "device": device_name("cpu"),
        "packages": package_versions(),
        "sampler": chosen.sampler,
        "trials": len(clock.told),
        "last": chosen.last,
        **{
            f"{kind}_ms": {
                name: round(1e3 * median(each[name][index] for each in rounds), 2) for name in rounds[0]
            }
            for index, kind in enumerate(("wall", "cpu"))
        },
        "kb_per_trial": round((clock.memory[-1] - clock.memory[half]) / (len(clock.memory) - half) / 1e3, 1),
        "load": psutil.getloadavg()[0],
    }
    with chosen.out.open("a") as rows:
        rows.write(json.dumps(row) + "\n")
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
