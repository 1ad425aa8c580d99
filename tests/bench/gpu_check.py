"""One call on a GPU machine: is decay_attention right, which launch configurations are best, how fast are the ops.

    python tests/bench/gpu_check.py --budget 230 --out "$OUT"

Compiles side by side first, then checks every dtype and shape against the float64 reference, checks and times every
launch configuration, and at last runs the benchmark. Writes gpu_check.log and rows.jsonl; the short table comes last.
Exits with 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from heddle.kernels import decay_attention
from heddle.kernels._decay_attention_bwd import launch_backward
from heddle.kernels._decay_attention_fwd import launch_forward
from heddle.kernels.accuracy import Measured, compare, draw
from heddle.kernels.bench import bench_ops, table
from heddle.kernels.common.tuning import tuning
from heddle.kernels.configs.launch import Launch

DEVICE = torch.device("cuda")
WORKERS = 8
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SIZES = ((128, 128), (64, 64), (128, 64), (100, 72), (256, 256))
LENGTHS = (1, 63, 65, 1000)
OUTPUT = (
    Launch(64, 64, 4, 2), Launch(64, 64, 4, 3), Launch(64, 64, 4, 1), Launch(64, 128, 8, 2), Launch(64, 128, 8, 3),
    Launch(128, 128, 8, 2), Launch(64, 64, 8, 2), Launch(64, 64, 8, 2, 128), Launch(32, 64, 4, 3), Launch(64, 32, 4, 2),
    Launch(128, 64, 8, 2), Launch(64, 128, 4, 2),
)  # fmt: skip
STATE = (
    Launch(64, 128, 8, 3), Launch(64, 128, 4, 3), Launch(64, 64, 4, 3), Launch(128, 128, 8, 2), Launch(64, 64, 4, 4),
)  # fmt: skip
SEGMENTS = (512, 1024, 2048, 4096, 8192)
SHAPES = {"B=8 T=4096": (8, 4096), "B=1 T=4096": (1, 4096), "B=1 T=65536": (1, 65536)}
CHECKED = {"B": 1, "H": 2, "K": 128, "V": 128, "T": 600}


class Log:
    """Prints and writes lines, and remembers what went wrong."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("w")
        self.wrong: list[str] = []

    def __call__(self, line: str) -> None:
        print(line, flush=True)
        self.file.write(line + "\n")
        self.file.flush()

    def check(self, what: str, measured: list[Measured], path: str = "triton") -> bool:
        bad = [str(one) for one in measured if not one.ok or one.path != path]
        worst = max(measured, key=lambda one: one.error / one.bound)
        self(f"{'ok   ' if not bad else 'WRONG'} {what}: worst {worst}")
        self.wrong += [f"{what}: {line}" for line in bad]
        return not bad


def every_tuning() -> Iterator[dict[str, Any]]:
    """The overrides that are tried, in a fixed order."""
    yield {}
    yield {"segment": 256}
    yield from ({"output": launch} for launch in OUTPUT)
    yield from ({"state": launch, "segment": 256} for launch in STATE)


def one_call(overrides: dict[str, Any], dtype: torch.dtype, K: int, V: int, T: int = 600) -> list[Measured]:
    with tuning(**overrides):
        return compare(
            decay_attention, draw(decay_attention, {**CHECKED, "K": K, "V": V, "T": T}, dtype), DEVICE
        )


def warm(index: int) -> None:
    """Compiles every `WORKERS`th thing that will run, into Triton's cache on disk."""
    things = [(overrides, torch.bfloat16, 128, 128) for overrides in every_tuning()]
    things += [({}, dtype, K, V) for dtype, (K, V) in itertools.product(DTYPES, SIZES)]
    for thing in things[index::WORKERS]:
        try:
            one_call(*thing, T=300)
        except Exception as error:
            print(f"{thing}: {str(error).splitlines()[0]}", flush=True)


