"""One call on a GPU machine: is simple_gla right, which launch configurations are best, how fast is it beside its rival.

    python tests/bench/simple_gla_check.py --budget 200 --out "$OUT"

Compiles side by side first, then checks every dtype and shape against the float64 reference, checks and times every
launch configuration, and at last runs the benchmark with the best of them, Lightning attention too. Writes
simple_gla_check.log and rows.jsonl; the short table comes last.
Exits with 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_check import Log

from heddle.kernels import decay_attention, force_path, simple_gla
from heddle.kernels._simple_gla_bwd import launch_backward
from heddle.kernels._simple_gla_fwd import launch_forward
from heddle.kernels.accuracy import Measured, Sample, _measure, draw, oracle, results
from heddle.kernels.bench import Row, _call, _rival, bench_ops, table
from heddle.kernels.common.tuning import tuning
from heddle.kernels.configs.launch import Launch
from heddle.kernels.op import Phase

DEVICE = torch.device("cuda")
WORKERS = 13
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SIZES = ((128, 128), (64, 64), (100, 72), (256, 256))
LENGTHS = (1, 63, 65, 600)
PACKED = [0, 5, 5, 133, 300]
OUTPUT = (Launch(64, 64, 4, 3), Launch(64, 128, 8, 2), Launch(64, 64, 8, 2, 128))
BACKWARD = (
    Launch(64, 64, 4, 1), Launch(64, 64, 8, 2), Launch(64, 64, 8, 2, 128), Launch(64, 128, 8, 2), Launch(64, 128, 8, 1),
    Launch(64, 32, 4, 2), Launch(32, 64, 4, 2),
)  # fmt: skip
STATE = (Launch(64, 128, 4, 3), Launch(64, 64, 4, 3))
SEGMENTS = (1024, 2048, 4096, 8192, 16384)
SHAPES = {"8x4096": (8, 4096), "1x32768": (1, 32768), "1x131072": (1, 131072)}
FOLDER = Path(tempfile.gettempdir()) / "simple_gla_check"

Overrides = dict[str, Any]


def every_tuning() -> Iterator[Overrides]:
    """The overrides that are tried, in a fixed order."""
    yield {}
    yield {"segment": 256}
    yield from ({"output": launch} for launch in OUTPUT)
    yield from ({"backward": launch} for launch in BACKWARD)
    yield from ({"state": launch, "segment": 256} for launch in STATE)


def every_sample() -> dict[str, tuple[Overrides, Sample]]:
    """What is compared with the reference by default configurations."""
    found = {}
    for dtype, (K, V) in itertools.product(DTYPES, SIZES):
        shape = {"B": 1, "H": 1, "HV": 2, "K": K, "V": V}
        name = f"{str(dtype).removeprefix('torch.')} K={K} V={V}"
        for T in LENGTHS if K == 128 == V else LENGTHS[-1:]:
            found[f"{name} T={T}"] = ({}, draw(simple_gla, {**shape, "T": T}, dtype))
        if (K, V) not in SIZES[:2]:
            continue
        packed = draw(simple_gla, {**shape, "T": PACKED[-1]}, dtype, cu_seqlens=PACKED)
        found[f"{name} packed"] = ({"segment": 64}, packed)
    return found


TUNED = "bfloat16 K=128 V=128 T=600"


def judged(name: str, sample: Sample, overrides: Overrides) -> list[Measured]:
    """Every result beside its bound; the reference's lie in a file."""
    exact = torch.load(FOLDER / f"{name}.pt")
    there = sample.to(DEVICE)
    with tuning(**overrides):
        found = results(simple_gla, there)
    with force_path("torch"):
        baseline = results(simple_gla, there)
    return [
        _measure(each, "triton", found[each], baseline[each], exact[each], sample.dtype) for each in found
    ]


def rivals(
    shapes: list[str], phases: tuple[Phase, ...] = ("fwd", "fwdbwd")
) -> Iterator[tuple[str, str, str, Callable[[], object]]]:
    """(op, phase, shape, call) of flash-linear-attention."""
    for name, op, phase in itertools.product(shapes, (simple_gla, decay_attention), phases):
        B, T = SHAPES[name]
        function = _rival(op.name, phase)
        shape = {"B": B, "T": T, "H": 16, "HV": 16, "K": 128, "V": 128}
        if function is not None:
            sample = draw(op, shape, torch.bfloat16, initial_state=False, device=DEVICE)
            wanted = op.cases.differentiable
            yield op.name, phase, name, _call(function, sample.arguments, wanted, sample.upstream[0], phase)


