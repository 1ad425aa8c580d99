"""One call on a GPU machine: is simple_gla right, which launch configurations are best, how fast is it beside its rival.

    python tests/bench/simple_gla_check.py --budget 200 --out "$OUT"
    python tests/bench/simple_gla_check.py --only gate --budget 100 --out "$OUT" --commit "$(git rev-parse --short=12 HEAD)"
    TRITON_INTERPRET=1 python tests/bench/simple_gla_check.py --only gate --tiny --out /tmp/simple_gla

Compiles side by side first, then checks every dtype and shape against the float64 reference, checks and times every
launch configuration, and at last runs the benchmark with the best of them, Lightning attention too. Writes
simple_gla_check.log and rows.jsonl; the short table comes last. `gate` holds the backward roles that are launched apart to the
reference and to themselves, side by side, and times them beside those of one launch; with `--tiny` a few are checked, on a CPU.
It writes evidence-simple-gla-kernels.jsonl.
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
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from gpu_check import Log

from heddle.kernels import decay_attention, force_path, simple_gla
from heddle.kernels._simple_gla_bwd import launch_backward
from heddle.kernels._simple_gla_fwd import launch_forward
from heddle.kernels.accuracy import Measured, Sample, _measure, compare, draw, oracle, results
from heddle.kernels.bench import Row, _call, _rival, bench_ops, table
from heddle.kernels.common.tuning import tuning
from heddle.kernels.configs.launch import Launch
from heddle.kernels.op import INTERPRETED, Phase

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


ONE: Overrides = {"apart": 0}
APART: Overrides = {"apart": 1}
# The first is what the others are compared with.
ROLES: dict[str, Overrides] = {
    "one launch": ONE,
    "apart": APART,
    "apart, 1 stage": {**APART, "backward": Launch(64, 64, 4, 1)},
    "apart, 3 stages": {**APART, "backward": Launch(64, 64, 4, 3)},
    "apart, 32 columns": {**APART, "backward": Launch(64, 32, 4, 2)},
    "apart, 128 columns, 8 warps": {**APART, "backward": Launch(64, 128, 8, 2)},
    "apart, chunks of 128, 8 warps": {**APART, "backward": Launch(128, 64, 8, 1)},
    "apart, chunks of 32": {**APART, "backward": Launch(32, 64, 4, 2)},
}
HALF = (torch.bfloat16, torch.float16)
HARD = {
    "mixed": (0.0, -1e-6, -1e-3, -1.0, -20.0),
    "weak": (-1e-6,),
    "strong": (*(-20.0,) * 7, -1e-3),
    "no weak": (-5.0, -20.0),
    "equal strong": (-20.0,),
}
PAIR = {"B": 1, "H": 1, "HV": 2}
# One process for each group of what is held.
GATE_WORKERS = 20
# Times that two runs are compared to the bit.
REPEATED = 5
TINY = ((16, 16), (40, 24))


def hard(sample: Sample, choices: tuple[float, ...]) -> Sample:
    """The same with log-decays drawn from a few."""
    log_decay = sample.arguments["log_decay"]
    picked = torch.randint(len(choices), log_decay.shape, generator=torch.Generator().manual_seed(1))
    changed = torch.tensor(choices, dtype=log_decay.dtype)[picked]
    return replace(sample, arguments={**sample.arguments, "log_decay": changed})


def sized(dtype: torch.dtype, K: int, V: int) -> Iterator[tuple[str, Overrides, Callable[[], Sample]]]:
    """What roles launched apart are held to at one dtype and size: dense, packed, with hard gates, in segments and not."""
    name, shape = f"{str(dtype).removeprefix('torch.')} K={K} V={V}", {**PAIR, "K": K, "V": V}
    make = partial(draw, simple_gla, dtype=dtype)
    for T in (1, 63, 65, 300, 1000) if K == 128 else (150,) if K < 64 else (65, 300):
        yield f"{name} T={T}", APART, partial(make, {**shape, "T": T})
    packed = partial(make, {**shape, "T": PACKED[-1]}, cu_seqlens=PACKED)
    yield f"{name} packed", {**APART, "segment": 64}, packed
    if K not in (16, 128):
        return
    for kind, choices in HARD.items():
        # The launcher never makes longer segments in float32.
        for segment in (64, 512) if dtype in HALF else (64,):
            yield (
                f"{name} {kind} decays, segments of {segment}",
                {**APART, "segment": segment},
                lambda choices=choices: hard(make({**shape, "T": 300}), choices),
            )
    if K == 128 and dtype in HALF:
        yield f"{name} T=3000 whole", {**APART, "segment": 3008}, partial(make, {**shape, "HV": 1, "T": 3000})


def held(name: str, overrides: Overrides, make: Callable[[], Sample], device: torch.device) -> dict[str, Any]:
    """Whether all results are within bounds, and the same to the bit each time; the worst of them."""
    sample, path = make(), "triton" if device.type == "cuda" or INTERPRETED else "torch"
    with tuning(**overrides), force_path(path):
        measured = compare(simple_gla, sample, device)
        there = sample.to(device)
        first, differ = results(simple_gla, there), 0
        for _ in range(REPEATED if device.type == "cuda" else 1):
            again = results(simple_gla, there)
            differ += not all(torch.equal(again[each], first[each]) for each in first)
    worst = max(measured, key=lambda one: one.error / one.bound)
    wrong = [str(one) for one in measured if not one.ok or one.path != path]
    wrong += [f"{differ} runs differ from the first"] if differ else []
    share = worst.error / worst.bound
    return {"case": name, "held": not wrong, "wrong": wrong, "worst": worst.name, "share": share}


def gate_groups() -> Iterator[list[tuple[str, Overrides, Callable[[], Sample]]]]:
    """All that is held, what shares kernels together."""
    for (K, V), dtype in itertools.product(SIZES, DTYPES):
        yield list(sized(dtype, K, V))
    timed = partial(draw, simple_gla, {**PAIR, "K": 128, "V": 128, "T": 300}, torch.bfloat16)
    for name, tried in ROLES.items():
        yield [(f"variant {name}", tried, timed)]


def gate_share(index: int) -> None:
    """A share of the checks of `gate`; each line tells one."""
    for case in itertools.chain(*itertools.islice(gate_groups(), index, None, GATE_WORKERS)):
        try:
            found = held(*case, DEVICE)
        except Exception as error:
            found = {"case": case[0], "held": False, "wrong": [" ".join(str(error).split())[-300:]]}
        print("held " + json.dumps(found), flush=True)
    # What is timed has other strides and flags.
    for name, tried in list(ROLES.items())[index::GATE_WORKERS]:
        with contextlib.suppress(Exception), tuning(**tried):
            for B, T in ((8, 128), (1, 1024)):
                one_phase("bwd", B, T)()
                one_phase("fwd", B, T)()
            torch.cuda.synchronize()
            print(f"compiled {name}", flush=True)


def gate_held(log: Log, *, tiny: bool) -> Iterator[dict[str, Any]]:
    """What was found of each case; logged too."""
    if tiny:
        lines = []
        for K, V in TINY:
            for case in itertools.chain(sized(torch.float16, K, V), sized(torch.float32, K, V)):
                lines.append("held " + json.dumps(held(*case, torch.device("cpu"))))
    else:
        command = [sys.executable, __file__, "--only", "gate", "--warm"]
        start = partial(
            subprocess.Popen,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        workers = [start([*command, str(index)]) for index in range(GATE_WORKERS)]
        lines = [line for worker in workers for line in worker.communicate()[0].splitlines()[-80:]]
        log.wrong += [f"a worker ended with {worker.returncode}" for worker in workers if worker.returncode]
    for line in lines:
        if not line.startswith("held "):
            log(line[:300])
            continue
        found = json.loads(line.removeprefix("held "))
        told = f"worst {found.get('worst')} at {found.get('share', 0.0):.2f} of its bound"
        log(f"{'ok   ' if found['held'] else 'WRONG'} {found['case']}: {told}")
        log.wrong += [f"{found['case']}: {one}" for one in found["wrong"]]
        yield found


def gate_times(name: str, tried: Overrides) -> dict[str, Any]:
    """Milliseconds of the kernels of a backward pass, and of both directions."""
    from torch.profiler import ProfilerActivity, profile
    from triton.testing import do_bench

    B, T = SHAPES[name]
    with tuning(**tried):
        forward, backward = one_phase("fwd", B, T), one_phase("bwd", B, T)
        both = float(do_bench(lambda: (forward(), backward()), warmup=10, rep=60, quantiles=[0.5]))
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            for _ in range(5):
                backward()
            torch.cuda.synchronize()
    times = {event.key: event.device_time_total / 5e3 for event in seen.key_averages()}
    kernels = {key: ms for key, ms in times.items() if key.startswith("_simple_gla")}
    return {"kernels_ms": kernels, "backward_ms": sum(kernels.values()), "both_ms": both}


def gate(log: Log, rows: Path, chosen: argparse.Namespace, late: Callable[[], bool]) -> list[str]:
    """Holds roles launched apart, then times each launch that was found right; gives the table."""
    header = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "commit": chosen.commit,
              "device": "cpu" if chosen.tiny else torch.cuda.get_device_name(),
              "torch": torch.__version__, "triton": triton.__version__, "op": "simple_gla"}  # fmt: skip

    def write(row: dict[str, Any]) -> None:
        with rows.open("a") as file:
            file.write(json.dumps({**header, **row}) + "\n")

    right = set()
    for found in gate_held(log, tiny=chosen.tiny):
        write(found)
        right |= {found["case"]} if found["held"] else set()
    if chosen.tiny:
        return []
    lines = {name: f"{name:32s}" for name in ROLES}
    for shape in ("8x4096", "1x32768"):
        for name, tried in ROLES.items():
            if late():
                return [*lines.values(), "gate: out of time"]
            if f"variant {name}" not in right:
                lines[name] += f"{'not right':>22s}"
                continue
            try:
                found = gate_times(shape, tried)
            except Exception as error:
                log(f"none  {shape} {name}: {' '.join(str(error).split())[-200:]}")
                continue
            told = "  ".join(f"{kernel[12:-7]} {ms:.3f}" for kernel, ms in found["kernels_ms"].items())
            log(f"{shape} {name}: {told}; both {found['both_ms']:.3f}")
            lines[name] += f"{found['backward_ms']:12.3f}{found['both_ms']:10.3f}"
            write({"case": shape, "tried": name, **found})
    return [
        f"ms of backward kernels, and of both directions\n{'':32s}{'8x4096':>22s}{'1x32768':>22s}",
        *lines.values(),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--budget", type=float, default=200.0, help="seconds after which nothing new is begun"
    )
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the log")
    parser.add_argument("--skip", nargs="*", default=[], choices=["correctness", "sweep", "rival"])
    parser.add_argument("--only", choices=["gate"], help="this part and no other")
    parser.add_argument("--commit", help="what the code is, for the rows of `gate`")
    parser.add_argument("--tiny", action="store_true", help="only whether `gate` is right, on a CPU")
    parser.add_argument("--warm", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.warm is not None:
        torch.set_num_threads(1)
        (gate_share if chosen.only == "gate" else warm)(chosen.warm)
        return 0
    begin = time.monotonic()
    for folder in (chosen.out, FOLDER):
        folder.mkdir(parents=True, exist_ok=True)
    log = Log(chosen.out / "simple_gla_check.log")

    def late(share: float) -> Callable[[], bool]:
        return lambda: time.monotonic() - begin > share * chosen.budget

    if chosen.only == "gate":
        lines = gate(log, chosen.out / "evidence-simple-gla-kernels.jsonl", chosen, late(1.0))
        for line in (*lines, *log.wrong, f"{len(log.wrong)} wrong, {time.monotonic() - begin:.0f} s"):
            log(line)
        return 1 if log.wrong else 0
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
