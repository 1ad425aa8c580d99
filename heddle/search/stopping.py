"""Signals that ask a search to stop: Ctrl-C, and those of `timeout`, of a cluster's scheduler, of a terminal that closes."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from heddle.errors import HeddleError
from heddle.search.driver import Driver
from heddle.search.record import RUN_FILE

# Whoever sends SIGTERM kills a while later, Docker after 10 s: what runs may take so long to end, and Ray takes some seconds.
GRACE_S, AGAIN_S = 5.0, 1.0
# A second one of these changes nothing: `timeout` and a shell that is left send theirs twice.
WITH_GRACE = (signal.SIGTERM, signal.SIGHUP)
ASKING = (signal.SIGINT, *WITH_GRACE)


class Stopping:
    """What the search in `folder` does when it is asked to stop; use it as a context. `again` is what to type to go on.

    Before there is a `driver`, it ends at once. SIGINT lets it finish what runs, SIGTERM and SIGHUP the same for `GRACE_S`;
    a second SIGINT, or the end of that time, raises HeddleError "interrupted". In a thread no signal is heeded.
    """

    def __init__(self, folder: Path, again: str) -> None:
        self._folder, self._again = folder, again
        self.driver: Driver | None = None
        self._before: dict[signal.Signals, Any] = {}
        # The caller's alarm, which waits while what runs has its time to end.
        self._timer = (0.0, 0.0)
        self._terminals = [number for number in (1, 2) if _is_terminal(number)]

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():
            # Under nohup a search outlives its terminal.
            heeded = [
                one for one in ASKING if one != signal.SIGHUP or signal.getsignal(one) != signal.SIG_IGN
            ]
            self._before = {one: signal.signal(one, self._asked) for one in heeded}
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if signal.SIGALRM in self._before:
            signal.setitimer(signal.ITIMER_REAL, *self._timer)
        for one, handler in self._before.items():
            # None stands for a handler that was not set from Python.
            signal.signal(one, signal.SIG_DFL if handler is None else handler)
        if not isinstance(error, KeyboardInterrupt):
            return
        if self.driver is None:
            hint = self._hint if (self._folder / RUN_FILE).exists() else "nothing was begun yet"
            raise HeddleError("interrupted", "the search was stopped as it started", hint=hint) from None
        self.driver.log.write("search_finished", status="stopped")
        raise HeddleError("interrupted", "the search was stopped", hint=self._hint) from None

    def _asked(self, number: int, _: FrameType | None) -> None:
        self._leave_closed_terminals()
        if self.driver is None:
            raise KeyboardInterrupt
        is_first, asked = not self.driver.stopping, signal.Signals(number)
        if asked not in WITH_GRACE and not is_first:
            self._end()
        self.driver.stop()
        if asked in WITH_GRACE and signal.SIGALRM not in self._before:
            self._before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._end)
            # Again and again: code that may not raise swallows it.
            self._timer = signal.setitimer(signal.ITIMER_REAL, GRACE_S, AGAIN_S)
            self._tell(f"stopping ({asked.name}): what runs has {GRACE_S:g} s to end")
        elif is_first:
            self._tell("stopping once the running evaluations are done (Ctrl-C again stops now)")

    def _end(self, *_: object) -> None:
        # The one error that comes through a call of Ray's as it was raised (ray 2.60).
        raise KeyboardInterrupt

    @property
    def _hint(self) -> str:
        return f"go on with: {self._again}"

    def _tell(self, what: str) -> None:
        assert self.driver is not None
        self.driver.progress.message(f"{what}; {self._hint}", "warning")

    def _leave_closed_terminals(self) -> None:
        """Nobody reads what goes to a terminal that is gone, and to write there is an error."""
        for number in self._terminals:
            if not _is_terminal(number):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, number)
                os.close(nowhere)


def _is_terminal(number: int) -> bool:
    with contextlib.suppress(OSError):
        return os.isatty(number)
    return False
