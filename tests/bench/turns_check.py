"""One call on a GPU machine: variants of kernels behind goals that are missed by little, held to the reference, timed in turns.

    python tests/bench/turns_check.py --only simple_gla --out "$OUT" --commit "$(git rev-parse --short=12 HEAD)"
    python tests/bench/turns_check.py --only gated_delta_rule --out "$OUT" --commit "$(git rev-parse --short=12 HEAD)"
    TRITON_INTERPRET=1 python tests/bench/turns_check.py --tiny --out /tmp/turns

Holds each variant to the float64 reference side by side, in bfloat16 and float16. Those that are right are captured in CUDA
graphs of one call each, which are replayed in turns in one process, with a cold L2 cache: a clock that changes changes it for
all. Each is also compared with what is set, on what is timed, and its kernels are timed by the profiler. Writes turns_check.log
and rows to evidence-turns.jsonl; the short table comes last. Exits with 1 if anything was wrong. `--tiny`: only whether they are
right, on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gated_delta_check
import simple_gla_check
import torch
from gpu_check import Log
from misses_check import kernel_times

from heddle.kernels import Op, force_path, gated_delta_rule, simple_gla
from heddle.kernels.accuracy import Measured, Sample, _measure, compare, draw, oracle, results
from heddle.kernels.bench import Call, _call, machine, timing_sample
from heddle.kernels.common.tuning import tuning
from heddle.kernels.configs.launch import Launch
from heddle.kernels.op import Phase, Shape

WORKERS, ROUNDS = 14, 41
# As much as no L2 cache holds.
FLUSHED = 1 << 28
WIDE = {"H": 16, "HV": 16, "K": 128, "V": 128}
WHOLE, LONG, LONGEST = ({"B": B, "T": T, **WIDE} for B, T in ((8, 4096), (1, 32768), (1, 131072)))
GROUPED = {**LONG, "H": 4}
AS_SET = "as set"
Overrides = dict[str, Any]


@dataclass(frozen=True)
class Goal:
    """An op, its variants by name, what they are held to, and what is timed: phases, shapes and which variants (None: all)."""

    op: Op[..., Any]
    variants: dict[str, Overrides]
    samples: Callable[[torch.dtype], Iterator[tuple[Overrides, Sample]]]
    timed: tuple[tuple[Phase, Shape, tuple[str, ...] | None], ...]


def simple_samples(dtype: torch.dtype) -> Iterator[tuple[Overrides, Sample]]:
    size, T = (40, 200) if "--tiny" in sys.argv else (128, 300)
    shape = {"B": 1, "H": 1, "HV": 2, "K": size, "V": size, "T": T}
    whole = draw(simple_gla, shape, dtype)
    yield {}, whole
    yield {"segment": 64}, draw(simple_gla, shape, dtype, cu_seqlens=[0, 5, 5, 133, T])
    for kind in ("mixed", "strong", "equal strong"):
        yield {"segment": 128}, simple_gla_check.hard(whole, simple_gla_check.HARD[kind])


def gated_samples(dtype: torch.dtype) -> Iterator[tuple[Overrides, Sample]]:
    size, T = (40, 200) if "--tiny" in sys.argv else (128, 300)
    shape = {"B": 1, "H": 2, "HV": 4, "K": size, "V": size, "T": T}
    yield {}, draw(gated_delta_rule, shape, dtype)
    yield {"segment": 64}, draw(gated_delta_rule, shape, dtype, cu_seqlens=[0, 5, 5, 70, T])
    if size == 128:
        yield from (({}, gated_delta_check.hard(dtype, kind)) for kind in gated_delta_check.HARD.values())


GOALS = {
    "simple_gla": Goal(
        simple_gla,
        {AS_SET: {}, "not ahead": {"ahead": 0}, "one launch": {"apart": 0}},
        simple_samples,
        tuple((phase, shape, None) for phase in ("fwdbwd", "fwd") for shape in (WHOLE, LONG)),
    ),
    "gated_delta_rule": Goal(
        gated_delta_rule,
        {
            AS_SET: {},
            "not ahead": {"ahead": 0},
            "solve, any registers": {"solve": Launch(64, 64, 4, 1)},
            "forward 128 columns, 8 warps, 3 stages": {"forward": Launch(64, 128, 8, 3)},
        },
        gated_samples,
        (*(("fwd", shape, None) for shape in (WHOLE, LONG, GROUPED, LONGEST)), ("fwdbwd", WHOLE, None)),
    ),
}  # fmt: skip
DTYPES = (torch.bfloat16, torch.float16)


def call_of(goal: Goal, phase: Phase, shape: Shape) -> Call:
    sample = timing_sample(goal.op, shape, torch.bfloat16, torch.device("cuda"))
    return _call(goal.op, sample.arguments, goal.op.cases.differentiable, sample.upstream[0], phase)


def forward_alone(op: Op[..., Any], sample: Sample, device: torch.device) -> list[Measured]:
    """Output and final state of a call that keeps nothing for gradients: by launches of its own."""
    exact, there = oracle(op, sample), sample.to(device)
    with torch.no_grad():
        found = op(**there.arguments)
        with force_path("torch"):
            baseline = op(**there.arguments)
    names = ("out", "final_state")
    return [
        _measure(name, "triton", ours, plain, exact[name], sample.dtype)
        for name, ours, plain in zip(names, found, baseline, strict=True)
    ]


def held(goal: Goal, name: str, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Whether all results of a variant are within bounds, and the worst of them."""
    wrong, worst = [], (0.0, "")
    for more, sample in goal.samples(dtype):
        with tuning(**{**more, **goal.variants[name]}), force_path("triton"):
            measured = [*compare(goal.op, sample, device), *forward_alone(goal.op, sample, device)]
        wrong += [str(one) for one in measured if not one.ok]
        worst = max(worst, *((one.error / one.bound, one.name) for one in measured))
    told = str(dtype).removeprefix("torch.")
    return {
        "tried": name,
        "dtype": told,
        "held": not wrong,
        "wrong": wrong,
        "share": worst[0],
        "worst": worst[1],
    }