def warm(index: int) -> None:
    """Does every `WORKERS`th thing that takes a processor: references, and compiling into Triton's cache on disk."""
    samples = every_sample()
    if index >= WORKERS:
        for number, (op, phase, shape, call) in enumerate(rivals(["8x4096"], ("fwdbwd",))):
            if number == index - WORKERS:
                call()
                torch.cuda.synchronize()
                print(f"rival {op} {phase} {shape}", flush=True)
        return
    for name, (_, sample) in list(samples.items())[index::WORKERS]:
        torch.save(oracle(simple_gla, sample), FOLDER / f"{name}.pt")
    things = [(overrides, samples[TUNED][1]) for overrides in every_tuning()]
    things += [given for name, given in samples.items() if name.endswith(("T=600", "packed"))]
    for overrides, sample in things[index::WORKERS]:
        try:
            with tuning(**overrides):
                results(simple_gla, sample.to(DEVICE))
        except Exception as error:
            print(f"{overrides}: {' '.join(str(error).split())[-300:]}", flush=True)


def sweep(log: Log, late: Callable[[], bool]) -> tuple[list[str], Overrides]:
    """Checks, then times every configuration; the best of each kind as lines, and those best over all shapes."""
    good, (_, sample) = [], every_sample()[TUNED]
    for overrides in every_tuning():
        try:
            if log.check(f"bfloat16 {overrides}", judged(TUNED, sample, overrides)):
                good.append(overrides)
        except Exception as error:
            log(f"none  {overrides}: {' '.join(str(error).split())[-300:]}")
    best: list[str] = []
    ratios: dict[str, dict[str, tuple[float, Overrides]]] = {"output": {}, "backward": {}}
    for name, (B, T) in SHAPES.items():
        for phase, kernel in (("fwd", "output"), ("bwd", "backward")):
            tried = [x for x in good if not x or kernel in x]
            # The first kernel only matters where there are segments.
            tried += [{"segment": size} for size in SEGMENTS if size < T]
            tried += [{"state": x["state"]} for x in good if "state" in x and B == 1]
            times = []
            for overrides in tried:
                if late():
                    return [*best, "sweep: out of time"], {}
                times.append((time_one(phase, B, T, overrides), overrides))
                log(f"      {name} {phase} {times[-1][0]:.4f} ms {overrides}")
            first = times[0][0]
            for ms, overrides in times:
                if not overrides or kernel in overrides:
                    before = ratios[kernel].get(str(overrides), (1.0, overrides))[0]
                    ratios[kernel][str(overrides)] = (before * ms / first, overrides)
            times.sort(key=lambda pair: pair[0])
            best += [
                f"{name} {phase}: {first:.4f} ms; " + "; ".join(f"{ms:.4f} ms {x}" for ms, x in times[:4])
            ]
    chosen = [min(found.values(), key=lambda pair: pair[0])[1] for found in ratios.values()]
    return best, {**chosen[0], **chosen[1]}


def time_one(phase: str, B: int, T: int, overrides: Overrides) -> float:
    from triton.testing import do_bench

    call = one_phase(phase, B, T)
    with tuning(**overrides):
        return float(do_bench(call, warmup=5, rep=20, quantiles=[0.5]))


def one_phase(phase: str, B: int, T: int) -> Callable[[], object]:
    shape = {"B": B, "T": T, "H": 16, "HV": 16, "K": 128, "V": 128}
    sample = draw(simple_gla, shape, torch.bfloat16, initial_state=False, device=DEVICE)
    q, k, v, log_decay = (sample.arguments[name] for name in ("q", "k", "v", "log_decay"))
    if phase == "fwd":
        return lambda: launch_forward(q, k, v, log_decay, 1.0, None, None)
    d_out = sample.upstream[0]
    return lambda: launch_backward(d_out, None, q, k, v, log_decay, 1.0, None, None)


def host(log: Log) -> None:
    """What a call costs the host, where the device has next to nothing to do; with segments and without."""
    for phase, overrides in itertools.product(("fwd", "bwd"), ({}, {"segment": 64})):
        call = one_phase(phase, 1, 128)
        with tuning(**overrides):
            call()
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(100):
                call()
            log(f"host {phase} {overrides}: {(time.perf_counter() - begin) * 1e4:.1f} us")
            torch.cuda.synchronize()


