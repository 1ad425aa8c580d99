"""One call on a GPU machine: sliding_window_attention against float64, its launches, its rivals, and torch's dense backends.

    python tests/bench/window_check.py --budget 240 --out "$OUT"
    python tests/bench/window_check.py --only backward --budget 150 --out "$OUT" --commit "$(git rev-parse --short=12 HEAD)"
    python tests/bench/window_check.py --only more_windows --budget 240 --out "$OUT" --commit "$(git rev-parse --short=12 HEAD)"
    python tests/bench/window_check.py --only capped --budget 150 --out "$OUT" --commit "$(git rev-parse --short=12 HEAD)"
    TRITON_INTERPRET=1 python tests/bench/window_check.py --only backward --tiny --out /tmp/window

Compiles side by side first, then checks every dtype and form against masked softmax in float64, and each launch before its time.
Times windows beside compiled FlexAttention and dense attention, then the backends of dense attention: causal, masked, in groups,
a decode step, and the first call of a length, for which cuDNN makes a plan. `backward`, alone: launches of each kernel for
each window (window_backward.py); with `--tiny` they are only held, on a CPU. `more_windows` and `capped`, alone: windows from 256
to 4,096 (more_windows.py), and soft-caps and sink logits (capped.py), beside FlexAttention and cuDNN. Writes window_check.log and
rows to evidence-window-attention.jsonl; exits with 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from dense_backends import (
    DEVICE,
    HALF,
    WANTED,
    Given,
    Report,
    attempt,
    backend,
    dense,
    drawn,
    host,
    phases,
    scaled_as_dense,
)
from gpu_check import Log
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from heddle.kernels import force_path
from heddle.kernels.accuracy import EPSILON, worst_error
from heddle.kernels.bench import Row, machine, timed, timed_in_graph
from heddle.kernels.common.tuning import tuning
from heddle.kernels.configs.launch import Launch
from heddle.kernels.dense_attention import dense_attention, dense_attention_reference
from heddle.kernels.sliding_window_attention import sliding_window_attention

OP, WORKERS = "sliding_window_attention", 8
# What runs alone, and where it is.
PARTS = {"backward": "window_backward", "more_windows": "more_windows", "capped": "capped"}
MAIN = {"B": 1, "H": 8, "N": 2, "T": 1000, "S": 1500, "K": 128, "V": 128, "window": 200, "sinks": 4}
PLAIN = {**MAIN, "N": 8, "T": 1000, "S": 1000, "window": 512, "sinks": 0}
STEP = {**MAIN, "B": 3, "T": 1, "window": 1000}
SIZES = ((64, 64), (192, 128), (256, 256), (100, 72))
TRIED = {
    "forward": (
        Launch(128, 64, 8, 2, 128), Launch(128, 64, 8, 2), Launch(128, 64, 8, 3, 128), Launch(64, 64, 4, 2),
        Launch(64, 64, 4, 3), Launch(64, 64, 4, 2, 128), Launch(64, 32, 4, 3), Launch(128, 128, 8, 2),
        Launch(128, 32, 8, 3, 128), Launch(64, 128, 4, 2), Launch(128, 64, 4, 2),
    ),
    "queries": (
        Launch(64, 64, 4, 2), Launch(128, 64, 8, 2), Launch(64, 64, 4, 3), Launch(128, 32, 8, 3), Launch(64, 32, 4, 3),
        Launch(128, 128, 8, 2), Launch(128, 32, 8, 2, 128), Launch(128, 64, 8, 2, 128),
    ),
    "keys": (
        Launch(32, 128, 8, 2), Launch(64, 128, 8, 2), Launch(64, 64, 8, 2), Launch(64, 64, 8, 3), Launch(64, 64, 4, 2),
        Launch(32, 64, 4, 3), Launch(32, 64, 4, 2), Launch(32, 128, 8, 3), Launch(128, 64, 8, 2), Launch(128, 128, 8, 1),
    ),
}  # fmt: skip


def samples() -> Iterator[tuple[str, Given, dict[str, Any]]]:
    """What is checked: a name, arguments, and overrides."""
    real = torch.rand(2, 1500, device=DEVICE) > 0.3
    bounds = torch.tensor([0, 1, 130, 130, 700, 1000], device=DEVICE)
    for dtype in (HALF, torch.float16, torch.float32):
        yield f"{dtype} sinks", drawn(MAIN, dtype), {}
        yield f"{dtype} window", drawn(PLAIN, dtype), {}
        yield f"{dtype} window by pointers", drawn(PLAIN, dtype), {"descriptors": 0}
        for splits in (1, 3):
            yield f"{dtype} step in {splits}", drawn(STEP, dtype), {"splits": splits}
        for K, V in SIZES if dtype == HALF else SIZES[1:2]:
            yield f"{dtype} {K} {V}", drawn({**MAIN, "K": K, "V": V}, dtype), {}
    for tiles in (1, 0):
        yield "packed", drawn({**PLAIN, "sinks": 2, "window": 100}, cu_seqlens=bounds), {"descriptors": tiles}
        yield "padded", drawn({**MAIN, "B": 2}, real=real), {"descriptors": tiles}


def exact_of(*, q: Tensor, k: Tensor, v: Tensor, window: int, sinks: int, **limits: Any) -> Tensor:
    """All logits in float64, and a mask."""
    query = torch.arange(k.shape[2] - q.shape[2], k.shape[2], device=DEVICE)[:, None]
    key, bounds, real = torch.arange(k.shape[2], device=DEVICE), limits.get("cu_seqlens"), limits.get("real")
    bounds = torch.tensor([0, k.shape[2]], device=DEVICE) if bounds is None else bounds
    own = torch.searchsorted(bounds[1:], key, right=True)
    begin = bounds[own]
    seen = (key <= query) & ((query - key < window) | (key - begin < sinks)) & (own == own[query])
    mask = seen[None, None] if real is None else (seen & (real[:, None, None] | (key == query)))
    return dense_attention_reference(q, k, v, mask)


def results(function: Callable[..., Tensor], given: Given, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output and gradients in this dtype, heads behind time."""
    there = {**given, **{name: given[name].detach().to(dtype).requires_grad_() for name in WANTED}}
    out = function(**there)
    upstream = torch.randn(out.shape, generator=torch.Generator(DEVICE).manual_seed(7), device=DEVICE)
    upstream = upstream.to(given["q"].dtype).to(out)
    found = torch.autograd.grad(out, [there[name] for name in WANTED], upstream)
    named = {"out": out.detach(), **dict(zip(WANTED, found, strict=True))}
    return {name: x.transpose(1, 2) for name, x in named.items()}


