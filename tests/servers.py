"""PostgreSQL and MariaDB from Debian's packages, each on a folder and a port of its own, to be stopped and started."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy

# Neither server runs as root.
NOBODY = "nobody"


def postgres_folder() -> Path | None:
    """Where the newest PostgreSQL of the machine has its programs; `.ci/run` installs Debian's."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[4]))
    return found[-1].parent if found else None


def mariadb_path() -> str | None:
    """Where the machine has MariaDB's server; `.ci/run` installs Debian's."""
    return shutil.which("mariadbd", path=f"{os.environ['PATH']}:/usr/sbin")


@dataclass
class Server:
    """A database server of one test. `url` is what `--storage` takes."""

    url: str
    command: list[str]
    port: int
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server, and come back when it answers."""
        self.process = subprocess.Popen(
            self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **_as_nobody()
        )
        engine = sqlalchemy.create_engine(self.url, poolclass=sqlalchemy.NullPool)
        deadline = time.monotonic() + 60
        while True:
            try:
                engine.connect().close()
                return
            except sqlalchemy.exc.DBAPIError:
                assert time.monotonic() < deadline, f"{self.command[0]} does not answer"
                assert self.process.poll() is None, f"{self.command[0]} ended"
                time.sleep(0.05)

    def stop(self) -> None:
        """End the server as a kill does: nothing it has not written is written."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()


def _as_nobody() -> dict[str, object]:
    return (
        {"user": NOBODY, "group": pwd.getpwnam(NOBODY).pw_gid, "extra_groups": []} if os.getuid() == 0 else {}
    )


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/", **_as_nobody())
    assert done.returncode == 0, done.stdout + done.stderr


def free_port() -> int:
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return int(asked.getsockname()[1])


@contextmanager
def folder() -> Iterator[Path]:
    """A short path, since sockets lie in it, that belongs to whom the server runs as."""
    path = Path(tempfile.mkdtemp(prefix="hdb-", dir="/tmp"))
    if os.getuid() == 0:
        shutil.chown(path, NOBODY)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def postgres(path: Path) -> Server:
    programs, port = postgres_folder(), free_port()
    assert programs is not None
    data, user = path / "data", "heddle"
    _run(
        str(programs / "initdb"),
        "-D",
        str(data),
        "-U",
        user,
        "-A",
        "trust",
        "-N",
        "--no-locale",
        "-E",
        "UTF8",
    )
    command = [
        str(programs / "postgres"),
        "-D",
        str(data),
        "-p",
        str(port),
        "-k",
        str(path),
        "-h",
        "127.0.0.1",
    ]
    return Server(f"postgresql+psycopg://{user}@127.0.0.1:{port}/postgres", command, port)


def mariadb(path: Path) -> Server:
    program, port = mariadb_path(), free_port()
    assert program is not None
    data = path / "data"
    options = ["--no-defaults", f"--datadir={data}", f"--socket={path / 's'}", f"--pid-file={path / 'pid'}"]
    _run(
        "mariadb-install-db",
        *options[:2],
        "--auth-root-authentication-method=normal",
        "--skip-test-db",
        "--skip-name-resolve",
    )
    start = path / "start.sql"
    start.write_text("CREATE DATABASE IF NOT EXISTS heddle;\n")
    start.chmod(0o644)
    command = [program, *options, f"--port={port}", "--bind-address=127.0.0.1", f"--init-file={start}"]
    command += ["--skip-name-resolve", "--innodb-buffer-pool-size=16M", "--skip-log-bin"]
    return Server(f"mysql+pymysql://root@127.0.0.1:{port}/heddle", command, port)


SERVERS: dict[str, tuple[Callable[[Path], Server], Callable[[], object], str]] = {
    "postgresql": (postgres, postgres_folder, "postgresql"),
    "mariadb": (mariadb, mariadb_path, "mariadb-server"),
}
