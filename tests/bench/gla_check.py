"""One call on a GPU machine: is gla right, and which launch configuration of each of its kernels is the fastest.

    python tests/bench/gla_check.py --budget 200 --out "$OUT"

Compiles side by side first, then checks every dtype and shape against the float64 reference, and each launch
configuration too before it is timed, kernel by kernel, as the profiler tells it. Writes gla_check.log, and a row for each
configuration and case to evidence-gla-kernels.jsonl; the short table comes last. Exits with 1 if anything was wrong.
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
from pathlib import Path
from typing import Any

import torch
import triton
from gpu_check import Log

from heddle.kernels import gla
from heddle.kernels._gla_launch import launch_backward, launch_forward
from heddle.kernels.accuracy import Measured, Sample, compare, draw
from heddle.kernels.common.tuning import tuning
from heddle.kernels.configs.launch import Launch

DEVICE = torch.device("cuda")
WORKERS = 14
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SIZES = ((128, 128), (64, 64), (100, 72), (256, 256))
LENGTHS = (1, 63, 65, 600)
PACKED = [0, 5, 5, 133, 300]
TRIED = {
    "prepare": (
        Launch(64, 64, 4, 1), Launch(64, 64, 8, 1), Launch(64, 64, 4, 1, 168), Launch(64, 64, 4, 1, 128),
        Launch(64, 64, 8, 1, 128),
    ),
    "gradient": (
        Launch(64, 64, 8, 1), Launch(64, 32, 8, 1), Launch(64, 128, 8, 1), Launch(64, 64, 4, 1),
        Launch(64, 64, 4, 1, 168), Launch(64, 32, 4, 1, 168), Launch(64, 64, 8, 1, 128), Launch(64, 128, 8, 1, 128),
    ),
}  # fmt: skip
# Narrower tiles crash on an H200: docs/decisions/0005-ragged-heads.md tells of tiles below 64.
TILES = (128,)
# Sequences, tokens, and a factor of the log-decays: strong ones take the longer way through a chunk.
SHAPES = {"8x4096": (8, 4096, 1.0), "1x32768": (1, 32768, 1.0), "8x4096 strong": (8, 4096, 100.0)}
Overrides = dict[str, Any]


def every_tuning() -> Iterator[Overrides]:
    """The overrides that are tried, in a fixed order."""
    yield {}
    yield from ({name: launch} for name, launches in TRIED.items() for launch in launches)
    for tile, launches in itertools.product(TILES, zip(*TRIED.values(), strict=False)):
        yield {"tile": tile, **dict(zip(TRIED, launches, strict=True))}


def hard(dtype: torch.dtype, *choices: float) -> Sample:
    """Log-decays drawn from a few: strong ones beside weak ones, so that sums of them hide the weak."""
    sample = draw(gla, {"B": 1, "H": 1, "HV": 2, "K": 128, "V": 128, "T": 300}, dtype)
    log_decay = sample.arguments["log_decay"]
    picked = torch.randint(len(choices), log_decay.shape, generator=torch.Generator().manual_seed(1))
    return replace(
        sample,
        arguments={**sample.arguments, "log_decay": torch.tensor(choices, dtype=log_decay.dtype)[picked]},
    )


def every_sample() -> Iterator[tuple[str, Overrides, Sample]]:
    """What is compared with the reference by default configurations."""
    for dtype, (K, V) in itertools.product(DTYPES, SIZES):
        shape = {"B": 1, "H": 1, "HV": 2, "K": K, "V": V}
        name = f"{str(dtype).removeprefix('torch.')} K={K} V={V}"
        for T in LENGTHS if K == 128 == V else LENGTHS[-1:]:
            yield f"{name} T={T}", {}, draw(gla, {**shape, "T": T}, dtype)
        packed = draw(gla, {**shape, "T": PACKED[-1]}, dtype, cu_seqlens=PACKED)
        yield f"{name} packed", {"segment": 64}, packed
    for dtype in DTYPES:
        yield f"{dtype} hard", {}, hard(dtype, 0.0, -1e-6, -1e-3, -1.0, -20.0)
        yield f"{dtype} weak", {}, hard(dtype, 0.0, -1e-6, -1e-3, -0.1)


def judged(overrides: Overrides, sample: Sample) -> list[Measured]:
    with tuning(**overrides):
        return compare(gla, sample, DEVICE)


def tuned_sample() -> Sample:
    return draw(gla, {"B": 1, "H": 2, "K": 128, "V": 128, "T": 300}, torch.bfloat16)


def warm(index: int) -> None:
    """Compiles every `WORKERS`th thing that will run, into Triton's cache on disk."""
    things = [(overrides, tuned_sample()) for overrides in every_tuning()]
    things += [(overrides, sample) for _, overrides, sample in every_sample()]
    for overrides, sample in things[index::WORKERS]:
        try:
            judged(overrides, sample)
        except Exception as error:
            print(f"{overrides}: {' '.join(str(error).split())[-200:]}", flush=True)


