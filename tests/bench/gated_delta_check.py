"""One call on a GPU machine: are gated_delta_rule and delta_rule right, and which launch configurations are best.

    python tests/bench/gated_delta_check.py --budget 240 --out "$OUT"
    python tests/bench/gated_delta_check.py --only split --budget 150 --out "$OUT" --commit "$(git rev-parse --short=12 HEAD)"
    python tests/bench/gated_delta_check.py --only bounds --budget 60 --out "$OUT" --commit "$(git rev-parse --short=12 HEAD)"
    TRITON_INTERPRET=1 python tests/bench/gated_delta_check.py --only split --tiny --out /tmp/gated

Compiles side by side first, then checks dtypes, head sizes and configurations against the float64 reference, and times each
kernel in each configuration. `split` holds the gradients by two kernels to the reference and to themselves, side by side, and
times them beside those by one; with `--tiny` they are only checked, on a CPU. Writes gated_delta_check.log and rows of `split` to
evidence-gated-delta-kernels.jsonl; the short table comes last. Exits with 1 if anything was wrong.
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
from triton.testing import do_bench

from heddle.kernels import Op, delta_rule, force_path, gated_delta_rule, gated_delta_rule_step
from heddle.kernels import _gated_delta_rule_launch as launcher
from heddle.kernels.accuracy import Measured, Sample, compare, draw
from heddle.kernels.bench import timed_in_graph
from heddle.kernels.common.tuning import tuning
from heddle.kernels.configs.gated_delta_rule import PAIRS, TOKENS
from heddle.kernels.configs.launch import Launch

DEVICE = torch.device("cuda")
WORKERS = 15
PARTS = ("correctness", "sweep", "steps", "split", "bounds")
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
Overrides = dict[str, Any]
ONE: Overrides = {"split": 0, "gradient": Launch(64, 64, 8, 1)}
TWO: Overrides = {"split": 1, "gradient": TOKENS, "pairs": PAIRS}
# For groups of heads, whose second kernel takes all registers otherwise.
FEWER: Overrides = {**TWO, "gradient": Launch(64, 64, 4, 1, 168)}
# The first is what the others are compared with.
SPLIT: dict[str, Overrides] = {
    "one kernel": ONE,
    "two kernels": TWO,
    "tokens 168 registers": FEWER,
    "tokens 128 registers": {**TWO, "gradient": Launch(64, 64, 4, 1, 128)},
    "tokens 128 columns": {**TWO, "gradient": Launch(64, 128, 4, 1)},
    "tokens 128 channels, 8 warps": {**TWO, "tile": 128, "gradient": Launch(64, 64, 8, 1)},
    "tokens 128 channels, 8 warps, 128 registers": {
        **TWO,
        "tile": 128,
        "gradient": Launch(64, 64, 8, 1, 128),
    },
    "pairs any registers": {**TWO, "pairs": Launch(64, 64, 4, 1)},
    "pairs 8 warps": {**TWO, "pairs": Launch(64, 64, 8, 1)},
}
SPLIT_SIZES = ((256, 256), (128, 256), (100, 72), (64, 64), (128, 128))
GROUPS = "1x32768, 4 key heads"
SPLIT_SHAPES = {
    "8x4096": SHAPES[0],
    "1x32768": SHAPES[1],
    "1x131072": {"B": 1, "T": 131072, **WIDE},
    GROUPS: GROUPED,
}
HARD = {"mixed": (0.0, -1e-6, -1e-4, -1.0, -20.0), "weak": (-1e-6,), "strong": (-20.0,)}
# Times that two runs are compared to the bit, at lengths where a race was seen before.
REPEATED, REPEATED_LENGTHS = 9, (64, 150, 300)


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


def launch_all(shape: dict[str, int], gated: bool, segment: int, **tried: Any) -> None:
    inputs = Inputs(shape, gated)
    with tuning(segment=segment, **tried):
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


Sampled = tuple[str, Op[..., Any], Overrides, Sample]


def hard(dtype: torch.dtype, choices: tuple[float, ...]) -> Sample:
    """Log-decays drawn from a few: strong ones beside weak ones, so that sums of them hide the weak."""
    sample = draw(gated_delta_rule, {**CHECKED, "K": 128, "V": 128, "T": 200}, dtype)
    log_decay = sample.arguments["log_decay"]
    picked = torch.randint(len(choices), log_decay.shape, generator=torch.Generator().manual_seed(1))
    drawn = torch.tensor(choices, dtype=log_decay.dtype)[picked]
    return replace(sample, arguments={**sample.arguments, "log_decay": drawn})


def tiny_samples() -> Iterator[Sampled]:
    for op, dtype in itertools.product(OPS, (torch.float16, torch.float32)):
        shape = {"B": 1, "H": 1, "HV": 2, "K": 40, "V": 24, "T": 150}
        tried = {"split": 1, "tile": 16, "segment": 64}
        yield f"{op.name} {dtype}", op, tried, draw(op, shape, dtype, cu_seqlens=[0, 1, 1, 140, 150])


def sized_samples(dtype: torch.dtype, K: int, V: int) -> Iterator[Sampled]:
    """What the gradients by two kernels are held to in one dtype and size."""
    op, shape = gated_delta_rule, {**CHECKED, "K": K, "V": V}
    # In float32 chunks are shorter: by the launches of its table.
    tried = {"split": 1} if dtype == torch.float32 else TWO
    name = f"{str(dtype).removeprefix('torch.')} K={K} V={V}"
    packed = draw(op, {**shape, "T": 200}, dtype, cu_seqlens=[0, 5, 5, 70, 200])
    yield f"{name} packed", op, {**tried, "segment": 64}, packed
    yield f"{name} T=200", op, tried, draw(op, {**shape, "T": 200}, dtype)
    if K == 128 == V:
        yield f"{name} delta_rule", delta_rule, tried, draw(delta_rule, {**shape, "T": 200}, dtype)
        for kind, choices in HARD.items():
            yield f"{name} {kind}", op, tried, hard(dtype, choices)
        for T in (1, 63, 65):
            yield f"{name} T={T}", op, tried, draw(op, {**shape, "T": T}, dtype)


def bounds(log: Log, rows: Path, commit: str | None) -> list[str]:
    """What was out of bounds once: error and bound of each gradient of a log-decay, by two kernels and by one; and the times."""
    found = [(TWO, f"{dtype} {K} {V}", draw(gated_delta_rule, {**CHECKED, "K": K, "V": V, "T": 200}, dtype))
             for dtype, K, V in ((torch.bfloat16, 128, 256), (torch.float16, 64, 64), (torch.float16, 128, 256))]  # fmt: skip
    found += [(TWO, f"{dtype} weak", hard(dtype, HARD["weak"])) for dtype in (torch.float16, torch.bfloat16)]
    found += [({"split": 0}, name, sample) for _, name, sample in found]
    row: dict[str, Any] = {"op": "gated_delta_rule", "case": "bounds", "commit": commit}
    row |= {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": torch.cuda.get_device_name(),
    }
    for tried, name, sample in found:
        told = f"{name}, {'one kernel' if tried == {'split': 0} else 'two kernels'}"
        measured = judged(gated_delta_rule, tried, sample, DEVICE)
        log.check(told, measured)
        row[told] = {one.name: [one.error, one.bound] for one in measured}
    row["ms"] = split_times({}, Inputs(SHAPES[0], True))
    with rows.open("a") as file:
        file.write(json.dumps(row) + "\n")
    errors = [f"{name}: {row[name]['d_log_decay'][0]:.2e} of {row[name]['d_log_decay'][1]:.2e}"
              for name in row if isinstance(row[name], dict) and name != "ms"]  # fmt: skip
    return [*errors, f"8x4096: {row['ms']}"]


def variant_samples(variant: str) -> Iterator[Sampled]:
    for dtype in DTYPES[:2]:
        sample = draw(gated_delta_rule, {**CHECKED, "K": 128, "V": 128, "T": 300}, dtype)
        yield f"variant {variant}: {dtype}", gated_delta_rule, SPLIT[variant], sample


def judged(op: Op[..., Any], tried: Overrides, sample: Sample, device: torch.device) -> list[Measured]:
    with tuning(**tried), force_path("triton"):
        return compare(op, sample, device)


def held(name: str, op: Op[..., Any], tried: Overrides, sample: Sample) -> str:
    """One line: whether a sample is right, and if not, whether it is by one kernel."""
    measured = judged(op, tried, sample, DEVICE)
    wrong = [str(one) for one in measured if not one.ok]
    if wrong:
        told = [str(one) for one in judged(op, {"split": 0}, sample, DEVICE) if not one.ok]
        return f"WRONG {name}: {'; '.join(wrong)}; by one kernel: {'; '.join(told) or 'right'}"
    return f"ok    {name}: worst {max(measured, key=lambda one: one.error / one.bound)}"


def repeated(variant: str) -> str:
    """One line: how many of the repeated backward passes differ from the first in any bit. Compiles what will be timed."""
    differ = 0
    with tuning(**SPLIT[variant]):
        for T in REPEATED_LENGTHS:
            call = Inputs({**WIDE, "B": 2, "T": T}, True).backward()
            first = call()
            for _ in range(REPEATED):
                differ += not all(torch.equal(a, b) for a, b in zip(first, call(), strict=True))
    return f"{'WRONG' if differ else 'ok   '} variant {variant}: {differ} runs differ from the first"


def held_apart(index: int) -> None:
    """A share of the checks of `split`, those of one size after each other; the lines tell what was found."""
    sizes = [(dtype, K, V) for K, V in SPLIT_SIZES for dtype in reversed(DTYPES)]
    groups: list[Iterator[tuple[str, Callable[[], str]]]] = [
        ((one[0], partial(held, *one)) for one in sized_samples(*size)) for size in sizes
    ]
    groups += [
        (
            *((one[0], partial(held, *one)) for one in variant_samples(variant)),
            (f"variant {variant}", partial(repeated, variant)),
        )
        for variant in SPLIT
    ]
    for name, check in itertools.chain(*groups[index::WORKERS]):
        try:
            line = check()
        except Exception as error:
            line = f"WRONG {name}: {' '.join(str(error).split())[-300:]}"
        print(line, flush=True)
    # Launches over long sequences, which are cut, and over few key heads.
    cut = itertools.product((WIDE, GROUPED), (ONE, TWO, FEWER))
    for shape, tried in itertools.islice(cut, index, None, WORKERS):
        launch_all({**shape, "B": 1, "T": 200}, True, 64, **tried)


def kernel_times(call: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of each kernel of a call by its name; kernels that run several times in it are added up."""
    from torch.profiler import ProfilerActivity, profile

    call()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(5):
            call()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = {}
    for event in seen.events():
        if event.name.startswith("_gated_delta_rule"):
            name = event.name.removeprefix("_gated_delta_rule_").removesuffix("_kernel")
            found.setdefault(name, []).append(event.device_time / 1e3)
    times = {}
    for name, runs in found.items():
        each = max(1, len(runs) // 5)
        times[name] = sum(sorted(runs[place::each])[2] for place in range(each))
    return times


def split_times(tried: Overrides, inputs: Inputs) -> dict[str, Any]:
    """Milliseconds of the kernels, of those of gradients alone, and of both directions."""
    with tuning(**tried):
        backward = inputs.backward()
        kernels = kernel_times(backward)
        both = float(
            do_bench(lambda: (inputs.forward(keep=True), backward()), warmup=20, rep=100, quantiles=[0.5])
        )
    made = sum(ms for name, ms in kernels.items() if name not in ("bwd_state", "carry"))
    return {"kernels_ms": kernels, "gradients_ms": made, "both_ms": both}


def split(log: Log, rows: Path, commit: str | None, late: Callable[[], bool]) -> list[str]:
    """Times each variant that was found right; gives the table."""
    made_by = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "commit": commit,
               "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}  # fmt: skip
    lines = {name: f"{name:44s}" for name in SPLIT}
    for shape, setting in SPLIT_SHAPES.items():
        inputs = Inputs(setting, True)
        for name, tried in SPLIT.items():
            if late():
                return [*lines.values(), "split: out of time"]
            if any(line.startswith(f"variant {name}:") for line in log.wrong):
                lines[name] += f"{'not right':>22s}"
                continue
            if shape == GROUPS and tried not in (ONE, TWO, FEWER):
                continue
            found = split_times(tried, inputs)
            lines[name] += f"{found['gradients_ms']:12.3f}{found['both_ms']:10.3f}"
            told = "  ".join(f"{kernel} {ms:.3f}" for kernel, ms in found["kernels_ms"].items())
            log(f"{shape} {name}: {told}; both {found['both_ms']:.3f}")
            row = {"op": "gated_delta_rule", "case": shape, "tried": name, **found}
            with rows.open("a") as file:
                file.write(json.dumps({**made_by, **row}) + "\n")
    header = "".join(f"{shape:>22s}" for shape in SPLIT_SHAPES)
    return [f"ms of the kernels of gradients, and of both directions\n{'':44s}{header}", *lines.values()]


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


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--budget", type=float, default=240.0, help="seconds after which nothing new is begun"
    )
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the log")
    parser.add_argument("--commit", help="what the code is")
    parser.add_argument("--only", nargs="*", default=PARTS[:3], choices=PARTS, help="parts run")
    parser.add_argument("--skip", nargs="*", default=[], choices=PARTS)
    parser.add_argument("--tiny", action="store_true", help="only whether `split` is right, on a CPU")
    parser.add_argument("--warm", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def prepared(log: Log, parts: list[str]) -> None:
    """Compiles in processes side by side, which check what `split` is held to."""
    command = [sys.executable, __file__, "--only", *parts, "--warm"]
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
        known = [line for line in lines if line.startswith(("ok  ", "WRONG"))]
        for line in known:
            log(line)
            log.wrong += [line.removeprefix("WRONG ")] if line.startswith("WRONG") else []
        for line in [line for line in lines if line not in known][-5:]:
            log(f"compile {index}: {line}")
        if worker.returncode:
            log.wrong.append(f"worker {index} ended with {worker.returncode}")


def main() -> int:
    chosen = arguments()
    parts = [part for part in chosen.only if part not in chosen.skip]
    if chosen.warm is not None:
        torch.set_num_threads(1)
        if "split" in parts:
            held_apart(chosen.warm)
        if set(parts) - {"split"}:
            warm(chosen.warm, sweeping="sweep" in parts)
        return 0
    begin = time.monotonic()
    chosen.out.mkdir(parents=True, exist_ok=True)
    log = Log(chosen.out / "gated_delta_check.log")
    lines = []

    def late(share: float) -> Callable[[], bool]:
        return lambda: time.monotonic() - begin > share * chosen.budget

    if chosen.tiny:
        for name, op, tried, sample in tiny_samples():
            log.check(name, judged(op, tried, sample, torch.device("cpu")))
    else:
        if parts != ["bounds"]:
            prepared(log, [part for part in parts if part != "bounds"])
        log(f"compiled in {time.monotonic() - begin:.0f} s")
        if "steps" in parts:
            steps(log)
        if "sweep" in parts:
            sweep(log, late(0.8))
        log(f"swept after {time.monotonic() - begin:.0f} s")
        if "correctness" in parts:
            correctness(log, late(1.0))
        rows = chosen.out / "evidence-gated-delta-kernels.jsonl"
        if "bounds" in parts:
            lines += bounds(log, rows, chosen.commit)
        if "split" in parts:
            lines += split(log, rows, chosen.commit, late(1.0))
    for line in (*lines, *log.wrong, f"{len(log.wrong)} wrong, {time.monotonic() - begin:.0f} s"):
        log(line)
    return 1 if log.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