def compare(
    log: Log, what: str, *, found: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor]
) -> bool:
    """Whether every result is within twice the error of plain torch."""
    bad, told = [], []
    for name, tensor in exact.items():
        epsilon = EPSILON[found[name].dtype]
        error, worst = worst_error(found[name], tensor, timed=True)
        bound = 2 * worst_error(plain[name], tensor, timed=True)[0] + epsilon
        told.append(f"{name} {error:.1e} of {bound:.1e}")
        bad += [] if error <= bound else [f"{what}: {name} {error:.2e}, at most {bound:.2e}: {worst}"]
    log(f"{'ok   ' if not bad else 'WRONG'} {what}: {', '.join(told)}")
    log.wrong += bad
    return not bad


def judge(log: Log, what: str, given: Given, exact: dict[str, Tensor], **overrides: Any) -> bool:
    dtype = given["q"].dtype
    with tuning(**overrides), force_path("triton"):
        found, again = (results(sliding_window_attention, given, dtype) for _ in range(2))
    if not all(torch.equal(found[name], again[name]) for name in found):
        log.wrong.append(f"{what}: two runs differ")
    with force_path("torch"):
        plain = results(sliding_window_attention, given, dtype)
    return compare(log, what, found=found, plain=plain, exact=exact)


def correctness(log: Log, late: Callable[[], bool]) -> None:
    for what, given, overrides in samples():
        if late():
            log("correctness: out of time")
            return
        try:
            judge(log, what, given, results(exact_of, given, torch.float64), **overrides)
        except Exception as error:
            log.wrong.append(f"{what}: {' '.join(str(error).split())[-300:]}")
    for (K, V), causal in itertools.product(((64, 64), (128, 128), (192, 128), (256, 256)), (True, False)):
        given = drawn({**MAIN, "T": 2048, "S": 2048, "K": K, "V": V}, is_causal=causal)
        given = {name: x for name, x in given.items() if name not in ("window", "sinks")}
        exact = results(dense_attention_reference, given, torch.float64)
        with sdpa_kernel(SDPBackend.MATH):
            plain = results(scaled_as_dense, given, HALF)
        found = results(dense_attention, given, HALF)
        compare(log, f"dense {K} {V} causal {causal}", found=found, plain=plain, exact=exact)


def ours(**given: Any) -> Tensor:
    with force_path("triton"):
        return sliding_window_attention(**given)


