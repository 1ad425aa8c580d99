"""Launches of sliding_window_attention for each window, kernel by kernel, and what they gain: a part of window_check.py.

Each launch is held to float64 and to a second run, then timed at windows of 512, 128 and 4,096 with all else as the table
says, tiles and sums of rows by descriptors; then the best of each window together, at both lengths, beside the table, the
best with sums by pointers, and compiled FlexAttention.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from dense_backends import DEVICE, HALF, Given, Report, attempt, drawn, phases
from gpu_check import Log
from torch import Tensor
from window_check import MAIN, PLAIN, compare, exact_of, flex, ours, results

from heddle.kernels import force_path
from heddle.kernels._sliding_window_attention_launch import launch_backward, launch_forward
from heddle.kernels.bench import timed
from heddle.kernels.common.tuning import tuning
from heddle.kernels.configs.launch import Launch
from heddle.kernels.sliding_window_attention import sliding_window_attention

OP = "sliding_window_attention"
TINY = DEVICE.type == "cpu"
# As Triton 3.6 makes them for Hopper: one to three programs share a multiprocessor, and none of their products waits for another
# for want of registers (ptxas tells so of a forward pass of 128 x 64 by 8 warps with 128 registers).
TRIED = {
    "queries": (
        Launch(64, 64, 4, 2), Launch(128, 32, 8, 3, 128), Launch(64, 32, 4, 3), Launch(64, 32, 4, 2), Launch(64, 32, 4, 4),
        Launch(128, 32, 4, 3), Launch(128, 64, 8, 3), Launch(128, 128, 8, 2),
    ),
    "keys": (
        Launch(32, 64, 4, 2), Launch(32, 64, 4, 4), Launch(32, 64, 4, 3), Launch(64, 64, 4, 2), Launch(32, 128, 8, 4),
        Launch(32, 128, 8, 3), Launch(64, 128, 8, 2), Launch(64, 128, 8, 3),
    ),
    "forward": (
        Launch(64, 64, 4, 3), Launch(128, 32, 4, 3), Launch(128, 64, 4, 2), Launch(64, 32, 4, 3), Launch(64, 64, 4, 2),
        Launch(128, 64, 8, 3), Launch(128, 128, 8, 2),
    ),
}  # fmt: skip
WINDOWS = (512, 128, 4096)
LENGTHS = ((8, 4096), (1, 131072))
SIDES = {"H": 16, "N": 16, "K": 128, "V": 128, "sinks": 0}
SMALL = {"H": 2, "N": 2, "T": 150, "S": 150, "K": 32, "V": 32}
BLAMED = {"out": "forward", "q": "queries", "k": "keys", "v": "keys"}
ALL = {"descriptors": 1, "sums": 1}
Best = dict[int, dict[str, Launch]]


def shape_of(B: int, T: int, window: int) -> dict[str, int]:
    return {"B": B, "T": T, "S": T, "window": window, **SIDES}


def tried() -> list[tuple[str, Launch]]:
    found = [(name, launch) for name, launches in TRIED.items() for launch in launches]
    return found[:: len(found) // 4] if TINY else found


def forms() -> Iterator[tuple[str, dict[str, int], torch.dtype, dict[str, Any]]]:
    """What the best launches are held in: a name, sizes, a dtype, and limits."""
    real = torch.rand(2, MAIN["S"], generator=torch.Generator().manual_seed(1)).to(DEVICE) > 0.3
    bounds = torch.tensor([0, 1, 130, 130, 700, 1000], device=DEVICE)
    yield "window", {**PLAIN, "window": 512}, torch.float16, {}
    for window in WINDOWS[:2]:
        yield f"window {window}", {**PLAIN, "window": window}, HALF, {}
    yield "sinks", MAIN, HALF, {}
    yield "padded", {**MAIN, "B": 2}, HALF, {"real": real}
    yield "packed", {**PLAIN, "sinks": 2, "window": 100}, HALF, {"cu_seqlens": bounds}
    yield "heads of 64", {**MAIN, "K": 64, "V": 64}, HALF, {}


@cache
def exact_and_plain(shape: tuple[tuple[str, int], ...], dtype: torch.dtype) -> tuple[Any, Any, Any]:
    given = drawn(dict(shape), dtype)
    return given, results(exact_of, given, torch.float64), _plain(given, dtype)


def _plain(given: Given, dtype: torch.dtype) -> dict[str, Tensor]:
    with force_path("torch"):
        return results(sliding_window_attention, given, dtype)


def hold(log: Log, what: str, sides: tuple[Any, Any, Any], dtype: torch.dtype, **overrides: Any) -> bool:
    """Whether all results are within the bound, and equal to the bit the second time."""
    given, exact, plain = sides
    with tuning(**overrides), force_path("triton"):
        found, again = (results(sliding_window_attention, given, dtype) for _ in range(2))
    is_equal = all(torch.equal(found[name], again[name]) for name in found)
    if not is_equal:
        log.wrong.append(f"{what}: two runs differ")
    return compare(log, what, found=found, plain=plain, exact=exact) and is_equal


def held(log: Log, late: Callable[[], bool]) -> list[tuple[str, Launch]]:
    """The launches that are right. What does not fit the device is none; what is wrong is told and not timed."""
    dtype, found = torch.float32 if TINY else HALF, []
    shape = {**PLAIN, "window": 200, **(SMALL | {"window": 70} if TINY else {})}
    sides = exact_and_plain(tuple(shape.items()), dtype)
    for name, launch in tried():
        if late():
            log("launches: out of time")
            break
        try:
            if hold(log, f"{name} {launch}", sides, dtype, **{name: launch, **ALL}):
                found.append((name, launch))
        except Exception as error:
            log(f"none  {name} {launch}: {' '.join(str(error).split())[-160:]}")
    return found


def sweep(log: Log, report: Callable[..., None], late: Callable[[], bool]) -> Best:
    """The fastest launch of each kernel for each window."""
    right, best = held(log, late), dict[int, dict[str, Launch]]()
    for window in WINDOWS[:1] if TINY else WINDOWS:
        shape = shape_of(*LENGTHS[window == WINDOWS[-1]], window) | (SMALL | {"B": 1} if TINY else {})
        given = drawn(shape, torch.float32 if TINY else HALF)
        q, k, v = given["q"], given["k"], given["v"]
        numbers = (None, None, shape["K"] ** -0.5, window, 0)
        out, lse = launch_forward(q, k, v, *numbers)
        upstream = torch.randn_like(out)
        calls = {
            "fwd": partial(launch_forward, q, k, v, *numbers),
            "bwd": partial(launch_backward, upstream, q, k, v, *numbers, out, lse),
        }
        times = dict[str, list[tuple[float, Launch]]]()
        for name, launch in right:
            if late():
                log("sweep: out of time")
                break
            phase = "fwd" if name == "forward" else "bwd"
            with tuning(**{name: launch, **ALL}):
                told = {"ms": None} if TINY else timed(calls[phase], DEVICE)
            report(f"heddle, {name} {launch}", phase, shape, told)
            times.setdefault(name, []).append((told["ms"] or 0.0, launch))
        best[window] = {name: min(those, key=lambda one: one[0])[1] for name, those in times.items()}
        del given, q, k, v, out, lse, upstream, calls
    return best


def beside(log: Log, row: Report, best: Best, late: Callable[[], bool]) -> list[str]:
    """The table's launches, the best ones and FlexAttention, in both directions; gives the lines of a table."""
    lines = []
    for (window, launches), (B, T) in itertools.product(best.items(), LENGTHS):
        if late() or TINY:
            break
        shape, times = shape_of(B, T, window), dict[tuple[str, str], float]()
        given = drawn(shape)
        rivals = {
            "heddle": (ours, {}),
            "heddle, best launches": (ours, {**ALL, **launches}),
            "heddle, best launches, sums by pointers": (ours, {**ALL, **launches, "sums": 0}),
            "flex": (flex, {}),
        }
        for (impl, (function, overrides)), phase in itertools.product(rivals.items(), ("fwd", "fwdbwd")):
            with tuning(**overrides):
                call = phases(function, given)[phase]
                times[impl, phase] = attempt(log, row, (OP, impl, phase), shape, call)
        told = "  ".join(
            f"{phase} {' '.join(f'{times[impl, phase]:.3f}' for impl in rivals if impl != 'flex')} "
            f"flex {times['flex', phase]:.3f} = {times['flex', phase] / times['heddle, best launches', phase]:.2f}"
            for phase in ("fwd", "fwdbwd")
        )
        lines.append(f"window {window} at {B} x {T}: {told}")
    for window, launches in best.items():
        lines += [f"window {window}: {name}={launch}" for name, launch in launches.items()]
    return lines


