"""One call on a GPU machine: is kda right, how fast beside flash-linear-attention, and which launch configurations are best.

    python tests/bench/kda_check.py --budget 300 --out "$OUT"
    python tests/bench/kda_check.py --only split --budget 200 --out "$OUT" --commit "$(git rev-parse --short=12 HEAD)"
    TRITON_INTERPRET=1 python tests/bench/kda_check.py --only split --tiny --out /tmp/kda

Compiles side by side first, then checks dtypes, head sizes, lengths and hard gates against the float64 reference, times the
op forward, in both directions and for a token beside flash-linear-attention (where that is installed), and times each kernel
in each configuration that was found right, as the profiler tells it. `split` does so for the gradients by two kernels beside
those by one, and looks whether runs are equal to the bit; with `--tiny` it is only checked, on a CPU. Writes kda_check.log,
rows as those of run.py to kda.jsonl and rows of kernels to evidence-kda-kernels.jsonl; the short table comes last. Exits with
1 if anything was wrong.
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
PARTS = ("correctness", "sweep", "split", "rivals")
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
_PAIRS = Launch(64, 64, 4, 1)
# The first is what the others are compared with.
SPLIT: dict[str, Overrides] = {
    "one kernel": {"split": 0, "gradient": Launch(64, 64, 8, 1)},
    "64 columns, 4 warps": {"split": 1, "gradient": Launch(64, 64, 4, 1), "pairs": _PAIRS},
    "128 columns, 4 warps": {"split": 1, "gradient": Launch(64, 128, 4, 1), "pairs": _PAIRS},
    "64 columns, 8 warps": {"split": 1, "gradient": Launch(64, 64, 8, 1), "pairs": _PAIRS},
    "128 columns, 8 warps": {"split": 1, "gradient": Launch(64, 128, 8, 1), "pairs": _PAIRS},
    "64 columns, 8 warps, 128 registers": {
        "split": 1,
        "gradient": Launch(64, 64, 8, 1, 128),
        "pairs": _PAIRS,
    },
    "pairs 128 columns": {"split": 1, "gradient": Launch(64, 64, 4, 1), "pairs": Launch(64, 128, 4, 1)},
    "pairs 8 warps": {"split": 1, "gradient": Launch(64, 64, 4, 1), "pairs": Launch(64, 64, 8, 1)},
    "pairs 128 registers": {"split": 1, "gradient": Launch(64, 64, 4, 1), "pairs": Launch(64, 64, 4, 1, 128)},
}
# Times that two runs are compared to the bit, at lengths where a race was seen before.
REPEATED, REPEATED_LENGTHS = 9, (64, 150, 300)


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


def judged(overrides: Overrides, sample: Sample, device: torch.device = DEVICE) -> list[Measured]:
    # Asked for: what has not passed here yet is not taken otherwise.
    with tuning(**overrides), force_path("triton"):
        return compare(kda, sample, device)


def tuned_sample() -> Sample:
    return draw(kda, {"B": 1, "H": 2, "K": 128, "V": 128, "T": 300}, torch.bfloat16)


def split_samples(*, tiny: bool) -> Iterator[tuple[str, Overrides, Sample]]:
    """What the gradients by two kernels are compared with: each variant at 128, the launches of the table elsewhere."""
    if tiny:
        for dtype in (torch.float16, torch.float32):
            shape = {"B": 1, "H": 1, "HV": 2, "K": 32, "V": 48, "T": 150}
            yield f"{dtype} packed", {"split": 1}, draw(kda, shape, dtype, cu_seqlens=[0, 1, 1, 140, 150])
        return
    shape = {"B": 1, "H": 2, "HV": 4, "K": 128, "V": 128, "T": PACKED[-1]}
    for name, overrides in SPLIT.items():
        for dtype in (torch.bfloat16, torch.float16):
            yield f"{name}: {dtype}", overrides, draw(kda, shape, dtype)
            yield f"{name}: {dtype} strong", overrides, hard(dtype, HARD["strong"])
        packed = draw(kda, shape, torch.bfloat16, cu_seqlens=PACKED)
        yield f"{name}: packed", {**overrides, "segment": 64}, packed
    for name, overrides, sample in every_sample():
        yield f"table: {name}", {**overrides, "split": 1}, sample


def warm(index: int, parts: list[str]) -> None:
    """Compiles every `WORKERS`th thing that will run, into Triton's cache on disk; the slow ones come early."""
    things = []
    if "correctness" in parts:
        things += [(overrides, sample) for _, overrides, sample in reversed(list(every_sample()))]
    if "split" in parts:
        things += [(overrides, sample) for _, overrides, sample in reversed(list(split_samples(tiny=False)))]
    things += [(overrides, tuned_sample()) for overrides in every_tuning()] if "sweep" in parts else []
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

    def both(self) -> float:
        """Milliseconds of one call in both directions."""
        from triton.testing import do_bench

        forward, backward = self.calls().values()
        return float(do_bench(lambda: (forward(), backward()), warmup=20, rep=100, quantiles=[0.5]))

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


