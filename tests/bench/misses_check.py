"""One call on a GPU machine: where docs/performance.md misses a goal, which kernels take the time, and do other launches help.

    python tests/bench/misses_check.py --out "$OUT" --budget 200 --commit "$(git rev-parse --short=12 HEAD)"
    python tests/bench/misses_check.py --out /tmp/misses --budget 200 --tiny

Compiles side by side first. Each launch is held to the float64 reference before it is timed; times are those of the device,
kernel by kernel, as the profiler tells them (a step's that of a CUDA graph). Writes misses_check.log, and a row for each launch
to evidence-misses.jsonl; the short table comes last. Exits with 1 if anything was wrong. `--tiny`: small, on a CPU, not timed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_check import Log
from rat_check import DEVICE, TINY, told

from heddle.kernels import Op, decay_attention, gated_delta_rule, simple_gla
from heddle.kernels.accuracy import Measured, compare, draw
from heddle.kernels.bench import Call, _call, _function, machine, timed_in_graph, timing_sample
from heddle.kernels.common.tuning import tuning
from heddle.kernels.configs.launch import Launch
from heddle.kernels.op import Phase, Shape
from heddle.kernels.selftest import _compare_step

WORKERS, CALLS = 14, 5
HALF = torch.float32 if TINY else torch.bfloat16
WIDE = {"H": 16, "HV": 16, "K": 128, "V": 128}
WHOLE = {"B": 8, "T": 4096, **WIDE}
LONG = {"B": 1, "T": 32768, **WIDE}
CHECKED = {"B": 1, "T": 130, "H": 1, "HV": 2, "K": 128, "V": 128}
OUTPUT = (
    Launch(64, 64, 4, 3), Launch(64, 64, 4, 1), Launch(64, 128, 8, 2), Launch(64, 128, 8, 3), Launch(64, 64, 8, 2),
    Launch(64, 32, 4, 2), Launch(32, 64, 4, 3), Launch(64, 128, 4, 2),
)  # fmt: skip
BACKWARD = (
    Launch(64, 64, 4, 1), Launch(64, 64, 4, 3), Launch(64, 64, 8, 2), Launch(64, 128, 8, 2), Launch(64, 128, 8, 1),
    Launch(64, 32, 4, 2), Launch(32, 64, 4, 2),
)  # fmt: skip
SOLVE = (Launch(64, 64, 8, 1), Launch(64, 64, 4, 1, 128))
FORWARD = (
    Launch(64, 64, 4, 1), Launch(64, 64, 4, 3), Launch(64, 64, 8, 2), Launch(64, 128, 8, 2), Launch(64, 32, 4, 2),
    Launch(64, 32, 4, 3),
)  # fmt: skip
GRADIENT = (Launch(64, 64, 4, 1), Launch(64, 32, 8, 1), Launch(64, 128, 8, 1))
STEPS = tuple(
    Launch(1, columns, warps, 1)
    for columns, warps in ((8, 1), (16, 1), (16, 2), (32, 1), (32, 2), (64, 1), (64, 2), (64, 4), (128, 4))
)
SEGMENTS = (1024, 2048, 4096, 8192)


@dataclass(frozen=True, eq=False)
class Miss:
    """What is timed: an op as benchmarks call it, and for each of its kernels the launches that are tried."""

    op: Op[..., Any]
    phase: Phase
    shape: Shape
    tried: dict[str, tuple[Launch, ...] | tuple[int, ...]]

    def overrides(self) -> Iterator[dict[str, Launch | int]]:
        yield {}
        for name, launches in self.tried.items():
            yield from ({name: launch} for launch in launches)

    def check(self) -> list[Measured]:
        if self.phase == "decode_graph":
            assert self.op.step is not None
            return _compare_step(self.op, self.op.step, draw(self.op, {**CHECKED, "T": 1}, HALF), DEVICE)
        return compare(self.op, draw(self.op, self.checked(), HALF), DEVICE)

    def checked(self) -> Shape:
        return CHECKED if "HV" in self.op.cases.bench_shapes[0] else {**CHECKED, "H": 2}

    def call(self) -> Call:
        sample = timing_sample(self.op, self.shape, HALF, DEVICE)
        given = sample.arguments
        if self.phase == "decode_graph":
            generator = torch.Generator(DEVICE).manual_seed(0)
            given = {**given, "initial_state": self.op.cases.initial_state(self.shape, generator).float()}
        function = _function(self.op, self.phase, self.shape, "heddle", HALF, DEVICE)
        assert function is not None
        return _call(function, given, self.op.cases.differentiable, sample.upstream[0], self.phase)


MISSES = (
    Miss(decay_attention, "fwd", WHOLE, {"output": OUTPUT}),
    Miss(simple_gla, "fwdbwd", WHOLE, {"backward": BACKWARD, "output": OUTPUT[:3]}),
    Miss(gated_delta_rule, "decode_graph", {"B": 32, "T": 1, **WIDE}, {"step": STEPS}),
    Miss(
        gated_delta_rule,
        "fwd",
        {**LONG, "H": 4},
        {"solve": SOLVE, "forward": FORWARD, "segment": SEGMENTS},
    ),
    Miss(gated_delta_rule, "fwd", WHOLE, {"solve": SOLVE, "forward": FORWARD}),
    Miss(
        gated_delta_rule,
        "fwdbwd",
        WHOLE,
        {"split": (1,), "gradient": GRADIENT, "keep": FORWARD[:4], "backward": FORWARD[:4]},
    ),
)


def every() -> list[tuple[Miss, dict[str, Launch | int]]]:
    return [(miss, overrides) for miss in MISSES for overrides in miss.overrides()]


def warm(index: int) -> None:
    """Runs every `WORKERS`th once, so that it is compiled."""
    for miss, overrides in every()[index::WORKERS]:
        try:
            with tuning(**overrides):
                miss.call()()
                miss.check()
        except Exception as error:
            print(f"{miss.op.name} {overrides}: {' '.join(str(error).split())[-200:]}", flush=True)


def kernel_times(call: Call) -> dict[str, float]:
    """Milliseconds of a call on the device, by the name of its kernels; what else runs is under `other`."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(CALLS):
            call()
        torch.cuda.synchronize()
    found: Counter[str] = Counter()
    for event in seen.events():
        # What launches a kernel is told its time as well.
        if event.device_type != DeviceType.CUDA:
            continue
        ours = event.name.startswith("_") and event.name.endswith("_kernel")
        found[event.name if ours else "other"] += event.device_time / 1e3 / CALLS
    return dict(found)


