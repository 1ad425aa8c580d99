"""One call on a GPU machine: is kda right, how fast beside flash-linear-attention, and which launch configurations are best.

    python tests/bench/kda_check.py --budget 300 --out "$OUT"

Compiles side by side first, then checks dtypes, head sizes, lengths and hard gates against the float64 reference, times the
op forward, in both directions and for a token beside flash-linear-attention (where that is installed), and times each kernel
in each configuration that was found right, as the profiler tells it. Writes kda_check.log, rows as those of run.py to
kda.jsonl and rows of kernels to evidence-kda-kernels.jsonl; the short table comes last. Exits with 1 if anything was wrong.
The rest of the contract (decode step, bits, scratch memory) is `pytest tests/contracts/test_ops.py -m gpu -k kda`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from gpu_check import Log

from heddle.kernels import force_path, kda
from heddle.kernels._kda_launch import launch_backward, launch_forward
from heddle.kernels.accuracy import Measured, Sample, compare, draw
from heddle.kernels.bench import Row, bench_ops, table
from heddle.kernels.common.tuning import tuning
from heddle.kernels.configs.launch import Launch

DEVICE = torch.device("cuda")
WORKERS = 14
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SIZES = ((128, 128), (64, 64), (100, 72), (128, 256), (256, 256))
LENGTHS = (1, 63, 65, 600)
PACKED = [0, 5, 5, 133, 300]
HARD = {
    "strong": (0.0, -1e-6, -1e-3, -1.0, -20.0),
    "weak": (0.0, -1e-6, -1e-3, -0.1),
    "vanishing": (-1e-6, -1e4, -1e-2),
}
SWEEPS = (
    Launch(64, 64, 4, 1),
    Launch(64, 64, 4, 3),
    Launch(64, 64, 8, 2),
    Launch(64, 128, 8, 2),
    Launch(64, 32, 4, 2),
)
TRIED = {
    "prepare": (Launch(64, 64, 4, 1), Launch(64, 64, 4, 1, 168), Launch(64, 64, 8, 1, 128)),
    "forward": SWEEPS,
    "keep": SWEEPS,
    "backward": SWEEPS,
    # In one stage only: docs/decisions/0008-loops-in-a-row.md.
    "gradient": (
        Launch(64, 64, 4, 1), Launch(64, 32, 8, 1), Launch(64, 128, 8, 1), Launch(64, 64, 8, 1, 128), Launch(64, 32, 8, 1, 128),
    ),
}  # fmt: skip
# Sequences, tokens, and a factor of the log-decays: strong ones take the longer way through a chunk.
SHAPES = {"8x4096": (8, 4096, 1.0), "1x32768": (1, 32768, 1.0), "8x4096 strong": (8, 4096, 100.0)}
SEGMENTS = (1024, 2048, 4096, 8192)
Overrides = dict[str, Any]


def every_tuning() -> Iterator[Overrides]:
    """The overrides that are tried, in a fixed order."""
    yield {}
    yield from ({name: launch} for name, launches in TRIED.items() for launch in launches)


def hard(dtype: torch.dtype, choices: tuple[float, ...]) -> Sample:
    """Log-decays drawn from a few: strong ones beside weak ones, so that sums of them hide the weak."""
    sample = draw(kda, {"B": 1, "H": 1, "HV": 2, "K": 128, "V": 128, "T": 300}, dtype)
    log_decay = sample.arguments["log_decay"]
    picked = torch.randint(len(choices), log_decay.shape, generator=torch.Generator().manual_seed(1))
    drawn = torch.tensor(choices, dtype=log_decay.dtype)[picked]
    return replace(sample, arguments={**sample.arguments, "log_decay": drawn})


def every_sample() -> Iterator[tuple[str, Overrides, Sample]]:
    """What is compared with the reference by default configurations."""
    for dtype, (K, V) in itertools.product(DTYPES, SIZES):
        shape = {"B": 1, "H": 1, "HV": 2, "K": K, "V": V}
        name = f"{str(dtype).removeprefix('torch.')} K={K} V={V}"
        for T in LENGTHS if K == 128 == V else LENGTHS[-1:]:
            yield f"{name} T={T}", {}, draw(kda, {**shape, "T": T}, dtype)
        packed = draw(kda, {**shape, "T": PACKED[-1]}, dtype, cu_seqlens=PACKED)
        yield f"{name} packed", {"segment": 64}, packed
    for dtype, (name, choices) in itertools.product(DTYPES, HARD.items()):
        yield f"{dtype} {name}", {}, hard(dtype, choices)


def judged(overrides: Overrides, sample: Sample) -> list[Measured]:
    # Asked for: what has not passed here yet is not taken otherwise.
    with tuning(**overrides), force_path("triton"):
        return compare(kda, sample, DEVICE)


def tuned_sample() -> Sample:
    return draw(kda, {"B": 1, "H": 2, "K": 128, "V": 128, "T": 300}, torch.bfloat16)


def warm(index: int, *, sweeping: bool) -> None:
    """Compiles every `WORKERS`th thing that will run, into Triton's cache on disk; the slow ones come early."""
    things = [(overrides, sample) for _, overrides, sample in reversed(list(every_sample()))]
    things += [(overrides, tuned_sample()) for overrides in every_tuning()] if sweeping else []
    for overrides, sample in things[index::WORKERS]:
        try:
            judged(overrides, sample)
        except Exception as error:
            print(f"{overrides}: {' '.join(str(error).split())[-200:]}", flush=True)