def made_by(commit: str | None = None) -> dict[str, Any]:
    """Where and when a row is made; without `commit` it is for who commits it: a machine with a copy has no history."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    return {"time": now, "commit": commit, "device": torch.cuda.get_device_name(), **versions}


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


def equal_runs(overrides: Overrides) -> int:
    """How many of the repeated backward passes differ from the first in any bit."""
    differ = 0
    for T in REPEATED_LENGTHS:
        timed = Timed(2, T, 1.0)
        with tuning(**overrides):
            first = launch_backward(timed.d_out, None, *timed.given)
            for _ in range(REPEATED):
                again = launch_backward(timed.d_out, None, *timed.given)
                differ += not all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    return differ


def split_times(overrides: Overrides, inputs: dict[str, Timed]) -> tuple[dict[str, Any], str]:
    """Milliseconds of each shape, of the kernels of gradients and of both directions; and the same as a line."""
    found, told = {}, []
    for shape, timed in inputs.items():
        with tuning(**overrides):
            times, both = timed.kernels(), timed.both()
        made = sum(
            ms for name, ms in times.items() if any(x in name for x in ("gradient", "pair", "near", "far"))
        )
        found[shape] = {"kernels_ms": times, "gradients_ms": made, "both_ms": both}
        told.append(f"{made:8.3f} {both:8.3f}")
    return found, "".join(f"{one:>20s}" for one in told)


def split(log: Log, rows: Path, commit: str | None, late: Callable[[], bool]) -> list[str]:
    """Checks the gradients by two kernels, then times each variant that is right; gives the table."""
    bad = set()
    for name, overrides, sample in split_samples(tiny=False):
        try:
            right = log.check(name, judged(overrides, sample))
        except Exception as error:
            log.wrong.append(f"{name}: {' '.join(str(error).split())[-300:]}")
            right = False
        bad |= set() if right else {name.split(":")[0]}
    inputs = {shape: Timed(*setting) for shape, setting in SHAPES.items()}
    header = "".join(f"{shape:>20s}" for shape in inputs)
    lines = [f"ms of the kernels of gradients, and of both directions\n{'':36s}{header}"]
    for name, overrides in SPLIT.items():
        if late() or name in bad:
            lines.append(f"{name:36s} {'out of time' if name not in bad else 'not right'}")
            continue
        differ = equal_runs(overrides)
        if differ:
            log.wrong.append(f"{name}: {differ} runs differ from the first")
        found, told = split_times(overrides, inputs)
        lines.append(f"{name:36s}{told}")
        log(lines[-1])
        for shape, times in found.items():
            row = {"op": "kda", "case": shape, "tried": f"split: {name}", "runs_that_differ": differ, **times}
            with rows.open("a") as file:
                file.write(json.dumps({**made_by(commit), **row}) + "\n")
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


def compiled(log: Log, begin: float, parts: list[str]) -> None:
    """Compiles all that will run, in processes side by side."""
    command = [sys.executable, __file__, "--only", *parts, "--warm"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    start = partial(
        subprocess.Popen, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    workers = [start([*command, str(index)]) for index in range(WORKERS)]
    for index, worker in enumerate(workers):
        for line in worker.communicate()[0].splitlines()[-5:]:
            log(f"compile {index}: {line}")
    log(f"compiled in {time.monotonic() - begin:.0f} s")


def correctness(log: Log, samples: Iterator[tuple[str, Overrides, Sample]], device: torch.device) -> None:
    for name, overrides, sample in samples:
        try:
            log.check(name, judged(overrides, sample, device))
        except Exception as error:
            log.wrong.append(f"{name}: {' '.join(str(error).split())[-300:]}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--budget", type=float, default=300.0, help="seconds after which nothing new is begun"
    )
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the log")
    parser.add_argument("--commit", help="what the code is")
    parser.add_argument("--only", nargs="*", default=PARTS, choices=PARTS, help="parts run")
    parser.add_argument("--skip", nargs="*", default=[], choices=PARTS)
    parser.add_argument("--tiny", action="store_true", help="only whether `split` is right, on a CPU")
    parser.add_argument("--warm", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    chosen = arguments()
    parts = [part for part in chosen.only if part not in chosen.skip]
    if chosen.warm is not None:
        warm(chosen.warm, parts)
        return 0
    begin = time.monotonic()
    chosen.out.mkdir(parents=True, exist_ok=True)
    log = Log(chosen.out / "kda_check.log")
    lines = []
    if chosen.tiny:
        correctness(log, split_samples(tiny=True), torch.device("cpu"))
    else:
        compiled(log, begin, parts)
        late = lambda: time.monotonic() - begin > chosen.budget  # noqa: E731
        rows = chosen.out / "evidence-kda-kernels.jsonl"
        if "correctness" in parts:
            correctness(log, every_sample(), DEVICE)
        log(f"checked after {time.monotonic() - begin:.0f} s")
        lines += sweep(log, rows, late) if "sweep" in parts else []
        lines += split(log, rows, chosen.commit, late) if "split" in parts else []
        # Last: the rival may tune itself for minutes.
        if "rivals" in parts:
            rivals(log, chosen.out / "kda.jsonl")
    for line in (*lines, *log.wrong, f"{len(log.wrong)} wrong, {time.monotonic() - begin:.0f} s"):
        log(line)
    return 1 if log.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
