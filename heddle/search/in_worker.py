"""What runs around a call in a Ray worker. torch is there only where the call brings it: a worker without it starts in a tenth
of the time, and takes a fifth of the memory."""

from __future__ import annotations

import faulthandler
import functools
import gc
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from heddle.errors import HeddleError
from heddle.search import said


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a call gave: errors travel as data, because Ray would wrap them in types of its own."""

    value: Any
    error: Exception | None
    log: str


def guarded(call: Callable[..., Any], device: str, *arguments: Any) -> Outcome:
    """`call(*arguments)` with its output kept, one thread on a CPU, and errors as data."""
    _take_one_thread()
    if "torch" in sys.modules:
        _keep_what_is_imported()
    with said.kept() as printed:
        try:
            value = call(*arguments)
            return Outcome(value, None, said.read(printed))
        except Exception as error:
            log = said.read(printed) + traceback.format_exc()
            return Outcome(None, _portable(error), log)
        finally:
            gc.collect()
            if device == "cuda" and "torch" in sys.modules:
                sys.modules["torch"].cuda.empty_cache()


@functools.cache
def _keep_what_is_imported() -> None:
    """Takes what there is from the collector, once a process. The modules of torch and transformers have so many objects that
    each later collection would take 0.2 s and more over them: a call makes one, a timing several."""
    gc.collect()
    gc.freeze()


def _take_one_thread() -> None:
    """A training has one core; a timing asks for all of them itself."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    else:
        # Read by torch when it is imported.
        os.environ["OMP_NUM_THREADS"] = "1"


def limited(limit_s: float, call: Callable[..., Any], *arguments: Any) -> Any:
    """`call(*arguments)`; after the limit the process says its stack (`heddle.search.said`) and ends.

    The watch is a thread of C: it needs no lock of Python's, which a call that hangs may hold.
    """
    faulthandler.dump_traceback_later(limit_s, exit=True, file=said.STDERR)
    try:
        return call(*arguments)
    finally:
        faulthandler.cancel_dump_traceback_later()


def _portable(error: Exception) -> Exception:
    """`error` itself where the driver can read it, else one that tells the same."""
    if isinstance(error, HeddleError):
        return error
    if "torch" in sys.modules and isinstance(error, sys.modules["torch"].OutOfMemoryError):
        return HeddleError("out-of-memory", str(error).partition(". ")[0])
    return RuntimeError(f"{type(error).__name__}: {error}")
