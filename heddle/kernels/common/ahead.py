"""The kernels of a launcher are compiled side by side before it first runs; by itself Triton compiles one after the other.

A launcher knows which kernels it starts by running: so it runs twice, first with launches that only compile. What it makes then
is memory that nobody has written to, and is freed again.
"""

from __future__ import annotations

import contextvars
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import triton
from torch import Tensor

from heddle.kernels.op import INTERPRETED

# Triton's passes, LLVM and the assembler run without the interpreter lock.
THREADS = min(8, os.cpu_count() or 1)
_active = threading.local()


def compiles_only() -> bool:
    """Whether launches of this thread compile and start nothing."""
    return bool(getattr(_active, "compiles_only", False))


def compile_side_by_side(run: Callable[..., object], args: tuple[Any, ...]) -> None:
    """Compiles what `run(*args)` launches; nothing where Triton interprets, or knows no such mode.

    What does not compile says so when it is launched.
    """
    mode = getattr(triton, "AsyncCompileMode", None)
    if INTERPRETED or mode is None:
        return

    def compile_all() -> None:
        with ThreadPoolExecutor(THREADS) as pool, mode(pool, ignore_errors=True):
            run(*args)

    _active.compiles_only = True
    try:
        # Who is interrupted while it waits would leave the mode on.
        contextvars.copy_context().run(compile_all)
    finally:
        _active.compiles_only = False


def alike(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """What calls share whose kernels are the same, but for what sizes of batches and lengths say."""
    return tuple((x.dtype, x.shape[2:], x.get_device()) if isinstance(x, Tensor) else x for x in args)
