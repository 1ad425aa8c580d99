"""One call on a GPU machine: is ttt right, how fast beside flash-linear-attention's nearest op, which launches are best.

    python tests/bench/ttt_check.py --budget 300 --commit "$(git rev-parse --short=12 HEAD)" --out "$OUT"

Compiles side by side first, then holds every dtype, head size, form and launch to the float64 reference, packed, in chunks
that earlier calls have begun and at hard rates, each twice for its bits. Times the op forward, in both directions and for a
token, with both losses and chunks of 64 and 512, beside chunk_ttt_linear where fla is installed (another inner loop: a norm,
and chunks of 16), then each launch that was right, by kernel. The floor is what `Op.cases.work` says, at the speed of a copy and
of a product. Writes ttt_check.log, rows as those of run.py to ttt.jsonl and rows of kernels to evidence-ttt-kernels.jsonl; the
short table comes last. Exits with 1 if anything was wrong. `--tiny`: on a CPU with TRITON_INTERPRET=1, small, without a rival.
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
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_check import Log
from torch import Tensor

from heddle.kernels import force_path, ttt, ttt_reference
from heddle.kernels.accuracy import Sample, compare, draw, results
from heddle.kernels.bench import Row, ceilings, machine, timed, timed_in_graph
from heddle.kernels.common.tuning import tuning
from heddle.kernels.configs.launch import Launch
from heddle.kernels.op import TRITON_DTYPES, Op

WORKERS = 14
LENGTHS = (1, 63, 65, 600)
PACKED = [0, 5, 5, 133, 300]
FORMS: tuple[dict[str, Any], ...] = (
    {"loss": "l2", "normalise": "after", "chunk": 64},
    {"loss": "dot", "normalise": "before", "chunk": 100},
    {"loss": "l2", "normalise": "before", "chunk": 200, "momentum": None},
    {"loss": "dot", "normalise": "none", "chunk": 7},
)
MAIN = FORMS[0]
# Factors of the rates: none are written, and a chunk writes more than the weights hold.
HARD = {"rates of 0": 0.0, "rates of a tenth": 20.0}
TRIED = {
    "forward": (Launch(64, 32, 4, 2), Launch(64, 32, 4, 3), Launch(64, 32, 8, 2), Launch(64, 64, 8, 2), Launch(64, 16, 4, 2)),
    "keep": (Launch(64, 32, 4, 2), Launch(64, 32, 4, 1), Launch(64, 32, 8, 2), Launch(64, 64, 8, 2)),
    "backward": (Launch(64, 32, 8, 2), Launch(64, 32, 8, 1), Launch(64, 32, 4, 2), Launch(64, 64, 8, 2), Launch(64, 16, 4, 2)),
    "tokens": (Launch(64, 64, 4, 1), Launch(64, 64, 4, 2), Launch(64, 128, 8, 1), Launch(64, 128, 8, 2), Launch(128, 64, 8, 1)),
    "step": (Launch(16, 16, 4, 1), Launch(16, 32, 4, 1), Launch(16, 64, 4, 1), Launch(16, 128, 8, 1)),
}  # fmt: skip
Overrides = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """Where and how large."""

    device: torch.device
    sizes: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    shapes: dict[str, tuple[int, int]]
    steps: tuple[int, ...]
    heads: int
    size: int


FULL = Setting(
    torch.device("cuda"), (128, 64, 100, 256), TRITON_DTYPES, {"8x4096": (8, 4096), "1x32768": (1, 32768)}, (1, 32), 16, 128
)  # fmt: skip
TINY = Setting(torch.device("cpu"), (16, 20), (torch.float32,), {"1x130": (1, 130)}, (1,), 2, 16)


def of_form(form: dict[str, Any]) -> Op[..., Any]:
    return replace(ttt, fast=partial(ttt.fast, **form), reference=partial(ttt_reference, **form))


def drawn(shape: dict[str, int], dtype: torch.dtype, form: dict[str, Any], factor: float = 1.0) -> Sample:
    """A sample in chunks that earlier calls have begun; packed if its batch is 0."""
    ends = None if shape["B"] else PACKED
    sample = draw(ttt, {**shape, "B": shape["B"] or 1}, dtype, cu_seqlens=ends)
    arguments, upstream, wanted = dict(sample.arguments), sample.upstream, sample.wanted
    arguments["rates"] = arguments["rates"] * factor
    state = arguments["initial_state"]
    state[..., -1] = (3 * torch.arange(state.shape[0]) % form["chunk"] / form["chunk"])[:, None]
    if "momentum" in form:
        size = (state.shape[-1] - 2) // 3
        short = lambda x: torch.cat((x[..., :size], x[..., 2 * size :]), dim=-1)  # noqa: E731
        arguments["initial_state"], upstream = short(state), (upstream[0], short(upstream[1]))
        arguments.pop("momentum")
        wanted = tuple(name for name in wanted if name != "momentum")
    return Sample(dtype, arguments, wanted, upstream)


def every_sample(setting: Setting) -> Iterator[tuple[str, dict[str, Any], Overrides, Sample]]:
    """What is compared with the reference: a name, a form, launches and a sample."""
    tiny = setting is TINY
    for dtype, D in itertools.product(setting.dtypes, setting.sizes):
        name, is_main = f"{str(dtype).removeprefix('torch.')} D={D}", setting.sizes[0] == D
        for form in FORMS if is_main else FORMS[:2]:
            told = f"{name} {form['loss']} {form['normalise']} {form['chunk']}"
            yield f"{told} packed", form, {}, drawn({"B": 0, "H": 2, "K": D, "T": PACKED[-1]}, dtype, form)
        for T in LENGTHS[: 2 if tiny else 4] if is_main else LENGTHS[2:3]:
            yield f"{name} T={T}", MAIN, {}, drawn({"B": 2, "H": 2, "K": D, "T": T}, dtype, MAIN)
        for told, factor in HARD.items() if is_main else ():
            sample = drawn({"B": 1, "H": 2, "K": D, "T": 200}, dtype, MAIN, factor)
            yield f"{name} {told}", MAIN, {}, sample
    for overrides in every_tuning(setting):
        yield launched(overrides), MAIN, overrides, tuned_sample(setting, overrides)


def every_tuning(setting: Setting) -> Iterator[Overrides]:
    limit = 1 if setting is TINY else None
    yield from ({name: launch} for name, launches in TRIED.items() for launch in launches[:limit])


def launched(overrides: Overrides) -> str:
    return ", ".join(f"{name} {launch}" for name, launch in overrides.items())


def tuned_sample(setting: Setting, overrides: Overrides) -> Sample:
    T = 5 if "step" in overrides else 150
    return drawn({"B": 2, "H": 2, "K": setting.size, "T": T}, setting.dtypes[0], MAIN)


def judge(
    log: Log | None,
    what: str,
    form: dict[str, Any],
    overrides: Overrides,
    sample: Sample,
    device: torch.device,
) -> bool:
    """Whether a sample is within its bounds, and the same in a second run."""
    op = of_form(form)
    # Asked for: what has not passed here yet is not taken otherwise.
    with tuning(**overrides), force_path("triton"):
        measured = compare(op, sample, device)
        first, second = results(op, sample.to(device)), results(op, sample.to(device))
    if log is None:
        return True
    same = all(torch.equal(first[name], second[name]) for name in first)
    if not same:
        log.wrong.append(f"{what}: two runs differ")
    return log.check(what, measured) and same


def warm(index: int, setting: Setting) -> None:
    """Compiles every `WORKERS`th thing that will run, into Triton's cache on disk."""
    for what, form, overrides, sample in list(every_sample(setting))[index::WORKERS]:
        try:
            judge(None, what, form, overrides, sample, setting.device)
        except Exception as error:
            print(f"{what}: {' '.join(str(error).split())[-200:]}", flush=True)


