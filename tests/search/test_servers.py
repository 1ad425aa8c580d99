"""PostgreSQL and MariaDB as the storage of a search, stopped and started in its middle."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fast_search import fast_file, scored
from servers import SERVERS, Server, folder

from heddle.errors import HeddleError
from heddle.search import storage
from heddle.search.progress import Silent
from heddle.search.record import Run, Trial
from heddle.search.run import search
from heddle.search.storage import StudyHold, connect

TRIALS = 6
AWAY_S, A_MINUTE_S = 1.5, 61.0


@pytest.fixture(scope="module", params=list(SERVERS))
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server on a folder and a port of its own. Without its package the tests are left out, which in CI is a failure."""
    make, found, package = SERVERS[request.param]
    if not found():
        told = f"no {request.param} on this machine: apt-get install {package}"
        pytest.fail(told) if os.environ.get("CI") else pytest.skip(told)
    with folder() as path:
        server = make(path)
        server.start()
        try:
            yield server
        finally:
            server.stop()


@pytest.fixture(scope="module")
def undisturbed(workers: object, tmp_path_factory: pytest.TempPathFactory) -> Run:
    assert workers is not None
    return search(
        fast_file(trials=TRIALS, round=2), tmp_path_factory.mktemp("journal") / "run", evaluate=scored
    )


class StoppedAtTrial(Silent):
    """Kills the server when trial 2 is told, and starts it again a while later."""

    def __init__(self, server: Server, away_s: float) -> None:
        self.server, self.said = server, list[str]()
        self.again = threading.Timer(away_s, server.start)

    def trial_finished(self, trial: Trial) -> None:
        if trial.number == 2:
            self.server.stop()
            self.again.start()

    def message(self, text: str, level: str = "info") -> None:
        self.said.append(f"{level}: {text}")


@pytest.mark.parametrize("away_s", [AWAY_S, pytest.param(A_MINUTE_S, marks=pytest.mark.long)])
def test_a_server_that_is_stopped_and_started_disturbs_no_search(
    away_s: float, server: Server, undisturbed: Run, tmp_path: Path
) -> None:
    progress = StoppedAtTrial(server, away_s)
    file = fast_file(trials=TRIALS, round=2)
    run = search(file, tmp_path / "run", evaluate=scored, storage=server.url, progress=progress)
    progress.again.join()
    assert run.status == "finished"
    assert [(trial.hash, trial.state) for trial in run.trials] == [
        (trial.hash, trial.state) for trial in undisturbed.trials
    ]
    assert (run.best, run.front) == (undisturbed.best, undisturbed.front)
    said = [line for line in progress.said if "storage" in line]
    assert "does not answer" in said[0]
    assert "answers again" in said[1]
    assert not (tmp_path / "run" / "study.journal").exists()
    again = search(file, tmp_path / "run", evaluate=scored, storage=server.url, resume=True)
    assert again.trials == run.trials


def test_one_study_has_one_driver_whatever_its_folder(server: Server) -> None:
    with StudyHold(connect(server.url), "run-1") as hold:
        with pytest.raises(HeddleError, match="run-1") as caught, StudyHold(connect(server.url), "run-1"):
            pass
        assert caught.value.code == "run-locked"
        with StudyHold(connect(server.url), "run-2"):
            pass
        server.stop()
        server.start()
        # The server forgot who held it. Whoever comes first has it.
        storage.patiently(hold.renew, mend=lambda: None, tell=print)
        with pytest.raises(HeddleError, match="run-1"), StudyHold(connect(server.url), "run-1"):
            pass
    with StudyHold(connect(server.url), "run-1"):
        pass