def kernels(log: Log) -> None:
    """The time of a call, and of each kernel as the profiler tells it."""
    from torch.profiler import ProfilerActivity, profile

    for (name, (B, T)), phase in itertools.product(SHAPES.items(), ("fwd", "bwd")):
        log(f"call {name} {phase}: {time_one(phase, B, T, {}):.4f} ms")
        call = one_phase(phase, B, T)
        call()
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            for _ in range(5):
                call()
            torch.cuda.synchronize()
        for event in sorted(seen.key_averages(), key=lambda event: -event.device_time_total)[:5]:
            log(f"kernel {name} {phase} {event.key[:40]}: {event.device_time_total / 5e3:.4f} ms")


def agree(log: Log) -> None:
    """How far flash-linear-attention's results are from ours, on what both are timed on; its gradients with its guard lifted."""
    shape = {"B": 8, "T": 4096, "H": 16, "HV": 16, "K": 128, "V": 128}
    sample = draw(simple_gla, shape, torch.bfloat16, device=DEVICE)
    if _rival("simple_gla", "fwdbwd") is None:
        return
    from fla.ops.simple_gla import chunk_simple_gla

    def theirs(log_decay: torch.Tensor, **rest: Any) -> Any:
        return chunk_simple_gla(**rest, g=log_decay, output_final_state=True)

    ours, found = results(simple_gla, sample), results(theirs, sample)
    for name, tensor in found.items():
        apart = (tensor.double() - ours[name].double()).norm() / ours[name].double().norm()
        log(f"fla and we, {name}: {float(apart):.2e} apart")


def rows(path: Path, overrides: Overrides, log: Log, late: Callable[[], bool]) -> None:
    """What the benchmark says of simple_gla with these overrides, and of Lightning attention, beside the rival's."""

    class OutOfTimeError(Exception):
        pass

    def report(row: Row) -> None:
        print(json.dumps(row), file=file, flush=True)
        log(table([row]))
        if late():
            raise OutOfTimeError

    with path.open("a") as file, contextlib.suppress(OutOfTimeError):
        for names, given in ((["simple_gla"], overrides), (["lightning", "lightning_linear"], {})):
            with tuning(**given):
                bench_ops(names, impls=("heddle", "torch", "fla"), report=report)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--budget", type=float, default=200.0, help="seconds after which nothing new is begun"
    )
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the log")
    parser.add_argument("--skip", nargs="*", default=[], choices=["correctness", "sweep", "rival"])
    parser.add_argument("--warm", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.warm is not None:
        warm(chosen.warm)
        return 0
    begin = time.monotonic()
    for folder in (chosen.out, FOLDER):
        folder.mkdir(parents=True, exist_ok=True)
    log = Log(chosen.out / "simple_gla_check.log")

    def late(share: float) -> Callable[[], bool]:
        return lambda: time.monotonic() - begin > share * chosen.budget

    command = [sys.executable, __file__, "--warm"]
    extra = 0 if "rival" in chosen.skip else 2
    wanted = 0 if {"correctness", "sweep"} <= set(chosen.skip) else WORKERS
    # A rival's choices of launches count only from a quiet device.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FLA_CACHE_RESULTS": "0"}
    workers = [
        subprocess.Popen(
            [*command, str(index)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in [*range(wanted), *range(WORKERS, WORKERS + extra)]
    ]
    for index, worker in enumerate(workers[:wanted]):
        for line in worker.communicate()[0].splitlines()[-5:]:
            log(f"compile {index}: {line}")
    log(f"compiled in {time.monotonic() - begin:.0f} s")
    if "correctness" not in chosen.skip:
        for name, (overrides, sample) in every_sample().items():
            try:
                log.check(name, judged(name, sample, overrides))
            except Exception as error:
                log.wrong.append(f"{name}: {error}")
                log(f"WRONG {log.wrong[-1]}")
    for worker in workers[wanted:]:
        # It compiles hundreds of kernels; what it has not done by now is done when it is timed.
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.wait(timeout=max(1.0, begin + 0.35 * chosen.budget - time.monotonic()))
        worker.kill()
    log(f"checked after {time.monotonic() - begin:.0f} s")
    best, overrides = ([], {}) if "sweep" in chosen.skip else sweep(log, late(0.65))
    log(f"swept after {time.monotonic() - begin:.0f} s")
    for measure in (host, kernels):
        try:
            measure(log)
        except Exception as error:
            log(f"{measure.__name__}: {' '.join(str(error).split())[-300:]}")
    if extra:
        agree(log)
        log(f"rows with {overrides}")
        rows(chosen.out / "rows.jsonl", overrides, log, late(1.0))
    for line in (*best, *log.wrong, f"{len(log.wrong)} wrong, {time.monotonic() - begin:.0f} s"):
        log(line)
    return 1 if log.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
