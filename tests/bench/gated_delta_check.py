"""One call on a GPU machine: are gated_delta_rule and delta_rule right, and which launch configurations are best.

    python tests/bench/gated_delta_check.py --budget 240 --out "$OUT"

Compiles side by side first, then checks dtypes, head sizes and configurations against the float64 reference, and times each
kernel in each configuration. Writes gated_delta_check.log; the short table comes last. Exits with 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_check import Log
from triton.testing import do_bench

from heddle.kernels import Op, delta_rule, force_path, gated_delta_rule, gated_delta_rule_step
from heddle.kernels import _gated_delta_rule_launch as launcher
from heddle.kernels.accuracy import compare, draw
from heddle.kernels.bench import timed_in_graph
from heddle.kernels.common.tuning import tuning
from heddle.kernels.configs.launch import Launch

DEVICE = torch.device("cuda")
WORKERS = 15
OPS: tuple[Op[..., Any], ...] = (gated_delta_rule, delta_rule)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SIZES = ((128, 128), (24, 40), (100, 72), (256, 256))
LENGTHS = (1, 65, 300)
CHECKED = {"B": 1, "H": 2, "HV": 4}
WIDE = {"H": 16, "HV": 16, "K": 128, "V": 128}
SHAPES = ({"B": 8, "T": 4096, **WIDE}, {"B": 1, "T": 32768, **WIDE})
GROUPED = {"B": 1, "T": 32768, **WIDE, "H": 4}
STATE = (Launch(64, 64, 4, 2), Launch(64, 64, 4, 3), Launch(64, 128, 8, 2))
TRIED = {
    "forward": STATE,
    "keep": STATE,
    "backward": STATE,
    "solve": (Launch(64, 64, 4, 1), Launch(64, 64, 4, 1, 128)),
    "gradient": (
        Launch(64, 64, 8, 1), Launch(64, 64, 8, 2), Launch(64, 32, 8, 2), Launch(64, 64, 16, 1), Launch(64, 64, 16, 2),
        Launch(64, 128, 16, 1), Launch(64, 128, 8, 1), Launch(64, 64, 8, 1, 128),
    ),
}  # fmt: skip
STEPS = tuple(
    Launch(1, columns, warps, 1)
    for columns, warps in ((8, 1), (16, 1), (16, 4), (32, 2), (32, 4), (64, 4), (128, 4), (128, 8))
)


def one(op: Op[..., Any], dtype: torch.dtype, K: int, V: int, T: int, overrides: dict[str, Launch]) -> Any:
    # Asked for: what has not passed here yet is not taken otherwise.
    with tuning(**overrides), force_path("triton"):
        return compare(op, draw(op, {**CHECKED, "K": K, "V": V, "T": T}, dtype), DEVICE)


def things(*, sweeping: bool) -> Iterator[Callable[[], Any]]:
    """What compiles everything that will run, the slow first."""
    for (K, V), op, dtype in itertools.product(reversed(SIZES), OPS, DTYPES):
        yield partial(one, op, dtype, K, V, 65, {})
    for heads, gated, segment in (
        (16, True, 64),
        (4, True, 64),
        (16, False, 64),
        (16, True, 512),
        (4, True, 512),
        (16, False, 512),
    ):
        yield partial(launch_all, {**WIDE, "H": heads, "B": 1, "T": 200}, gated, segment)
    for name, launches in TRIED.items() if sweeping else ():
        for launch in launches:
            yield partial(one, gated_delta_rule, torch.bfloat16, 128, 128, 65, {name: launch})


def launch_all(shape: dict[str, int], gated: bool, segment: int) -> None:
    inputs = Inputs(shape, gated)
    with tuning(segment=segment):
        inputs.forward(keep=False)
        inputs.backward()()


def warm(index: int, *, sweeping: bool) -> None:
    for thing in list(things(sweeping=sweeping))[index::WORKERS]:
        try:
            thing()
        except Exception as error:
            print(f"{thing}: {str(error).splitlines()[0][:300]}", flush=True)


class Inputs:
    """Tensors of one shape, and the launches over them."""

    def __init__(self, shape: dict[str, int], gated: bool, dtype: torch.dtype = torch.bfloat16) -> None:
        generator = torch.Generator(DEVICE).manual_seed(0)
        drawn = gated_delta_rule.cases.timed_inputs(shape, generator)  # type: ignore[misc]
        self.q, self.k, self.v = (drawn[name].to(dtype) for name in "qkv")
        self.log_decay = drawn["log_decay"].float() if gated else None
        self.beta = drawn["beta"].float()
        self.d_out = torch.randn_like(self.v)
        self.gated = gated

    def forward(self, *, keep: bool) -> Any:
        given = (self.q, self.k, self.v, self.log_decay, self.beta, 0.1, None, None)
        return launcher.launch_forward(*given, keep=keep)

    def solve(self, inverse: str | None = None) -> Callable[[], None]:
        layout = launcher._Layout(self.q, self.v, None, gated=self.gated)
        if inverse:
            layout.plan = replace(layout.plan, inverse=inverse)
        kept = launcher.kept_like(self.q, self.v, None, keep=False)
        return lambda: launcher._solve(self.q, self.k, self.log_decay, self.beta, 0.1, kept, layout)

    def backward_state(self) -> Callable[[], Any]:
        kept = self.forward(keep=True)[2]
        layout = launcher._Layout(self.q, self.v, None, gated=self.gated)
        return lambda: launcher._run_backward_state(self.d_out, None, self.q, self.k, 0.1, kept, layout)

    def backward(self) -> Callable[[], Any]:
        kept = self.forward(keep=True)[2]
        given = (self.q, self.k, self.v, self.log_decay, self.beta, 0.1, None, None, kept)
        return lambda: launcher.launch_backward(self.d_out, None, *given)


def correctness(log: Log, late: Callable[[], bool]) -> None:
    for op, dtype, (K, V) in itertools.product(OPS, DTYPES, SIZES):
        for T in LENGTHS if K == 128 else LENGTHS[-1:]:
            if late():
                log("correctness: out of time")
                return
            log.check(f"{op.name} {dtype} K={K} V={V} T={T}", one(op, dtype, K, V, T, {}))
        if K == 128:
            packed = draw(op, {**CHECKED, "K": K, "V": V, "T": 200}, dtype, cu_seqlens=[0, 5, 5, 70, 200])
            with tuning(segment=64), force_path("triton"):
                log.check(f"{op.name} {dtype} packed, segments", compare(op, packed, DEVICE))
                whole = draw(op, {**CHECKED, "K": K, "V": V, "T": 300}, dtype)
                log.check(f"{op.name} {dtype} segments", compare(op, whole, DEVICE))


def milliseconds(call: Callable[[], Any]) -> float:
    return float(do_bench(call, warmup=5, rep=20, quantiles=[0.5]))


def sweep(log: Log, late: Callable[[], bool]) -> None:
    good: dict[str, list[Launch]] = {}
    for name, launches in TRIED.items():
        for launch in launches:
            try:
                if log.check(
                    f"{name} {launch}", one(gated_delta_rule, torch.bfloat16, 128, 128, 300, {name: launch})
                ):
                    good.setdefault(name, []).append(launch)
            except Exception as error:
                log(f"none  {name} {launch}: {str(error).splitlines()[0][:200]}")
    for shape, gated in ((SHAPES[0], True), (SHAPES[1], True), (GROUPED, True), (SHAPES[1], False)):
        if late():
            log("sweep: out of time")
            return
        inputs = Inputs(shape, gated)
        told = f"{' '.join(f'{letter}={size}' for letter, size in shape.items())} {'gated' if gated else 'plain'}"
        for name in TRIED:
            for launch in good.get(name, []):
                with tuning(**{name: launch}):
                    if name in ("forward", "keep"):
                        found = [milliseconds(partial(inputs.forward, keep=name == "keep"))]
                    elif name == "solve":
                        found = [milliseconds(inputs.solve())]
                    else:
                        found = [
                            milliseconds(inputs.backward_state() if name == "backward" else inputs.backward())
                        ]
                log(f"{told} {name} {launch}: {' '.join(f'{ms:.4f}' for ms in found)} ms")
        for segment in (1024, 2048, 4096, 8192, shape["T"]) if shape["B"] == 1 else ():
            with tuning(segment=segment):
                found = [milliseconds(partial(inputs.forward, keep=keep)) for keep in (False, True)]
                found.append(milliseconds(inputs.backward_state()))
            log(f"{told} segment {segment}: {' '.join(f'{ms:.4f}' for ms in found)} ms")
        if gated:
            for inverse in ("fp16", "bf16x3"):
                log(f"{told} solve {inverse}: {milliseconds(inputs.solve(inverse)):.4f} ms")


def steps(log: Log) -> None:
    for B in (1, 32, 256):
        drawn = draw(gated_delta_rule, {"B": B, "T": 1, **WIDE}, torch.bfloat16, device=DEVICE).arguments
        state = drawn.pop("initial_state")
        for launch in STEPS:
            with tuning(step=launch):
                call = lambda: gated_delta_rule_step(**drawn, state=state)  # noqa: B023, E731
                ms = timed_in_graph(call)["ms"]
                log(f"step B={B} {launch}: {ms:.5f} ms")
        log(f"step B={B} eager: {milliseconds(lambda: gated_delta_rule_step(**drawn, state=state)):.5f} ms")  # noqa: B023


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--budget", type=float, default=240.0, help="seconds after which nothing new is begun"
    )
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the log")
    parser.add_argument("--skip", nargs="*", default=[], choices=["correctness", "sweep", "steps"])
    parser.add_argument("--warm", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.warm is not None:
        torch.set_num_threads(1)
        warm(chosen.warm, sweeping="sweep" not in chosen.skip)
        return 0
    begin = time.monotonic()
    chosen.out.mkdir(parents=True, exist_ok=True)
    log = Log(chosen.out / "gated_delta_check.log")

    def late(share: float) -> Callable[[], bool]:
        return lambda: time.monotonic() - begin > share * chosen.budget

    command = [sys.executable, __file__, "--warm"]
    workers = [
        subprocess.Popen(
            [*command, str(index), "--skip", *chosen.skip],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(WORKERS)
    ]
    for worker in workers:
        for line in worker.communicate()[0].splitlines()[-5:]:
            log(f"compile: {line}")
    log(f"compiled in {time.monotonic() - begin:.0f} s")
    if "steps" not in chosen.skip:
        steps(log)
    if "sweep" not in chosen.skip:
        sweep(log, late(0.8))
    log(f"swept after {time.monotonic() - begin:.0f} s")
    if "correctness" not in chosen.skip:
        correctness(log, late(1.0))
    for line in (*log.wrong, f"{len(log.wrong)} wrong, {time.monotonic() - begin:.0f} s"):
        log(line)
    return 1 if log.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