def held_share(goals: list[Goal], index: int) -> None:
    """A share of the checks; each line tells one. Compiles what will be timed."""
    things = [(goal, name, dtype) for goal in goals for name in goal.variants for dtype in DTYPES]
    for goal, name, dtype in things[index::WORKERS]:
        try:
            found = held(goal, name, dtype, torch.device("cuda"))
            if dtype == torch.bfloat16:
                for phase, shape, names in goal.timed:
                    if (names is None or name in names) and shape["T"] < LONGEST["T"]:
                        with tuning(**goal.variants[name]):
                            call_of(goal, phase, shape)()
                torch.cuda.synchronize()
        except Exception as error:
            text = " ".join(str(error).split())[-300:]
            found = {"tried": name, "dtype": str(dtype), "held": False, "wrong": [text]}
        print("held " + json.dumps({"op": goal.op.name, **found}), flush=True)


def told_by_workers(only: list[str]) -> Iterator[dict[str, Any]]:
    command = [sys.executable, __file__, "--only", *only, "--warm"]
    start = partial(
        subprocess.Popen,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    workers = [start([*command, str(index)]) for index in range(WORKERS)]
    for index, worker in enumerate(workers):
        lines = worker.communicate()[0].splitlines()
        yield from (json.loads(line.removeprefix("held ")) for line in lines if line.startswith("held "))
        if worker.returncode:
            text = [f"worker {index} ended with {worker.returncode}: {' '.join(lines[-3:])[-300:]}"]
            yield {"op": "", "tried": "", "held": False, "wrong": text}


def captured(call: Call) -> torch.cuda.CUDAGraph:
    """One call as a graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def in_turns(graphs: dict[str, torch.cuda.CUDAGraph]) -> dict[str, dict[str, float]]:
    """Median and spread of each graph's milliseconds on the device, replayed one after the other again and again."""
    buffer = torch.empty(FLUSHED, dtype=torch.int8, device="cuda")
    marks: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in graphs}
    names = list(graphs)
    for turn in range(ROUNDS):
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            buffer.zero_()
            begin.record()
            graphs[name].replay()
            end.record()
            marks[name].append((begin, end))
    torch.cuda.synchronize()
    found = {}
    for name, pairs in marks.items():
        cuts = statistics.quantiles([begin.elapsed_time(end) for begin, end in pairs[1:]], n=10)
        found[name] = {"ms": cuts[4], "ms_p10": cuts[0], "ms_p90": cuts[-1]}
    return found


def apart(goal: Goal, shape: Shape, name: str) -> dict[str, float]:
    """How far a variant's results are from those of what is set, by norm, on what is timed."""
    sample = timing_sample(goal.op, shape, torch.bfloat16, torch.device("cuda"))
    expected = results(goal.op, sample)
    with tuning(**goal.variants[name]):
        found = results(goal.op, sample)
    return {
        each: float((found[each].float() - x.float()).norm() / x.float().norm().clamp_min(1e-30))
        for each, x in expected.items()
    }