def compiled(log: Log, begin: float) -> None:
    """Compiles all that will run, in processes side by side."""
    start = partial(subprocess.Popen, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = [start([sys.executable, __file__, "--warm", str(n)], env=environment) for n in range(WORKERS)]
    for index, worker in enumerate(workers):
        for line in worker.communicate()[0].splitlines()[-5:]:
            log(f"compile {index}: {line}")
    log(f"compiled in {time.monotonic() - begin:.0f} s")


def timed_inputs(setting: Setting, B: int, T: int, *, state: bool = False) -> dict[str, Tensor]:
    """Tensors as benchmarks draw them, on the device."""
    dtype = setting.dtypes[0]
    shape = {"B": B, "T": T, "H": setting.heads, "K": setting.size}
    drawn_there = draw(ttt, shape, dtype, initial_state=state, device=setting.device)
    return drawn_there.arguments


def rival(given: dict[str, Tensor], chunk: int) -> Callable[[dict[str, Tensor]], Tensor]:
    """fla's TTT-Linear on the same queries, keys, values and rates."""
    from fla.ops.ttt import chunk_ttt_linear

    H, D = given["q"].shape[2:]
    w, b = (torch.full((H, D), x, device=given["q"].device, dtype=given["q"].dtype) for x in (1.0, 0.0))

    def run(given: dict[str, Tensor]) -> Tensor:
        q, k, v, eta = (given[name] for name in ("q", "k", "v", "rates"))
        return chunk_ttt_linear(q=q, k=k, v=v, w=w, b=b, eta=eta.to(q.dtype), chunk_size=chunk)[0]

    return run


def implementations(given: dict[str, Tensor]) -> Iterator[tuple[str, Callable[[dict[str, Tensor]], Tensor]]]:
    for chunk, loss in itertools.product((64, 512), ("dot", "l2")):
        yield f"heddle, chunk {chunk}, {loss}", lambda x, c=chunk, s=loss: ttt(**x, chunk=c, loss=s)[0]
    for chunk in (16, 64):
        try:
            yield f"fla, chunk {chunk}", rival(given, chunk)
        except Exception as error:
            print(f"fla: {' '.join(str(error).split())[-200:]}", flush=True)


def calls(
    run: Callable[[dict[str, Tensor]], Tensor], given: dict[str, Tensor]
) -> dict[str, Callable[[], object]]:
    """Forward alone, and in both directions."""
    wanted = ("q", "k", "v", "rates")
    leaves = {name: x.detach().requires_grad_(name in wanted) for name, x in given.items()}
    upstream = torch.randn_like(given["v"])

    def forward() -> object:
        with torch.no_grad():
            return run(given)

    def both() -> object:
        return torch.autograd.grad(run(leaves), [leaves[name] for name in wanted], upstream)

    return {"fwd": forward, "fwdbwd": both}


def peak(call: Callable[[], object], device: torch.device) -> int | None:
    if device.type != "cuda":
        call()
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def race(log: Log, setting: Setting, write: Callable[[Row], None], late: Callable[[], bool]) -> list[str]:
    """Rows of all implementations at all shapes, and a line of each."""
    limits = list(ceilings(setting.device))
    for row in limits:
        write(row)
    copy, product = limits[0]["gbps"], limits[1]["tflops"]
    lines, work = [], ttt.cases.work
    assert work is not None
    for name, (B, T) in setting.shapes.items():
        shape = {"B": B, "T": T, "H": setting.heads, "K": setting.size}
        given = timed_inputs(setting, B, T)
        for impl, run in implementations(given):
            for phase, call in calls(run, given).items():
                if late():
                    return [*lines, "race: out of time"]
                try:
                    most = peak(call, setting.device)
                    times = timed(call, setting.device)
                except Exception as error:
                    log(f"none  {name} {impl} {phase}: {' '.join(str(error).split())[-300:]}")
                    continue
                least = work(shape, phase, given["q"].element_size())  # type: ignore[arg-type]
                speeds = {"gbps": least.bytes / times["ms"] / 1e6, "tflops": least.flops / times["ms"] / 1e9}
                about = {
                    "op": "ttt",
                    "impl": impl,
                    "phase": phase,
                    "shape": shape,
                    "dtype": str(given["q"].dtype),
                }
                write({**about, **times, **speeds, "peak_bytes": most, "first_call_s": None})
                floor = max(least.bytes / copy / 1e6, least.flops / product / 1e9)
                lines.append(f"{name} {impl} {phase}: {times['ms']:.4f} ms, floor {floor:.4f}, peak {most}")
                log(lines[-1])
    return lines + decode(log, setting, write, copy)


def decode(log: Log, setting: Setting, write: Callable[[Row], None], copy: float) -> list[str]:
    """A token of an open chunk: the state is read and written."""
    lines = []
    clocks = {"decode": partial(timed, device=setting.device)}
    if setting.device.type == "cuda":
        clocks["decode_graph"] = timed_in_graph
    for B, (phase, clock) in itertools.product(setting.steps, clocks.items()):
        given = timed_inputs(setting, B, 1, state=True)
        given["initial_state"][..., -1] = 0.0

        @torch.no_grad()
        def step(given: dict[str, Tensor] = given) -> object:
            return ttt(**given)

        step()
        times, moved = clock(step), 2 * given["initial_state"].numel() * 4
        floor = moved / copy / 1e6
        shape = {"B": B, "T": 1, "H": setting.heads, "K": setting.size}
        about = {
            "op": "ttt",
            "impl": "heddle",
            "phase": phase,
            "shape": shape,
            "dtype": str(given["q"].dtype),
        }
        write(
            {
                **about,
                **times,
                "gbps": moved / times["ms"] / 1e6,
                "tflops": None,
                "peak_bytes": None,
                "first_call_s": None,
            }
        )
        lines.append(f"B={B} {phase}: {times['ms']:.5f} ms, floor {floor:.5f}")
        log(lines[-1])
    return lines


def sweep(
    log: Log, setting: Setting, good: set[str], write: Callable[[Row], None], late: Callable[[], bool]
) -> list[str]:
    """Times of each kernel in each launch that was right, as the profiler tells them."""
    from torch.profiler import ProfilerActivity, profile

    lines = []
    for overrides, (name, (B, T)) in itertools.product(every_tuning(setting), setting.shapes.items()):
        kernel = next(iter(overrides))
        if launched(overrides) not in good or kernel == "step" or late():
            continue
        given = timed_inputs(setting, B, T)
        both = calls(lambda x: ttt(**x, chunk=512, loss="l2")[0], given)
        call = both["fwd" if kernel == "forward" else "fwdbwd"]
        found: dict[str, list[float]] = {}
        with tuning(**overrides):
            call()
            with profile(activities=[ProfilerActivity.CUDA]) as seen:
                for _ in range(4):
                    call()
                torch.cuda.synchronize()
        for event in seen.events():
            if event.name.startswith("_ttt"):
                found.setdefault(event.name, []).append(event.device_time / 1e3)
        # The sweep forward runs twice in both directions: for outputs, and for what is kept.
        runs = {"_ttt_sweep_kernel": 1 if kernel == "forward" else 2}
        times = {
            f"{one} {place}": sorted(ms[place :: runs.get(one, 1)])[1]
            for one, ms in found.items()
            for place in range(runs.get(one, 1))
        }
        write({"op": "ttt", "case": name, "tried": launched(overrides), "kernels_ms": times})
        lines.append(
            f"{name} {launched(overrides)}: {'  '.join(f'{one} {ms:.4f}' for one, ms in times.items())}"
        )
        log(lines[-1])
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--budget", type=float, default=300.0, help="seconds after which nothing new is begun"
    )
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the log and the rows")
    parser.add_argument("--commit", help="what the code is")
    parser.add_argument("--times", action="store_true", help="times alone, nothing is held to the reference")
    parser.add_argument(
        "--shapes", nargs="*", choices=list(FULL.shapes), help="shapes timed; all if not given"
    )
    parser.add_argument("--tiny", action="store_true", help="on a CPU, in Triton's interpreter")
    parser.add_argument("--warm", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    setting = TINY if chosen.tiny else FULL
    if chosen.shapes:
        setting = replace(setting, shapes={name: FULL.shapes[name] for name in chosen.shapes})
    if chosen.warm is not None:
        warm(chosen.warm, setting)
        return 0
    begin = time.monotonic()
    late = lambda: time.monotonic() - begin > chosen.budget  # noqa: E731
    chosen.out.mkdir(parents=True, exist_ok=True)
    log = Log(chosen.out / "ttt_check.log")
    if not chosen.tiny and not chosen.times:
        compiled(log, begin)
    good = set()
    for what, form, overrides, sample in () if chosen.times else every_sample(setting):
        try:
            good |= {what} if judge(log, what, form, overrides, sample, setting.device) else set()
        except Exception as error:
            told = f"{what}: {' '.join(str(error).split())[-300:]}"
            log(f"none  {told}")
            # A launch that does not fit is no error of the op.
            log.wrong += [] if overrides else [told]
    log(f"checked after {time.monotonic() - begin:.0f} s")
    header = {**machine(setting.device), "commit": chosen.commit}

    def write(row: Row, file: str = "ttt.jsonl") -> None:
        with (chosen.out / file).open("a") as out:
            out.write(json.dumps({**header, **row}) + "\n")

    with force_path("triton"):
        lines = race(log, setting, write, late)
        if not chosen.tiny:
            lines += sweep(log, setting, good, partial(write, file="evidence-ttt-kernels.jsonl"), late)
    for line in (*lines, *log.wrong, f"{len(log.wrong)} wrong, {time.monotonic() - begin:.0f} s"):
        log(line)
    return 1 if log.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