@cache
def block_mask(length: int, window: int) -> Any:
    def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG001
        return (key <= query) & (query - key < window)

    on_gpu = DEVICE.type == "cuda"
    return create_block_mask(seen, None, None, length, length, device=DEVICE.type, _compile=on_gpu)


@cache
def compiled(length: int, window: int) -> Any:  # noqa: ARG001
    """One each, or dynamic shapes would be compiled for, which are slower."""
    torch._dynamo.reset()
    # On a CPU compiling takes longer than all else.
    return torch.compile(flex_attention, dynamic=False) if DEVICE.type == "cuda" else flex_attention


def flex(*, q: Tensor, k: Tensor, v: Tensor, window: int, sinks: int) -> Tensor:  # noqa: ARG001
    return compiled(q.shape[2], window)(q, k, v, block_mask=block_mask(q.shape[2], window))  # type: ignore[no-any-return]


def windows(
    log: Log, row: Report, late: Callable[[], bool], *, first: bool, best: dict[str, Any] | None = None
) -> None:
    """The op, with its best launches as well once they are known, beside compiled FlexAttention and cuDNN over all keys."""
    shapes = [dict(one) for one in sliding_window_attention.cases.bench_shapes]
    for shape, phase in itertools.product(shapes, ("fwd", "fwdbwd")):
        if late() or (shape["window"] == 512) != (first or best is not None):
            continue
        given = drawn(shape)
        one = partial(attempt, log, row)
        if best is not None:
            with tuning(**best):
                told = ("sliding_window_attention", "heddle, best launches", phase)
                one(told, shape, phases(ours, given)[phase])
            continue
        rivals = [("heddle", ours), ("flex", flex)]
        rivals += [("cudnn", partial(backend, "cudnn"))] if first else []
        for impl, function in rivals:
            one(("sliding_window_attention", impl, phase), shape, phases(function, given)[phase])


def sweep(log: Log, row: Report, late: Callable[[], bool]) -> dict[str, Launch | int]:
    """Each launch, by descriptors and by pointers, on one shape: whether it is right, and its time; the best ones."""
    small = drawn(PLAIN)
    exact, shape = (
        results(exact_of, small, torch.float64),
        dict(sliding_window_attention.cases.bench_shapes[0]),
    )
    calls, found = phases(ours, drawn(shape)), dict[tuple[int, str], list[tuple[float, str, Launch]]]()
    for name, launch, tiles in every_launch():
        if late():
            log("sweep: out of time")
            break
        what, phase = f"{name} {launch} descriptors {tiles}", "fwd" if name == "forward" else "fwdbwd"
        try:
            if not judge(log, what, small, exact, **{name: launch, "descriptors": tiles}):
                continue
        except Exception as error:
            log(f"none  {what}: {' '.join(str(error).split())[-200:]}")
            continue
        with tuning(**{name: launch, "descriptors": tiles}):
            told = ("sliding_window_attention", f"heddle, {what}", phase)
            ms = attempt(log, row, told, shape, calls[phase])
        found.setdefault((tiles, name), []).append((ms, what, launch))
    best = {key: min(times, key=lambda one: one[0]) for key, times in found.items()}
    for ms, what, _ in best.values():
        log(f"best  {ms:.4f} ms {what}")
    sums = {tiles: sum(best.get((tiles, name), (1e9,))[0] for name in TRIED) for tiles in (1, 0)}
    tiles = min(sums, key=sums.__getitem__)
    return {"descriptors": tiles} | {name: best[tiles, name][2] for name in TRIED if (tiles, name) in best}


def every_launch() -> Iterator[tuple[str, Launch, int]]:
    for tiles in (1, 0):
        yield from ((name, launch, tiles) for name, launches in TRIED.items() for launch in launches)


def reports(log: Log, rows: Path, header: Row) -> tuple[Report, Callable[..., None]]:
    """What times a call and tells of it, and what tells of a time alone."""

    def report(impl: str, phase: str, shape: dict[str, int], times: Row, op: str = OP) -> None:
        about: Row = {"op": op, "impl": impl, "phase": phase, "shape": shape}
        with rows.open("a") as file:
            file.write(json.dumps({**header, **about, "dtype": "bfloat16", **times}) + "\n")
        sizes = f"{shape['B']} x {shape['T']:6} " + (
            f"window {shape['window']:4}" if "window" in shape else ""
        )
        log(f"{phase:8} {sizes:23} {times['ms'] or 0.0:9.4f} ms  {impl}")

    def row(op: str, impl: str, phase: str, shape: dict[str, int], call: Callable[[], object]) -> float:
        call()
        times = timed(call, DEVICE)
        report(impl, phase, shape, times, op)
        return float(times["ms"])

    return row, report


