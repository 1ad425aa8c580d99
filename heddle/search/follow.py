"""A run folder read again and again while a search writes to it: each time only what is new is read.

Entries of the ledger never change once they are written, so that a trial is put together again only when an event
speaks of it. Needs only the standard library, as `heddle.search.record`.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from math import inf
from pathlib import Path
from time import monotonic
from typing import Any

from heddle.search.longer_results import LONGER_FILE
from heddle.search.record import (
    CONFIRM_FILE,
    EVENTS_FILE,
    LEDGER_FOLDER,
    RUN_FILE,
    Run,
    Trial,
    assemble,
    read_meta,
    run_from,
)

Stamp = tuple[tuple[int, int] | None, ...]
TOLD = ("trial_started", "trial_finished", "remeasured")


class Follower:
    """What `read_run` gives of `folder`, again for the price of what is new. Safe to call from several threads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._forget()

    def _forget(self) -> None:
        self._offset = self._size = 0
        self._events: list[dict[str, Any]] = []
        self._told: dict[str, dict[int, Mapping[str, Any]]] = {kind: {} for kind in TOLD}
        self._trials: dict[int, Trial] = {}
        self._run: Run | None = None
        self._stamp: Stamp = ()
        self._read_at = 0.0

    @property
    def share_read(self) -> float:
        """How much of the events was read, 0 to 1; less than 1 while a large run is being read."""
        return min(1.0, self._offset / self._size) if self._size else 1.0

    def stamp(self) -> Stamp:
        """Changes whenever the run may have: sizes and times of the files that are written to, and what was read."""
        return self._files() + self._taken()

    @property
    def seen(self) -> Stamp:
        """The stamp of what `read` gave last: not that of now, if more was written since."""
        return self._stamp

    def _files(self) -> Stamp:
        return tuple(_seen(self.folder / name) for name in (RUN_FILE, EVENTS_FILE, CONFIRM_FILE, LONGER_FILE))

    def _taken(self) -> Stamp:
        return ((self._offset, len(self._trials)),)

    def recent(self, seconds: float) -> Run | None:
        """What was read last of a run that is still being read, if that ended less than `seconds` ago; waits for nobody."""
        run, at = self._run, self._read_at
        return run if run is not None and self.share_read < 1 and monotonic() - at < seconds else None

    def read(self, seconds: float = inf, lines: float = inf) -> Run:
        """The run as it stands, the same object as before while nothing changed; after `seconds` or so many new `lines` what
        was read by then.

        Raises:
            HeddleError: "run-not-found".
        """
        with self._lock:
            if self._run is None or self.stamp() != self._stamp or self.share_read < 1:
                # Before the reading: what is written meanwhile shall be seen to be new.
                files = self._files()
                self._take_new(monotonic() + seconds, lines)
                trials = dict(sorted(self._trials.items()))
                self._run = run_from(self.folder, read_meta(self.folder), self._events, trials)
                self._stamp = files + self._taken()
                self._read_at = monotonic()
            return self._run

    def _take_new(self, until: float, lines: float) -> None:
        """Take up whole lines that were not read yet; a file that became shorter was cut, and is read anew."""
        path = self.folder / EVENTS_FILE
        if not path.exists():
            return
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < self._offset:
                self._forget()
            self._size = size
            file.seek(self._offset)
            for count, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    # Still being written: there is nothing more to read now.
                    self._size = self._offset
                    return
                self._take(line)
                self._offset += len(line)
                if count >= lines or monotonic() > until:
                    return
        self._size = self._offset

    def _take(self, line: bytes) -> None:
        if not line.strip():
            return
        event = json.loads(line.decode())
        self._events.append(event)
        if event["event"] not in TOLD:
            return
        number = event["number"]
        self._told[event["event"]][number] = event
        asked, finished, again = (self._told[kind] for kind in TOLD)
        if number in asked:
            ledger = self.folder / LEDGER_FOLDER
            self._trials[number] = assemble(ledger, asked[number], finished.get(number), again.get(number))


def _seen(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_size