def measured(miss: Miss, call: Call) -> dict[str, Any]:
    if TINY:
        return {"ms": None, "kernels_ms": {}}
    if miss.phase == "decode_graph":
        return {**timed_in_graph(call), "kernels_ms": {}}
    # Of two, the quicker: a clock may not have been up yet.
    kernels = min((kernel_times(call) for _ in range(2)), key=lambda found: sum(found.values()))
    return {"ms": sum(kernels.values()), "kernels_ms": kernels}


def sweep(log: Log, report: Callable[[dict[str, Any]], None], late: Callable[[], bool]) -> None:
    for miss in MISSES[:3] if TINY else MISSES:
        call = None if TINY else miss.call()
        for overrides in miss.overrides():
            if late():
                log("out of time")
                return
            text = ", ".join(
                f"{name} {told(one) if isinstance(one, Launch) else one}" for name, one in overrides.items()
            )
            about = {"op": miss.op.name, "phase": miss.phase, "shape": dict(miss.shape)}
            try:
                with tuning(**overrides):
                    if not log.check(f"{miss.op.name} {text or 'as set'}", miss.check(), _path()):
                        continue
                    named = {"impl": ", ".join(filter(None, ("heddle", text))), "tried": text or "as set"}
                    report({**about, **named, **measured(miss, call or (lambda: None))})
            except Exception as error:
                log(f"none  {miss.op.name} {text}: {' '.join(str(error).split())[-200:]}")


def _path() -> str:
    return "torch" if TINY else "triton"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", type=float, default=200.0, help="seconds after which nothing is begun")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the log and the rows")
    parser.add_argument("--commit", help="the code that ran")
    parser.add_argument("--tiny", action="store_true", help="small, on a CPU")
    parser.add_argument("--warm", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.warm is not None:
        warm(chosen.warm)
        return 0
    begin = time.monotonic()
    chosen.out.mkdir(parents=True, exist_ok=True)
    log, header, lines = Log(chosen.out / "misses_check.log"), machine(DEVICE), []
    if not TINY:
        command = [sys.executable, __file__, "--warm"]
        workers = [subprocess.Popen([*command, str(index)]) for index in range(WORKERS)]
        for worker in workers:
            worker.wait()
        log(f"compiled in {time.monotonic() - begin:.0f} s")

    def report(row: dict[str, Any]) -> None:
        told_ms = " ".join(f"{name.strip('_')} {ms:.4f}" for name, ms in row["kernels_ms"].items())
        lines.append(f"{row['op']} {row['phase']} {row['tried']}: {row['ms'] or 0:.4f} ms  {told_ms}")
        with (chosen.out / "evidence-misses.jsonl").open("a") as file:
            more = {"commit": chosen.commit, "dtype": str(HALF).removeprefix("torch.")}
            file.write(json.dumps({**header, **more, **row}) + "\n")

    sweep(log, report, lambda: time.monotonic() - begin > chosen.budget)
    for line in (*lines, *log.wrong, f"{len(log.wrong)} wrong, {time.monotonic() - begin:.0f} s"):
        log(line)
    return 1 if log.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
