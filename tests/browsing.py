"""A dashboard that serves, and Debian's Chromium to look at it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Playwright

ROOT = Path(__file__).parents[1]
NAMES = ("chromium", "chromium-browser", "google-chrome")


def chromium_path() -> str | None:
    """Where the machine has a Chromium; `.ci/run` installs Debian's."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


def chromium(playwright: Playwright) -> Browser:
    """A browser that reaches nothing but this machine."""
    only_here = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost"
    arguments = ["--no-sandbox", "--disable-gpu", only_here]
    return playwright.chromium.launch(executable_path=chromium_path(), args=arguments)


@contextmanager
def serving(folder: Path, *, bench: Path | None = None, specs: Sequence[Path] = ()) -> Iterator[str]:
    """The address of `heddle dashboard FOLDER`, a process of its own, without the slash at its end."""
    # From where its name is as short as a user would type it.
    base = folder.resolve().parents[1]
    command = [
        sys.executable,
        "-P",
        "-m",
        "heddle",
        "dashboard",
        os.path.relpath(folder, base),
        "--port",
        "0",
    ]
    command += ["--bench", os.path.relpath(bench, base)] if bench else []
    command += [part for path in specs for part in ("--spec", os.path.relpath(path, base))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, cwd=base, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip().rstrip("/")
        finally:
            process.terminate()