def draw_timed(shape: dict[str, int]) -> dict[str, torch.Tensor]:
    """The inputs that benchmarks use."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    assert gla.cases.timed_inputs is not None
    drawn = gla.cases.timed_inputs(shape, generator)
    return {
        name: x.to(torch.bfloat16 if name in gla.cases.rounded else torch.float32)
        for name, x in drawn.items()
    }


def kernel_times(B: int, T: int, strength: float) -> dict[str, float]:
    """Milliseconds of each kernel of one call forward and one backward, by phase and name."""
    from torch.profiler import ProfilerActivity, profile

    shape = {"B": B, "T": T, "H": 16, "HV": 16, "K": 128, "V": 128}
    sample = draw(gla, shape, torch.bfloat16, initial_state=False, device=DEVICE)
    sample.arguments.update(draw_timed(shape))
    q, k, v, log_decay = (sample.arguments[name] for name in ("q", "k", "v", "log_decay"))
    log_decay = log_decay * strength
    kept = launch_forward(q, k, v, log_decay, 1.0, None, None)[2:]
    calls = {
        "fwd": lambda: launch_forward(q, k, v, log_decay, 1.0, None, None),
        "bwd": lambda: launch_backward(sample.upstream[0], None, q, k, v, log_decay, 1.0, None, None, *kept),
    }
    found = {}
    for phase, call in calls.items():
        call()
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            for _ in range(4):
                call()
            torch.cuda.synchronize()
        for event in seen.events():
            if event.name.startswith("_gla"):
                runs = found.setdefault(f"{phase} {event.name}", [])
                runs.append(event.device_time / 1e3)
    # The runs of a call come in order; kernels that run several times in it are told apart by their place.
    times = {}
    for name, runs in found.items():
        each = len(runs) // 4
        for place in range(each):
            times[f"{name}{'' if each == 1 else f' {place}'}"] = sorted(runs[place::each])[1]
    return times


def made_by() -> dict[str, Any]:
    """Where and when a row is made; `commit` is for who commits it, since a machine with a copy has no history."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    return {"time": now, "commit": None, "device": torch.cuda.get_device_name(), **versions}


def sweep(log: Log, rows: Path, late: Callable[[], bool]) -> list[str]:
    """Checks and times every configuration; for each shape the times of all kernels as they are set now, and the best."""
    lines: list[str] = []
    for overrides in every_tuning():
        if late():
            return [*lines, "sweep: out of time"]
        text = ", ".join(f"{name} {launch}" for name, launch in overrides.items()) or "as set"
        try:
            if not log.check(f"bfloat16 {text}", judged(overrides, tuned_sample())):
                continue
            with tuning(**overrides):
                for shape, setting in SHAPES.items():
                    found = kernel_times(*setting)
                    times = {
                        name.replace("_gla_", "").replace("_kernel", ""): ms for name, ms in found.items()
                    }
                    lines.append(
                        f"{shape} {text}: {'  '.join(f'{name} {ms:.4f}' for name, ms in times.items())}"
                    )
                    log(lines[-1])
                    row = {"op": "gla", "case": shape, "tried": text, "kernels_ms": times}
                    with rows.open("a") as file:
                        file.write(json.dumps({**made_by(), **row}) + "\n")
        except Exception as error:
            log(f"none  {text}: {' '.join(str(error).split())[-200:]}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--budget", type=float, default=200.0, help="seconds after which nothing new is begun"
    )
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the log")
    parser.add_argument("--skip", nargs="*", default=[], choices=["correctness", "sweep"])
    parser.add_argument("--warm", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.warm is not None:
        warm(chosen.warm)
        return 0
    begin = time.monotonic()
    chosen.out.mkdir(parents=True, exist_ok=True)
    log = Log(chosen.out / "gla_check.log")
    command = [sys.executable, __file__, "--warm"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [*command, str(index)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(WORKERS)
    ]
    for index, worker in enumerate(workers):
        for line in worker.communicate()[0].splitlines()[-5:]:
            log(f"compile {index}: {line}")
    log(f"compiled in {time.monotonic() - begin:.0f} s")
    if "correctness" not in chosen.skip:
        for name, overrides, sample in every_sample():
            try:
                log.check(name, judged(overrides, sample))
            except Exception as error:
                log.wrong.append(f"{name}: {' '.join(str(error).split())[-300:]}")
    log(f"checked after {time.monotonic() - begin:.0f} s")
    rows = chosen.out / "evidence-gla-kernels.jsonl"
    lines = []
    if "sweep" not in chosen.skip:
        lines = sweep(log, rows, lambda: time.monotonic() - begin > chosen.budget)
    for line in (*lines, *log.wrong, f"{len(log.wrong)} wrong, {time.monotonic() - begin:.0f} s"):
        log(line)
    return 1 if log.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