class Timed:
    """Tensors of one shape as benchmarks draw them, and the launches over them."""

    def __init__(self, B: int, T: int, strength: float) -> None:
        shape = {"B": B, "T": T, "H": 16, "HV": 16, "K": 128, "V": 128}
        assert kda.cases.timed_inputs is not None
        drawn = kda.cases.timed_inputs(shape, torch.Generator(DEVICE).manual_seed(0))
        q, k, v = (drawn[name].to(torch.bfloat16) for name in "qkv")
        self.given = (q, k, v, drawn["log_decay"].float() * strength, drawn["beta"].float(), 1.0, None, None)
        self.d_out = torch.randn_like(v)

    def calls(self) -> dict[str, Callable[[], Any]]:
        return {
            "fwd": lambda: launch_forward(*self.given),
            "bwd": lambda: launch_backward(self.d_out, None, *self.given),
        }

    def kernels(self) -> dict[str, float]:
        """Milliseconds of each kernel of one call forward and one backward, by phase and name."""
        from torch.profiler import ProfilerActivity, profile

        found: dict[str, list[float]] = {}
        for phase, call in self.calls().items():
            call()
            with profile(activities=[ProfilerActivity.CUDA]) as seen:
                for _ in range(4):
                    call()
                torch.cuda.synchronize()
            for event in seen.events():
                if event.name.startswith(("_kda", "_gated_delta_rule_carry")):
                    found.setdefault(f"{phase} {event.name}", []).append(event.device_time / 1e3)
        # The runs of a call come in order; kernels that run several times in it are told apart by their place.
        times = {}
        for name, runs in found.items():
            each = len(runs) // 4
            for place in range(each):
                told = name.replace("_kda_", "").replace("_kernel", "")
                times[f"{told}{'' if each == 1 else f' {place}'}"] = sorted(runs[place::each])[1]
        return times


def made_by() -> dict[str, Any]:
    """Where and when a row is made; `commit` is for who commits it, since a machine with a copy has no history."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    return {"time": now, "commit": None, "device": torch.cuda.get_device_name(), **versions}


def sweep(log: Log, rows: Path, late: Callable[[], bool]) -> list[str]:
    """Checks and times every configuration; for each shape the times of all kernels."""
    lines: list[str] = []
    inputs = {name: Timed(*setting) for name, setting in SHAPES.items()}
    tried = [*every_tuning(), *({"segment": size} for size in SEGMENTS)]
    for overrides in tried:
        if late():
            return [*lines, "sweep: out of time"]
        text = ", ".join(f"{name} {launch}" for name, launch in overrides.items()) or "as set"
        try:
            if not log.check(f"bfloat16 {text}", judged(overrides, tuned_sample())):
                continue
            for shape, timed in inputs.items():
                with tuning(**overrides):
                    times = timed.kernels()
                lines.append(f"{shape} {text}: {'  '.join(f'{name} {ms:.4f}' for name, ms in times.items())}")
                log(lines[-1])
                row = {"op": "kda", "case": shape, "tried": text, "kernels_ms": times}
                with rows.open("a") as file:
                    file.write(json.dumps({**made_by(), **row}) + "\n")
        except Exception as error:
            log(f"none  {text}: {' '.join(str(error).split())[-200:]}")
    return lines


def rivals(log: Log, file: Path) -> None:
    """Rows of the op and of the rival, as run.py makes them but with the kernels asked for."""

    def report(row: Row) -> None:
        with file.open("a") as out:
            out.write(json.dumps({**row, "commit": None}) + "\n")

    with force_path("triton"):
        rows = bench_ops(["kda"], device=DEVICE, impls=("heddle", "fla"), report=report)
    for line in table(rows).splitlines():
        log(line)


def compiled(log: Log, begin: float, skipped: list[str]) -> None:
    """Compiles all that will run, in processes side by side."""
    command = [sys.executable, __file__, "--skip", *skipped, "--warm"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    start = partial(
        subprocess.Popen, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    workers = [start([*command, str(index)]) for index in range(WORKERS)]
    for index, worker in enumerate(workers):
        for line in worker.communicate()[0].splitlines()[-5:]:
            log(f"compile {index}: {line}")
    log(f"compiled in {time.monotonic() - begin:.0f} s")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--budget", type=float, default=300.0, help="seconds after which nothing new is begun"
    )
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the log")
    parser.add_argument("--skip", nargs="*", default=[], choices=["correctness", "rivals", "sweep"])
    parser.add_argument("--warm", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.warm is not None:
        warm(chosen.warm, sweeping="sweep" not in chosen.skip)
        return 0
    begin = time.monotonic()
    chosen.out.mkdir(parents=True, exist_ok=True)
    log = Log(chosen.out / "kda_check.log")
    compiled(log, begin, chosen.skip)
    if "correctness" not in chosen.skip:
        for name, overrides, sample in every_sample():
            try:
                log.check(name, judged(overrides, sample))
            except Exception as error:
                log.wrong.append(f"{name}: {' '.join(str(error).split())[-300:]}")
    log(f"checked after {time.monotonic() - begin:.0f} s")
    lines = []
    if "sweep" not in chosen.skip:
        late = lambda: time.monotonic() - begin > chosen.budget  # noqa: E731
        lines = sweep(log, chosen.out / "evidence-kda-kernels.jsonl", late)
    # Last: the rival may tune itself for minutes.
    if "rivals" not in chosen.skip:
        rivals(log, chosen.out / "kda.jsonl")
    for line in (*lines, *log.wrong, f"{len(log.wrong)} wrong, {time.monotonic() - begin:.0f} s"):
        log(line)
    return 1 if log.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