def part(name: str, log: Log, rows: Path, header: Row, *, budget: float, tiny: bool) -> list[str]:
    """A part of its own, compiled side by side first; gives its table."""
    begin = time.monotonic()
    row, report = reports(log, rows, header)
    if not tiny:
        command = [sys.executable, __file__, "--only", name, "--warm"]
        for process in [subprocess.Popen([*command, str(index)]) for index in range(WORKERS)]:
            process.wait()
        log(f"compiled after {time.monotonic() - begin:.0f} s")

    def late(share: float) -> Callable[[], bool]:
        return lambda: time.monotonic() - begin > share * budget

    module = importlib.import_module(PARTS[name])
    if name == "backward":
        lines: list[str] = module.launches_by_window(log, row, report, late)
    else:
        lines = module.run(log, row, late)
    return lines


def warm(index: int) -> None:
    """Compiles every `WORKERS`th thing that will run, into Triton's cache on disk."""
    things = [*samples()]
    things += [("", drawn(PLAIN), {name: one, "descriptors": tiles}) for name, one, tiles in every_launch()]
    for _, given, overrides in things[index::WORKERS]:
        try:
            with tuning(**overrides), force_path("triton"):
                results(sliding_window_attention, given, given["q"].dtype)
        except Exception as error:
            print(f"{overrides}: {str(error).splitlines()[0]}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--budget", type=float, default=240.0, help="seconds after which nothing new is begun"
    )
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the log")
    parser.add_argument("--skip", nargs="*", default=[])
    parser.add_argument("--only", choices=list(PARTS), help="this part, and nothing else")
    parser.add_argument("--commit", help="the code that runs")
    parser.add_argument("--tiny", action="store_true", help="small, on a CPU")
    parser.add_argument("--warm", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.warm is not None:
        return warm_up_to(chosen.warm, chosen.only)
    chosen.out.mkdir(parents=True, exist_ok=True)
    begin, log, header = time.monotonic(), Log(chosen.out / "window_check.log"), machine(DEVICE)
    header |= {"commit": chosen.commit or header["commit"]}
    rows = chosen.out / "evidence-window-attention.jsonl"
    if chosen.only:
        lines = part(chosen.only, log, rows, header, budget=chosen.budget, tiny=chosen.tiny)
        return told(log, lines, begin)

    def row(op: str, impl: str, phase: str, shape: dict[str, int], call: Callable[[], object]) -> float:
        call()
        times = timed_in_graph(call) if phase == "decode_graph" else timed(call, DEVICE)
        about: Row = {"op": op, "impl": impl, "phase": phase, "shape": shape, "dtype": "bfloat16"}
        with rows.open("a") as file:
            file.write(json.dumps({**header, **about, **times}) + "\n")
        sizes = " ".join(f"{name}={size}" for name, size in shape.items() if name not in ("H", "V", "S"))
        log(f"{phase:12} {sizes:44} {times['ms']:9.4f} ms  {op}: {impl}")
        return float(times["ms"])

    def late(share: float) -> Callable[[], bool]:
        return lambda: time.monotonic() - begin > share * chosen.budget

    def launches() -> None:
        windows(log, row, late(1.0), first=False, best=sweep(log, row, late(0.9)))

    def warm_up() -> None:
        command = [sys.executable, __file__, "--warm"]
        for process in [subprocess.Popen([*command, str(index)]) for index in range(WORKERS)]:
            process.wait()

    steps: dict[str, Callable[[], None]] = {
        "warm": warm_up,
        "correctness": lambda: correctness(log, late(0.4)),
        "windows": lambda: windows(log, row, late(0.55), first=True),
        "dense": lambda: dense(log, row, late(0.75)),
        "sweep": launches,
        "host": lambda: host(log),
        "more windows": lambda: windows(log, row, late(1.0), first=False),
    }
    for name, run in steps.items():
        if name not in chosen.skip:
            run()
            log(f"{name} done after {time.monotonic() - begin:.0f} s")
    return told(log, [], begin)


def warm_up_to(index: int, only: str | None) -> int:
    """What a process that compiles does."""
    if only is None:
        warm(index)
    else:
        importlib.import_module(PARTS[only]).warm(index, WORKERS)
    return 0


def told(log: Log, lines: list[str], begin: float) -> int:
    """Tells what was found and what was wrong, at last; gives the exit status."""
    for line in (*lines, *log.wrong, f"{len(log.wrong)} wrong, {time.monotonic() - begin:.0f} s"):
        log(line)
    return 1 if log.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