def timed_goal(
    goal: Goal, right: set[str], log: Log, write: Callable[[dict[str, Any]], None], late: Callable[[], bool]
) -> Iterator[str]:
    for phase, shape, names in goal.timed:
        if late():
            yield "out of time"
            return
        call, graphs, kernels = call_of(goal, phase, shape), {}, {}
        for name in (name for name in (names or goal.variants) if name in right):
            try:
                with tuning(**goal.variants[name]):
                    kernels[name] = min((kernel_times(call) for _ in range(2)), key=lambda x: sum(x.values()))
                    graphs[name] = captured(call)
            except Exception as error:
                log(f"none  {name}: {' '.join(str(error).split())[-200:]}")
        text = f"{goal.op.name} {phase} {shape['B']}x{shape['T']}, {shape['H']} key heads"
        for name, ms in in_turns(graphs).items():
            told = "  ".join(f"{kernel.strip('_')} {one:.4f}" for kernel, one in kernels[name].items())
            yield f"{text} {name}: {ms['ms']:.4f} ({ms['ms_p10']:.4f} to {ms['ms_p90']:.4f})  kernels {told}"
            write({"op": goal.op.name, "phase": phase, "shape": shape, "dtype": "bfloat16", "tried": name,
                   **ms, "kernels_ms": kernels[name]})  # fmt: skip
        graphs.clear()


def held_all(goals: dict[str, Goal], *, tiny: bool) -> Iterator[dict[str, Any]]:
    if not tiny:
        yield from told_by_workers(list(goals))
        return
    for goal in goals.values():
        # The interpreter knows neither the cache nor the launches of a GPU.
        for name, given in goal.variants.items():
            if not given.keys() & {"ahead", "forward", "solve"}:
                for dtype in (torch.float16, torch.float32):
                    yield {"op": goal.op.name, **held(goal, name, dtype, torch.device("cpu"))}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", type=float, default=200.0, help="seconds after which nothing is begun")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the log and the rows")
    parser.add_argument("--only", nargs="*", default=list(GOALS), choices=list(GOALS))
    parser.add_argument("--commit", help="the code that ran")
    parser.add_argument("--tiny", action="store_true", help="only whether they are right, on a CPU")
    parser.add_argument("--warm", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    goals = {name: GOALS[name] for name in chosen.only}
    if chosen.warm is not None:
        torch.set_num_threads(1)
        held_share(list(goals.values()), chosen.warm)
        return 0
    begin = time.monotonic()
    chosen.out.mkdir(parents=True, exist_ok=True)
    log, lines = Log(chosen.out / "turns_check.log"), []
    header = {**machine(torch.device("cpu" if chosen.tiny else "cuda")), "commit": chosen.commit}

    def write(row: dict[str, Any]) -> None:
        with (chosen.out / "evidence-turns.jsonl").open("a") as file:
            file.write(json.dumps({**header, **row}) + "\n")

    wrong: set[tuple[str, str]] = set()
    for found in held_all(goals, tiny=chosen.tiny):
        told = f"{found['op']} {found['tried']} {found.get('dtype')}"
        share = f"worst {found.get('worst')} at {found.get('share', 0.0):.2f} of its bound"
        log(f"{'ok   ' if found['held'] else 'WRONG'} {told}: {share}")
        log.wrong += [f"{told}: {one}" for one in found["wrong"]]
        wrong |= set() if found["held"] else {(found["op"], found["tried"])}
        write(found)
    log(f"checked after {time.monotonic() - begin:.0f} s")
    for goal in goals.values() if not chosen.tiny else ():
        right = {name for name in goal.variants if (goal.op.name, name) not in wrong}
        for line in timed_goal(goal, right, log, write, lambda: time.monotonic() - begin > chosen.budget):
            log(line)
            lines.append(line)
        for name in right - {AS_SET}:
            far = apart(goal, goal.timed[0][1], name)
            log(
                f"{goal.op.name} {name}: {max(far.values()):.1e} apart from what is set ({max(far, key=far.__getitem__)})"
            )
            write({"op": goal.op.name, "tried": name, "apart": far})
    for line in (*lines, *log.wrong, f"{len(log.wrong)} wrong, {time.monotonic() - begin:.0f} s"):
        log(line)
    return 1 if log.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
