"""What every test shares: the counts, the ban on skips, a seed for random cases, and one real search."""

from __future__ import annotations

import functools
import gc
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import interpreted
import pytest
from filelock import FileLock
from tiny_search import SEARCH, TINY_SEARCH, small_corpus

ROOT = Path(__file__).parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full-counts", action="store_true", help="full counts where tests draw random cases")
    parser.addoption("--half", action="store_true", help="half of what else is chosen (tests/interpreted.py)")
    parser.addoption("--no-skips", action="store_true", help="a skipped test is a failed one")


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        interpreted.make_quick()
    if config.getoption("--half"):
        config.pluginmanager.register(_Half())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes minutes must not begin last: first what needs Ray, what reads the one search, and files with slow tests."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(
        key=lambda item: (not uses_ray(item.nodeid), not reads_search(item.nodeid), item.path not in slow)
    )


class _Half:
    """Behind all other choices: draws half of what is left."""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        kept = interpreted.half(items, _SEED)
        config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
        items[:] = kept


@functools.cache
def _text(file: str) -> str:
    path = ROOT / file
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _is_told_of_ray(file: str) -> bool:
    asked = ("workers: Workers", 'usefixtures("workers")', "tiny_run: Run")
    return any(one in _text(file) for one in asked)


def uses_ray(nodeid: str) -> bool:
    """Whether the test is of a file that uses the Ray, or the tiny search, of tests/search/conftest.py."""
    return nodeid.startswith("tests/search/") and _is_told_of_ray(nodeid.partition("::")[0])


def reads_search(nodeid: str) -> bool:
    """Whether the test is of a file that reads the run of `search_run`."""
    return "search_run: Path" in _text(nodeid.partition("::")[0])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file for each worker at a time, and all that need Ray for one of them: Ray, its processes and the tiny search take
    40 s of a core to start, and each worker would have its own. Likewise all that read the one search, which the others would
    wait for while one of them makes it."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class OneRay(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            if uses_ray(nodeid):
                return "Ray"
            return "search" if reads_search(nodeid) else str(super()._split_scope(nodeid))

    return OneRay(config, log)


def pytest_collection_finish() -> None:
    """The collector need not look again and again at what was imported and collected, which stays."""
    gc.collect()
    gc.freeze()


def pytest_report_header() -> str:
    return f"random cases: seed {_SEED} (HEDDLE_TEST_SEED={_SEED} repeats them)"


# One seed for all workers of a run: the workers inherit the environment of the process that starts them.
_SEED = int(os.environ.setdefault("HEDDLE_TEST_SEED", str(random.SystemRandom().randrange(1 << 31))))


@pytest.fixture(scope="session")
def random_seed() -> int:
    """A fresh seed each run, printed in the header."""
    return _SEED


@pytest.fixture(scope="session")
def full_counts(request: pytest.FixtureRequest) -> bool:
    """Whether random cases run at their full counts."""
    return bool(request.config.getoption("--full-counts"))


@pytest.fixture
def kernels_on_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests of ops ask for the kernels on a GPU, where an op may take another path until they have passed."""
    if request.node.get_closest_marker("gpu") is None:
        yield
        return
    from heddle.kernels import force_path

    with force_path("triton"):
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> object:
    report = yield
    if item.config.getoption("--no-skips") and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped, and --no-skips forbids it: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def search_run(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The folder of one real search, made once a test run by the command line; read it, never write to it.

    Beside it lie spec.yaml, corpus.txt and what the command printed (stdout.txt).
    """
    base = tmp_path_factory.getbasetemp()
    shared = (base if worker_id == "master" else base.parent) / "one-search"
    with FileLock(f"{shared}.lock"):
        if not (shared / "stdout.txt").exists():
            shared.mkdir(exist_ok=True)
            small_corpus(shared / "corpus.txt")
            (shared / "spec.yaml").write_text(TINY_SEARCH)
            command = [sys.executable, "-c", SEARCH, "search", "spec.yaml", "--out", "run"]
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            done = subprocess.run(
                command, cwd=shared, env=environment, capture_output=True, text=True, timeout=900, check=False
            )
            assert done.returncode == 0, done.stdout + done.stderr
            (shared / "stdout.txt").write_text(done.stdout)
    return shared / "run"
