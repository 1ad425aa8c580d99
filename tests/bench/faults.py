"""Kills of driver, worker and raylet at random moments of a search with a fast evaluator, and what is lost by them: nothing.

python tests/bench/faults.py --kills 50 --commit "$(git rev-parse --short=12 HEAD)"

The row counts the kills of each kind, results that were lost or changed, evaluations that were begun again after they had
finished, and says whether the winner is that of the search that nobody disturbed. `--minutes` ends the killing early.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from fast_search import entries  # noqa: E402

from heddle.search.durable import read_lines  # noqa: E402
from heddle.search.environment import device_name, package_versions  # noqa: E402
from heddle.search.record import EVENTS_FILE, RUN_FILE, Run, read_run  # noqa: E402

VICTIMS = ("driver", "worker", "raylet")
DRIVER = """
import sys
from pathlib import Path
from fast_search import fast_file, scored_in
from heddle.search.run import search
folder, trials = Path(sys.argv[1]), int(sys.argv[2])
search(fast_file(trials=trials, round=4), folder, resume=(folder / "run.json").exists(), evaluate=scored_in(0.05))
"""
# Before what each driver says, and in what one says whose raylet has ended.
START, LOST = "=== a driver", "(the raylet) has ended"
# Of one driver without a new event: the search hangs.
PATIENCE_S = 900.0
# Drivers one after the other that end without an event.
PATIENT_STARTS = 5


def started(folder: Path, trials: int) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, "-c", DRIVER, str(folder), str(trials)]
    with (folder.parent / "drivers.log").open("ab") as log:
        log.write(f"{START}\n".encode())
        log.flush()
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def victims(driver: subprocess.Popen[bytes], kind: str) -> list[psutil.Process]:
    """The processes of that kind that a kill may hit."""
    parent = psutil.Process(driver.pid)
    if kind == "driver":
        return [parent]
    found = []
    for child in parent.children(recursive=True):
        try:
            name = child.cmdline()[0] if kind == "worker" else child.name()
        except (psutil.Error, IndexError):
            continue
        # With an agent of its own the raylet ends itself: that is a killed raylet, under a worker's name.
        if name == "raylet" or (kind == "worker" and name.startswith("ray::") and not name.endswith("Agent")):
            found.append(child)
    return found


def events(folder: Path) -> list[dict[str, Any]]:
    return read_lines(folder / EVENTS_FILE) if (folder / RUN_FILE).exists() else []


def wait_for(driver: subprocess.Popen[bytes], folder: Path, count: int) -> bool:
    """Until there are `count` events; False if the driver ended before."""
    seen, since = 0, time.monotonic()
    while (now := len(events(folder))) < count:
        if driver.poll() is not None:
            return False
        if now > seen:
            seen, since = now, time.monotonic()
        assert time.monotonic() - since < PATIENCE_S, "the search hangs"
        time.sleep(0.02)
    return True


def ending(folder: Path, driver: subprocess.Popen[bytes]) -> str:
    """How a driver ended by itself: by the error that it told last, or else its exit code."""
    log = (folder.parent / "drivers.log").read_text(errors="replace")
    told = [line for line in log[log.rfind(START) :].splitlines() if line.startswith("heddle.errors.")]
    return "cluster-lost" if told and LOST in told[-1] else f"exit code {driver.returncode}"


def begun(folder: Path) -> Counter[Path]:
    starts = [event for event in events(folder) if event["event"] == "evaluation_started"]
    return Counter(Path("ledger", e["hash"], e["stage"], f"{e['key']}.json") for e in starts)


class Tally:
    """What the kills did: how many of each kind, and what was found lost or made again after each."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.kills = folder, Counter[str]()
        self._kept: dict[Path, bytes] = {}
        self._begun: dict[Path, int] = {}
        self.lost = self.again = 0
        # How drivers ended that had lost their raylet.
        self.told = Counter[str]()

    def note(self) -> None:
        """Compare what is finished now with what was at the last kill."""
        kept, times = entries(self._folder), begun(self._folder)
        self.lost += sum(kept.get(path) != data for path, data in self._kept.items())
        self.again += sum(times[path] != self._begun[path] for path in self._kept)
        self._kept, self._begun = kept, {path: times[path] for path in kept}


def disturbed(
    folder: Path, trials: int, kinds: list[str], dice: random.Random, *, ends: float = float("inf")
) -> Tally:
    """Run the search in `folder` to its end, with one kill after the other of those `kinds`, spread over its events."""
    tally, waiting, kind = Tally(folder), list(kinds), ""
    seen = useless = 0
    driver = started(folder, trials)
    while True:
        target = len(events(folder)) + dice.randint(3, 12) if waiting else sys.maxsize
        if wait_for(driver, folder, target):
            kind = waiting[-1]
            found = victims(driver, kind)
            # None while Ray has not started yet: a little later, then.
            if found:
                waiting.pop()
                tally.note()
                os.kill(dice.choice(found).pid, signal.SIGKILL)
                tally.kills[kind] += 1
                print(f"{sum(tally.kills.values())} killed: {kind}", flush=True)
        elif driver.returncode == 0:
            tally.note()
            return tally
        else:
            if kind == "raylet":
                tally.told[ending(folder, driver)] += 1
            kind = ""
            # One may fail to start where Ray takes too long on a busy machine; all of them must not.
            useless = useless + 1 if len(events(folder)) == seen else 0
            assert useless < PATIENT_STARTS, (folder.parent / "drivers.log").read_text(errors="replace")
            seen, driver = len(events(folder)), started(folder, trials)
        if time.monotonic() > ends:
            waiting.clear()
        if waiting and events(folder) and read_run(folder).status == "finished":
            # More kills than the search had room for.
            waiting.clear()


def same(one: Run, other: Run) -> bool:
    """Whether both asked, scored and chose the same."""
    told = [
        [(t.number, t.hash, t.state, {k: s.value for k, s in t.scores.items()}) for t in r.trials]
        for r in (one, other)
    ]
    return told[0] == told[1] and (one.best, one.front) == (other.best, other.front)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 31))
    parser.add_argument("--minutes", type=float, default=1e9, help="no kill after so many")
    parser.add_argument("--commit", help="the code that searched")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "evidence-faults.jsonl"
    )
    chosen = parser.parse_args()
    dice, began = random.Random(chosen.seed), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        whole, broken = Path(folder, "whole"), Path(folder, "broken")
        undisturbed = started(whole, chosen.trials)
        assert undisturbed.wait() == 0, (whole.parent / "drivers.log").read_text()
        kinds = [VICTIMS[index % len(VICTIMS)] for index in range(chosen.kills)]
        dice.shuffle(kinds)
        tally = disturbed(broken, chosen.trials, kinds, dice, ends=time.monotonic() + 60 * chosen.minutes)
        row = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": chosen.commit,
            "device": device_name("cpu"),
            "packages": package_versions(),
            "seed": chosen.seed,
            "trials": chosen.trials,
            "kills": dict(tally.kills),
            "lost": tally.lost,
            "finished_begun_again": tally.again,
            "raylet_killed_told": dict(tally.told),
            "same_as_undisturbed": same(read_run(whole), read_run(broken)),
            "sessions": len({event["session"] for event in events(broken)}),
            "wall_s": round(time.monotonic() - began, 1),
        }
    with chosen.out.open("a") as rows:
        rows.write(json.dumps(row) + "\n")
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
