"""A search whose process group is signalled, as by `timeout` or a closed terminal: it ends soon, in order, and goes on later."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from bench.faults import ROOT, events, victims, wait_for
from fast_search import entries, fast_file, scored_in
from tiny_search import SEARCH, TINY_SEARCH, small_corpus

from heddle.search.record import read_run
from heddle.search.run import search

pytestmark = pytest.mark.slow

# From the signal to the end of the process; Ray was seen to take three of them to shut down. Beside other tests it takes longer,
# so that those that hold SOON_S run alone.
SOON_S, BUSY_S = 20.0, 100.0
FAST = """
import sys
from pathlib import Path
from fast_search import fast_file, scored_in
from heddle.search.run import search
search(fast_file(trials=8, round=4), Path(sys.argv[1]), evaluate=scored_in(float(sys.argv[2])))
"""


@contextmanager
def in_a_group(code: str, *arguments: object, told: int = subprocess.PIPE) -> Iterator[subprocess.Popen[str]]:
    """A driver that leads a process group, of which nothing is left behind."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    with subprocess.Popen(
        command, stdout=told, stderr=subprocess.STDOUT, env=environment, text=True, start_new_session=True
    ) as driver:
        try:
            yield driver
        finally:
            driver.kill()


def ended(driver: subprocess.Popen[str], within: float = BUSY_S) -> str:
    """What it said, once it has ended by itself, within so many seconds."""
    began = time.monotonic()
    said, _ = driver.communicate(timeout=120)
    took = time.monotonic() - began
    assert took < within, f"{took:.0f} s; {said}"
    return said or ""


def test_sigterm_to_the_group_of_a_search_ends_it_in_order(tmp_path: Path) -> None:
    spec, folder = tmp_path / "tiny.yaml", tmp_path / "run"
    small_corpus(tmp_path / "corpus.txt")
    text = TINY_SEARCH.replace("corpus.txt", str(tmp_path / "corpus.txt")).replace(", text]", "]")
    spec.write_text(text.replace("confirm_seeds: 2", "confirm_seeds: 0"))
    with in_a_group(SEARCH, "search", spec, "--out", folder) as driver:
        assert wait_for(driver, folder, 8)
        # As `timeout` does it: to the process, then to its group.
        os.kill(driver.pid, signal.SIGTERM)
        os.killpg(driver.pid, signal.SIGTERM)
        said = ended(driver)
    assert driver.returncode == 1, said
    assert "stopping (SIGTERM): what runs has 5 s to end; go on with: heddle search" in said
    assert f"--out {folder} --resume" in said
    assert read_run(folder).status == "stopped"
    kept = entries(folder)
    with in_a_group(SEARCH, "search", spec, "--out", folder, "--resume", "--trials", 3) as driver:
        said, _ = driver.communicate(timeout=300)
    assert driver.returncode == 0, said
    assert read_run(folder).status == "finished"
    assert entries(folder).items() >= kept.items()


@pytest.mark.alone
def test_what_runs_for_long_is_given_up_and_the_search_goes_on_later(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with in_a_group(FAST, folder, 300) as driver:
        assert wait_for(driver, folder, 8)
        rays = [one.pid for one in victims(driver, "raylet")]  # type: ignore[arg-type]
        assert rays
        assert all(os.getsid(one) != os.getsid(driver.pid) for one in rays)
        os.killpg(driver.pid, signal.SIGTERM)
        said = ended(driver, SOON_S)
    assert "the search was stopped   [interrupted]" in said
    assert f"--out {folder} --resume" in said
    run = read_run(folder)
    assert (run.status, run.count("complete")) == ("stopped", 0)
    again = search(fast_file(trials=8, round=4), folder, resume=True, evaluate=scored_in(0))
    assert again.count("complete") == 8


def test_a_search_whose_terminal_closes_stops_in_order(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    mine, its = pty.openpty()
    code = f"import fcntl, termios\nfcntl.ioctl(1, termios.TIOCSCTTY, 0)\n{FAST}"
    with in_a_group(code, folder, 0.5, told=its) as driver:
        os.close(its)
        assert wait_for(driver, folder, 8)
        os.close(mine)
        ended(driver)
    assert read_run(folder).status == "stopped"
    assert driver.returncode == 0


def test_a_search_under_nohup_outlives_its_terminal(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code = f"import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n{FAST}"
    with in_a_group(code, folder, 0.1) as driver:
        assert wait_for(driver, folder, 8)
        os.killpg(driver.pid, signal.SIGHUP)
        driver.communicate(timeout=120)
    assert driver.returncode == 0
    assert read_run(folder).status == "finished"


@pytest.mark.alone
def test_a_search_that_has_not_begun_stops_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with in_a_group(FAST, folder, 0) as driver:
        while not (folder / ".lock").exists():
            assert driver.poll() is None
            time.sleep(0.01)
        time.sleep(0.5)
        os.killpg(driver.pid, signal.SIGTERM)
        said = ended(driver, SOON_S)
    assert events(folder) == []
    assert "[interrupted]" in said, said
    assert "nothing was begun yet" in said