def launches_by_window(
    log: Log, row: Report, report: Callable[..., None], late: Callable[[float], Callable[[], bool]]
) -> list[str]:
    """Holds, times and compares; gives the table that comes last."""
    best = sweep(log, report, late(0.65))
    distinct = {str(launches): (window, launches) for window, launches in best.items()}
    for name, sizes, dtype, limits in forms():
        if TINY and limits:
            continue
        dtype = torch.float32 if TINY else dtype
        given = drawn(sizes | (SMALL | {"T": 100} if TINY else {}), dtype, **limits)
        sides = (given, results(exact_of, given, torch.float64), _plain(given, dtype))
        for window, launches in distinct.values():
            if not late(0.75)():
                hold(log, f"best of {window}: {name} {dtype}", sides, dtype, **ALL, **launches)
    return beside(log, row, best, late(1.0))


def warm(index: int, workers: int) -> None:
    """Compiles every `workers`th launch, and FlexAttention, into the caches on disk."""
    short = {**shape_of(1, 1024, 200), "H": 16}
    cases = [(window, B, T) for window in WINDOWS for B, T in LENGTHS]
    for window, B, T in cases[index::workers]:
        phases(flex, drawn(shape_of(B, T, window)))["fwdbwd"]()
    for name, launch in tried()[index::workers]:
        for shape in (short, {**PLAIN, "window": 200}):
            try:
                with tuning(**{name: launch, **ALL}), force_path("triton"):
                    results(sliding_window_attention, drawn(shape), HALF)
            except Exception as error:
                print(f"{name} {launch}: {str(error).splitlines()[0]}", flush=True)
