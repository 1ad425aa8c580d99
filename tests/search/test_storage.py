"""A study in a database: its one driver, an outage that is waited for, and URLs that lead nowhere. Real servers are in
test_servers.py."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState
from sqlalchemy.exc import DataError, OperationalError

from heddle.errors import HeddleError
from heddle.search import storage
from heddle.search.storage import StudyHold, connect, engine_of, patiently
from heddle.search.study import Study, open_storage

TASKS = ("maximize",)


def lost(kind: type[sqlalchemy.exc.DBAPIError] = OperationalError) -> StorageInternalError:
    """What Optuna raises where its database said `kind`."""
    error = StorageInternalError("An exception is raised during the commit.")
    error.__cause__ = kind("COMMIT", {}, Exception("server closed the connection\nmore"))
    return error


def away_for(times: int, error: Callable[[], Exception] = lost) -> Callable[[], str]:
    calls = iter(range(times))

    def action() -> str:
        if next(calls, None) is not None:
            raise error()
        return "there"

    return action


def test_an_outage_is_waited_for_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "QUIET_S", 0.25)
    said, mended = list[str](), list[int]()
    result = patiently(away_for(4), mend=lambda: mended.append(1), tell=said.append)
    assert result == "there"
    assert len(mended) == 4
    assert "does not answer (server closed the connection); trying again" in said[0]
    assert "answers again" in said[1]
    assert len(said) == 2


def test_after_the_patience_the_search_ends_and_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "PATIENCE_S", 0.3)
    with pytest.raises(HeddleError, match="server closed") as caught:
        patiently(away_for(10**6), mend=lambda: None, tell=lambda _: None)
    assert caught.value.code == "storage-lost"
    assert "--resume" in str(caught.value.hint)


def test_what_is_no_outage_is_raised_at_once() -> None:
    with pytest.raises(StorageInternalError):
        patiently(away_for(1, lambda: lost(DataError)), mend=lambda: None, tell=lambda _: None)


def test_two_folders_with_one_study_have_one_driver(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    with StudyHold(connect(url), "run-1"):
        with pytest.raises(HeddleError, match="run-1") as caught, StudyHold(connect(url), "run-1"):
            pass
        assert caught.value.code == "run-locked"
        with StudyHold(connect(url), "run-2"):
            pass
    with StudyHold(connect(url), "run-1"):
        pass


def test_a_journal_needs_no_hold(tmp_path: Path) -> None:
    journal = open_storage(tmp_path)
    assert engine_of(journal) is None
    with StudyHold(journal, "run-1"), StudyHold(journal, "run-1"):
        pass


@pytest.mark.parametrize(
    ("url", "code", "what"),
    [
        ("postgresql+psycopg://heddle:secret@localhost:1/none", "storage-lost", "refused"),
        ("mysql+pymysql://heddle:secret@127.0.0.1:1/none", "storage-lost", "refused"),
        ("oracle+cx_oracle://heddle:secret@localhost/none", "package-missing", "cx_Oracle"),
        ("nothing", "bad-argument", "no storage URL"),
    ],
)
def test_a_url_that_leads_nowhere_is_told_without_its_password(url: str, code: str, what: str) -> None:
    with pytest.raises(HeddleError, match=f"(?i){what}") as caught:
        connect(url)
    assert caught.value.code == code
    assert "secret" not in str(caught.value)


def test_a_trial_whose_making_was_not_answered_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server made the trial and went away before it said so: there is one, not two."""
    one = Study(connect(f"sqlite:///{tmp_path / 'study.db'}"), "run", TASKS, sampler="tpe", seed=0, startup=2)
    ask = one._study.ask

    def ask_and_lose() -> None:
        ask()
        monkeypatch.undo()
        raise lost()

    monkeypatch.setattr(one._study, "ask", ask_and_lose)
    number = one.ask()
    assert [trial.number for trial in one.trials] == [number] == [0]
    width = one.suggest(number, "width", lambda trial: trial.suggest_int("width", 1, 40))
    one.tell_complete(number, (width / 40,), {})
    assert one.trials[0].state == TrialState.COMPLETE


def test_a_database_that_is_away_for_a_moment_does_not_end_a_study(tmp_path: Path) -> None:
    """The file of the database is put aside while a trial is drawn and told."""
    database, aside = tmp_path / "folder" / "study.db", tmp_path / "aside"
    database.parent.mkdir()
    said = list[str]()
    one = Study(
        connect(f"sqlite:///{database}"),
        "run",
        TASKS,
        sampler="random",
        seed=0,
        startup=2,
        on_outage=said.append,
    )
    number = one.ask()
    shutil.move(database.parent, aside)
    engine = engine_of(one._study._storage)
    assert engine is not None
    engine.dispose()
    began = time.monotonic()
    threading.Timer(1.5, lambda: shutil.move(aside, database.parent)).start()
    width = one.suggest(number, "width", lambda trial: trial.suggest_int("width", 1, 40))
    assert time.monotonic() - began > 1.0
    one.tell_complete(number, (width / 40,), {})
    assert one.trials[0].state == TrialState.COMPLETE
    assert said[0].split(" (")[0] == "the study's storage does not answer"
