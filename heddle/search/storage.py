"""A study in a database: opened by URL, held by one driver, and waited for while its server is away."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TypeVar

import sqlalchemy
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, RDBStorage, get_storage
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError

from heddle.errors import HeddleError
from heddle.search.ledger import key_of

# How long a search waits for a storage that does not answer, and how long between two tries.
PATIENCE_S = 600.0
FIRST_S, LONGEST_S = 0.1, 5.0
# A restart of the server that is over by then is not worth a word.
QUIET_S = 0.5
Result = TypeVar("Result")


def connect(url: str) -> BaseStorage:
    """Optuna's storage at `url`.

    Raises:
        HeddleError: "bad-argument" for a URL that names no database, "package-missing" without its driver, "storage-lost"
            where no server answers.
    """
    try:
        # A connection that its server closed while it was idle is replaced before it is used.
        return get_storage(RDBStorage(url, engine_kwargs=_engine_options(url)))
    except (ArgumentError, ValueError) as error:
        hint = "as postgresql+psycopg://user@host/name or mysql+pymysql://user@host/name"
        raise HeddleError(
            "bad-argument", f"--storage {_without_password(url)} is no storage URL", hint=hint
        ) from error
    except ImportError as error:
        hint = "pip install 'heddle-lm[sql]'"
        raise HeddleError(
            "package-missing",
            f"--storage needs a driver that is not installed: {error.__cause__ or error}",
            hint=hint,
        ) from None
    except (DBAPIError, StorageInternalError) as error:
        told = f"{_without_password(url)} does not answer: {_first_line(error)}"
        raise HeddleError("storage-lost", told, hint="start its server, or leave out --storage") from error


def _engine_options(url: str) -> dict[str, Any]:
    return {} if url.startswith("sqlite") else {"pool_pre_ping": True}


def _without_password(url: str) -> str:
    try:
        return sqlalchemy.make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        return "URL"


def engine_of(storage: BaseStorage) -> sqlalchemy.Engine | None:
    """The database of a storage; None of a journal."""
    # Optuna's cache in front of a database keeps it to itself; tests/search/test_storage.py holds that it is there.
    found = getattr(getattr(storage, "_backend", storage), "engine", None)
    return found if isinstance(found, sqlalchemy.Engine) else None


def is_outage(error: BaseException) -> bool:
    """Whether `error` says that the database does not answer, rather than that it was asked for nonsense."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    return isinstance(cause, (OperationalError, InterfaceError)) or (
        isinstance(cause, DBAPIError) and cause.connection_invalidated
    )


def patiently(
    action: Callable[[], Result], *, mend: Callable[[], object], tell: Callable[[str], None]
) -> Result:
    """`action()`, tried again while the storage does not answer; `mend()` goes before every new try.

    Raises:
        HeddleError: "storage-lost" after `PATIENCE_S`.
    """
    began, pause, is_told = time.monotonic(), FIRST_S, False
    mended: Callable[[], object] = lambda: None  # noqa: E731
    while True:
        try:
            mended()
            result = action()
        except (DBAPIError, StorageInternalError) as error:
            if not is_outage(error):
                raise
            waited = time.monotonic() - began
            if waited > PATIENCE_S:
                what = f"the study's storage has not answered for {waited:.0f} s: {_first_line(error)}"
                hint = "once it answers, go on with --resume; nothing finished is lost"
                raise HeddleError("storage-lost", what, hint=hint) from error
            if waited > QUIET_S and not is_told:
                tell(
                    f"the study's storage does not answer ({_first_line(error)}); trying again for {PATIENCE_S:.0f} s"
                )
                is_told = True
            time.sleep(pause)
            pause, mended = min(2 * pause, LONGEST_S), mend
        else:
            if is_told:
                tell(f"the study's storage answers again after {time.monotonic() - began:.0f} s")
            return result


def _first_line(error: BaseException) -> str:
    cause = error.__cause__ if isinstance(error, StorageInternalError) and error.__cause__ else error
    lines = str(getattr(cause, "orig", None) or cause).splitlines()
    return lines[0] if lines else type(cause).__name__


class StudyHold:
    """One driver per study of a database: a lock of its server's, which frees it when the driver's connection ends.

    In SQLite it is an flock beside the file. A journal needs none: its folder is locked.

    Raises:
        HeddleError: "run-locked" when another driver holds the study.
    """

    def __init__(self, storage: BaseStorage, name: str) -> None:
        self._engine, self._name = engine_of(storage), name
        self._key = int(key_of({"study": name}), 16) >> 1
        self._connection: sqlalchemy.Connection | None = None
        self._file: IO[str] | None = None

    def __enter__(self) -> StudyHold:
        try:
            self.renew()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of the study, and of all connections to its database."""
        if self._file is not None:
            self._file.close()
            self._file = None
        self._drop()
        if self._engine is not None:
            self._engine.dispose()

    def renew(self) -> None:
        """Hold the study, again if the server has ended our connection and with it our lock."""
        if self._engine is None or self._file is not None:
            return
        if self._engine.dialect.name == "sqlite":
            self._hold_file(str(self._engine.url.database))
            return
        lock = {
            "postgresql": sqlalchemy.text("SELECT pg_try_advisory_lock(:key)"),
            "mysql": sqlalchemy.text("SELECT GET_LOCK(CONCAT('heddle-', :key), 0)"),
            "mariadb": sqlalchemy.text("SELECT GET_LOCK(CONCAT('heddle-', :key), 0)"),
        }.get(self._engine.dialect.name)
        if lock is None or self._is_held():
            return
        connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        if not connection.execute(lock, {"key": self._key}).scalar():
            connection.close()
            raise self._refused()
        self._connection = connection

    def _is_held(self) -> bool:
        """Whether the connection that holds the lock still lives."""
        if self._connection is None:
            return False
        try:
            self._connection.execute(sqlalchemy.text("SELECT 1"))
        except DBAPIError:
            self._drop()
            return False
        return True

    def _drop(self) -> None:
        """Give up the connection: out of the pool too, which would keep it open with its lock."""
        if self._connection is not None:
            self._connection.invalidate()
            self._connection.close()
            self._connection = None

    def _hold_file(self, database: str) -> None:
        if database in ("", "None", ":memory:"):
            return
        path = Path(f"{database}.{self._name}.lock")
        file = open(path, "a+")  # noqa: SIM115 - lives as long as the hold
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise self._refused() from None
        self._file = file

    def _refused(self) -> HeddleError:
        return HeddleError(
            "run-locked",
            f"study {self._name} is being written by another search, from another folder or machine",
            hint="stop that one first; a copy of a run folder has the same study as the folder",
        )
