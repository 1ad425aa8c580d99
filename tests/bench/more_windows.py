"""Windows from 256 to 4,096 beside compiled FlexAttention and cuDNN over all keys, in one run: a part of window_check.py.

First the op is held to float64 and to a second run at each window, with the launches that are set and with sums of rows by
descriptors; then both are timed at two lengths. At 8 x 4,096 a window of 4,096 is causal attention.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from dense_backends import HALF, Report, attempt, backend, drawn, phases
from gpu_check import Log
from window_backward import LENGTHS, OP, SMALL, TINY, exact_and_plain, hold, shape_of
from window_check import PLAIN, flex, ours, results

from heddle.kernels import force_path
from heddle.kernels.common.tuning import tuning
from heddle.kernels.sliding_window_attention import sliding_window_attention

WINDOWS = (256, 1024, 2048, 4096) if not TINY else (20,)
DTYPE = torch.float32 if TINY else HALF
OURS: dict[str, dict[str, Any]] = {"heddle": {}, "heddle, sums": {"descriptors": 1, "sums": 1}}
Late = Callable[[], bool]


def small(window: int) -> dict[str, int]:
    """More keys than the window has, and no whole number of tiles."""
    size = {"T": window + 333, "S": window + 333, "H": 2, "N": 2}
    return {**PLAIN, **(SMALL | {"T": 100, "S": 100} if TINY else size), "window": window}


def held(log: Log, late: Late) -> None:
    for window, (name, overrides) in itertools.product(WINDOWS, OURS.items()):
        if late():
            log("held: out of time")
            return
        sides = exact_and_plain(tuple(small(window).items()), DTYPE)
        try:
            hold(log, f"window {window}, {name}", sides, DTYPE, **overrides)
        except Exception as error:
            log.wrong.append(f"window {window}, {name}: {' '.join(str(error).split())[-200:]}")


def beside(log: Log, row: Report, late: Late) -> list[str]:
    """Times of all; gives the lines of a table."""
    rivals = {"flex": (flex, {}), "cudnn": (partial(backend, "cudnn"), {})}
    impls = {name: (ours, overrides) for name, overrides in OURS.items()} | rivals
    lines = []
    for (B, T), window in itertools.product(LENGTHS[: 1 if TINY else 2], WINDOWS):
        if late():
            log("windows: out of time")
            break
        shape, times = (
            shape_of(B, T, window) | (SMALL | {"B": 1} if TINY else {}),
            dict[tuple[str, str], float](),
        )
        given = drawn(shape, DTYPE)
        for (impl, (function, overrides)), phase in itertools.product(impls.items(), ("fwd", "fwdbwd")):
            with tuning(**overrides):
                call = phases(function, given)[phase]
                times[impl, phase] = attempt(log, row, (OP, impl, phase), shape, call)
        told = "  ".join(
            f"{phase} {' '.join(f'{impl} {times[impl, phase]:.3f}' for impl in impls)}: flex / heddle "
            f"{times['flex', phase] / times['heddle', phase]:.2f}"
            for phase in ("fwd", "fwdbwd")
        )
        lines.append(f"window {window} at {B} x {T}: {told}")
    return lines


def run(log: Log, row: Report, late: Callable[[float], Late]) -> list[str]:
    held(log, late(0.5))
    return beside(log, row, late(1.0))


def warm(index: int, workers: int) -> None:
    """Compiles every `workers`th case of FlexAttention, and the op's kernels, into the caches on disk."""
    cases = list(itertools.product(LENGTHS, WINDOWS))
    for (B, T), window in cases[index::workers]:
        for call in phases(flex, drawn(shape_of(B, T, window))).values():
            call()
    for overrides in [*OURS.values()][index::workers]:
        for shape in (small(WINDOWS[0]), shape_of(1, 1024, WINDOWS[0])):
            with tuning(**overrides), force_path("triton"):
                results(sliding_window_attention, drawn(shape), HALF)
