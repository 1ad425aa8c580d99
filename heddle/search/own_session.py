"""Ray's processes in a session of their own, which no signal to the process group of the search reaches.

Ctrl-C, `timeout` and a terminal that closes signal the whole group. Ray's processes would end by it before the driver has, and a
driver that has lost Ray can only abort.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# The thread whose forks leave.
_thread: int | None = None


def _leave() -> None:
    if _thread == threading.get_ident():
        os.setsid()


# Once, as it cannot be taken back. Ray (2.60) has no option for this, and starts its processes by a fork that asks.
os.register_at_fork(after_in_child=_leave)


@contextmanager
def own_session() -> Iterator[None]:
    """What Ray forks here leaves for a session of its own; to join a cluster it forks nothing.

    Ray's handler of SIGTERM, which leaves without a word, raises KeyboardInterrupt instead, and is taken back afterwards.
    """
    global _thread
    before = signal.getsignal(signal.SIGTERM)
    _thread = threading.get_ident()
    try:
        yield
    except SystemExit as asked:
        raise KeyboardInterrupt from asked
    finally:
        _thread = None
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