def correctness(log: Log, late: Callable[[], bool]) -> None:
    # The widest first: if time is short, a long list of the same is the least loss.
    for dtype, (K, V) in itertools.product(DTYPES, SIZES):
        for T in LENGTHS if K == 128 == V else LENGTHS[-1:]:
            if late():
                log("correctness: out of time")
                return
            log.check(f"{dtype} K={K} V={V} T={T}", one_call({}, dtype, K, V, T))
        shape = {**CHECKED, "K": K, "V": V, "T": 300}
        packed = draw(decay_attention, shape, dtype, cu_seqlens=[0, 5, 5, 133, 300])
        with tuning(segment=64):
            log.check(f"{dtype} K={K} V={V} packed, segments", compare(decay_attention, packed, DEVICE))


def sweep(log: Log, late: Callable[[], bool]) -> list[str]:
    """Checks, then times every configuration; the best of each kind as lines."""
    good = []
    for overrides in every_tuning():
        try:
            if log.check(f"bfloat16 {overrides}", one_call(overrides, torch.bfloat16, 128, 128)):
                good.append(overrides)
        except Exception as error:
            log(f"none  {overrides}: {str(error).splitlines()[0]}")
        if late():
            return ["sweep: out of time"]
    best = []
    for name, (B, T) in SHAPES.items():
        segments = [{"segment": size} for size in SEGMENTS if size < T and B == 1]
        tried = [x for x in good if "state" not in x and "segment" not in x] + segments
        # The first kernel only matters where there are segments.
        tried += [{"state": x["state"]} for x in good if "state" in x] if B == 1 else []
        for phase in ("fwd", "bwd"):
            times = []
            for overrides in tried:
                if late():
                    return [*best, "sweep: out of time"]
                times.append((time_one(phase, B, T, overrides), overrides))
                log(f"      {name} {phase} {times[-1][0]:.4f} ms {overrides}")
            times.sort(key=lambda pair: pair[0])
            best += [f"{name} {phase}: " + "; ".join(f"{ms:.4f} ms {x}" for ms, x in times[:4])]
    return best


def time_one(phase: str, B: int, T: int, overrides: dict[str, Any]) -> float:
    from triton.testing import do_bench

    q, k, v, d_out = (torch.randn(B, T, 16, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(4))
    log_decay = -torch.exp2(-0.5 * torch.arange(1, 17, device=DEVICE))
    with tuning(**overrides):
        if phase == "fwd":
            call = lambda: launch_forward(q, k, v, log_decay, 1.0, None, None)  # noqa: E731
        else:
            call = lambda: launch_backward(d_out, None, q, k, v, log_decay, 1.0, None, None)  # noqa: E731
        return float(do_bench(call, warmup=5, rep=25, quantiles=[0.5]))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--budget", type=float, default=230.0, help="seconds after which nothing new is begun"
    )
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the log and the rows")
    parser.add_argument("--skip", nargs="*", default=[], choices=["correctness", "sweep", "bench"])
    parser.add_argument("--warm", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.warm is not None:
        warm(chosen.warm)
        return 0
    begin = time.monotonic()
    chosen.out.mkdir(parents=True, exist_ok=True)
    log = Log(chosen.out / "gpu_check.log")

    def late(share: float) -> Callable[[], bool]:
        return lambda: time.monotonic() - begin > share * chosen.budget

    command = [sys.executable, __file__, "--warm"]
    workers = [
        subprocess.Popen([*command, str(index)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for index in range(WORKERS)
    ]
    for worker in workers:
        for line in worker.communicate()[0].splitlines()[-5:]:
            log(f"compile: {line}")
    log(f"compiled in {time.monotonic() - begin:.0f} s")
    if "correctness" not in chosen.skip:
        correctness(log, late(0.45))
    log(f"checked after {time.monotonic() - begin:.0f} s")
    best = [] if "sweep" in chosen.skip else sweep(log, late(0.75))
    log(f"swept after {time.monotonic() - begin:.0f} s")
    if "bench" not in chosen.skip:
        with (chosen.out / "rows.jsonl").open("a") as file:
            rows = bench_ops(
                ["decay_attention"], report=lambda row: print(json.dumps(row), file=file, flush=True)
            )
        log(table(rows))
    for line in (*best, *log.wrong, f"{len(log.wrong)} wrong, {time.monotonic() - begin:.0f} s"):
        log(line)
    return 1 if log.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
