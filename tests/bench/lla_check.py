"""One call on a GPU machine: is local_linear_attention right, how fast beside its rivals, which launches are best.

    python tests/bench/lla_check.py --only bounds times --commit "$(git rev-parse --short=12 HEAD)" --out "$OUT"

Compiles side by side first. `bounds` holds every dtype, head size and form to the paper's uncentred form in float64, forward and
backward, twice for its bits: what was out of bounds once comes first. `times`, in bfloat16 at H = 16, d = 128: forward and both
directions at ridges of 10 and 1 and with a learned slope (no solve), beside them flash-linear-attention's softmax attention and
its `parallax`, which is that slope, torch's attention, and last our own path in PyTorch, each slow call once. `launches`: each
that is right. Without `--only` all three. The floor is `products`, those of softmax attention, at the speed of a product of this
machine. Writes lla_check.log and rows to evidence-lla.jsonl; the short table comes last. Exits with 1 if anything was wrong.
`--tiny`: on a CPU with TRITON_INTERPRET=1, small, without launches and rivals.
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
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_check import Log
from torch import Tensor

from heddle.kernels import force_path
from heddle.kernels.accuracy import EPSILON, worst_error
from heddle.kernels.bench import Row, arranged, ceilings, machine, rival, timed
from heddle.kernels.common.tuning import tuning
from heddle.kernels.configs.launch import Launch
from heddle.kernels.local_linear_attention import local_linear_attention, local_linear_attention_reference
from heddle.kernels.op import TRITON_DTYPES

Given = dict[str, Any]
MAIN = {"B": 1, "H": 4, "N": 2, "T": 150, "S": 200, "d": 128, "V": 128}
TINY = {"B": 1, "H": 2, "N": 1, "T": 20, "S": 40, "d": 16, "V": 16}
WORKERS = 14
MASKED = "ridge 0.2, masked"
FORMS: dict[str, Given] = {
    "ridge 10": {"ridge": 10.0},
    "ridge 1, window": {"ridge": 1.0, "window": 70},
    MASKED: {"ridge": 0.2, "masked": True},
    "slope, window": {"ridge": 10.0, "slope": True, "window": 70},
}
# Keys that share a mean of several times their spread, and logits of hundreds.
HARD = {"far from 0": ("k", 0.0, 5.0), "peaked": ("q", 100.0, 0.0)}
TRIED = {
    "solve": (Launch(128, 32, 8, 2), Launch(64, 32, 4, 3), Launch(64, 16, 4, 2), Launch(64, 64, 4, 2)),
    "output": (Launch(128, 64, 8, 2), Launch(64, 32, 4, 2)),
    "queries": (Launch(64, 32, 4, 2), Launch(128, 32, 8, 1), Launch(64, 64, 8, 1)),
    "keys": (Launch(32, 64, 4, 2), Launch(16, 128, 8, 2), Launch(16, 64, 4, 3), Launch(32, 64, 8, 2)),
    "right": (Launch(128, 64, 8, 2), Launch(64, 64, 8, 1)),
    "mean": (Launch(128, 64, 8, 2),),
}
SHAPES = {"8x4096": (8, 4096), "1x32768": (1, 32768)}
TIMED: dict[str, Given] = {"ridge 10": {"ridge": 10.0}, "ridge 1": {"ridge": 1.0}, "slope": {"slope": True}}
PARTS = ("bounds", "times", "launches")


def drawn(shape: dict[str, int], dtype: torch.dtype, device: torch.device, form: Given) -> Given:
    """Arguments of the op, on the device."""
    B, H, N, T, S, d, V = (shape[name] for name in ("B", "H", "N", "T", "S", "d", "V"))
    torch.manual_seed(0)
    given: Given = {"q": torch.randn(B, H, T, d), "k": torch.randn(B, N, S, d), "v": torch.randn(B, N, S, V)}
    if form.get("slope"):
        given["slope"] = torch.randn(B, H, T, d) / 3
    given = {name: x.to(device, dtype) for name, x in given.items()}
    if form.get("masked"):
        given["written"] = (torch.rand(B, S, device=device) > 0.2).float()
        given["real"] = torch.rand(B, S, device=device) > 0.3
    return given | {name: form[name] for name in ("ridge", "window") if name in form}


def results(function: Callable[..., Tensor], given: Given) -> dict[str, Tensor]:
    """Output and gradients, heads behind time."""
    leaves = {
        name: x.detach().clone().requires_grad_(x.is_floating_point()) if isinstance(x, Tensor) else x
        for name, x in given.items()
    }
    out = function(**leaves)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(torch.bfloat16)
    out.backward(upstream.to(out.device, out.dtype))
    found = {"out": out.detach()} | {
        n: x.grad for n, x in leaves.items() if isinstance(x, Tensor) and x.grad is not None
    }
    return {name: x[..., None] if x.dim() == 2 else x.transpose(1, 2) for name, x in found.items()}


def judge(log: Log, what: str, given: Given, **overrides: Any) -> bool:
    """Whether every result is within twice the error of plain torch, and the same in a second run."""
    with tuning(**overrides), force_path("triton"):
        found, again = (results(local_linear_attention, given) for _ in range(2))
    with force_path("torch"):
        plain = results(local_linear_attention, given)
    wide = {
        n: x.double().cpu() if isinstance(x, Tensor) and x.is_floating_point() else x
        for n, x in given.items()
    }
    wide = {n: x.cpu() if isinstance(x, Tensor) else x for n, x in wide.items()}
    exact, bad, told = results(local_linear_attention_reference, wide), [], []
    for name, tensor in exact.items():
        error, worst = worst_error(found[name], tensor, timed=True)
        bound = 2 * worst_error(plain[name], tensor, timed=True)[0] + EPSILON[given["q"].dtype]
        told.append(f"{name} {error:.1e} of {bound:.1e}")
        bad += [] if error <= bound else [f"{what}: {name} {error:.2e}, at most {bound:.2e}: {worst}"]
        bad += [] if torch.equal(found[name], again[name]) else [f"{what}: two runs differ in {name}"]
    log(f"{'ok   ' if not bad else 'WRONG'} {what}: {', '.join(told)}")
    log.wrong += bad
    return not bad


def samples(device: torch.device, *, tiny: bool) -> Iterator[tuple[str, Given]]:
    """What is checked: a name and arguments. What was out of bounds once comes first."""
    main, dtypes = TINY if tiny else MAIN, (torch.float32,) if tiny else TRITON_DTYPES
    for dtype in dtypes:
        yield from hard(main, dtype, device)
        yield f"{short(dtype)} {MASKED}", drawn(main, dtype, device, FORMS[MASKED])
    for dtype in dtypes:
        for name, form in FORMS.items():
            if name != MASKED:
                yield f"{short(dtype)} {name}", drawn(main, dtype, device, form)
        yield f"{short(dtype)} step", drawn({**main, "T": 1}, dtype, device, FORMS["ridge 10"])
        for d, V in () if tiny else ((64, 64), (100, 72), (256, 128)):
            for name in ("ridge 10", "slope, window"):
                sizes = {**MAIN, "d": d, "V": V}
                yield f"{short(dtype)} d={d} V={V} {name}", drawn(sizes, dtype, device, FORMS[name])
    if not tiny:
        longer = {**MAIN, "H": 2, "N": 1, "T": 300, "S": 300}
        yield "bfloat16 300 tokens", drawn(longer, torch.bfloat16, device, FORMS["ridge 1, window"])


def hard(main: dict[str, int], dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, Given]]:
    for (name, (which, factor, more)), form in itertools.product(HARD.items(), ("ridge 10", "slope, window")):
        given = drawn(main, dtype, device, FORMS[form])
        given[which] = given[which] * (factor or 1.0) + more
        yield f"{short(dtype)} {name}, {form}", given


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def warm(index: int, device: torch.device, only: list[str]) -> None:
    """Compiles every `WORKERS`th thing that will run, into Triton's cache on disk."""
    main = drawn(MAIN, torch.bfloat16, device, FORMS["ridge 10"])
    things: list[tuple[Given, Given]] = [(main, {})]
    if "bounds" in only:
        things += [(given, {}) for _, given in samples(device, tiny=False)]
    if "launches" in only:
        things += [(main, {kernel: launch}) for kernel, launches in TRIED.items() for launch in launches]
    for given, overrides in things[index::WORKERS]:
        try:
            with tuning(**overrides), force_path("triton"):
                results(local_linear_attention, given)
        except Exception as error:
            print(f"{overrides}: {' '.join(str(error).split())[-200:]}", flush=True)


def compiled(log: Log, begin: float, only: list[str]) -> None:
    """Compiles all that will run, in processes side by side."""
    start = partial(subprocess.Popen, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--only", *only, "--warm"]
    workers = [start([*command, str(n)], env=environment) for n in range(WORKERS)]
    for index, worker in enumerate(workers):
        for line in worker.communicate()[0].splitlines()[-5:]:
            log(f"compile {index}: {line}")
    log(f"compiled in {time.monotonic() - begin:.0f} s")


def calls(function: Callable[..., Tensor], given: Given, of: str = "q") -> dict[str, Callable[[], object]]:
    """A function of these arguments forward and in both directions; its output is as large as `of`."""
    leaves = {n: x.detach().requires_grad_() if isinstance(x, Tensor) else x for n, x in given.items()}
    upstream = torch.randn_like(given[of])

    def forward() -> object:
        with torch.no_grad():
            return function(**given)

    tensors = [x for x in leaves.values() if isinstance(x, Tensor)]
    return {"fwd": forward, "fwdbwd": lambda: torch.autograd.grad(function(**leaves), tensors, upstream)}


def in_torch(**given: Any) -> Tensor:
    with force_path("torch"):
        return local_linear_attention(**given)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def rivals(given: Given, log: Log) -> Iterator[tuple[str, dict[str, Callable[[], object]]]]:
    """Other ops on the same numbers: a name, and calls. Of fla's `parallax` how far it is apart from ours is told."""
    sides = {n: given[n] for n in "qkv"}
    yield "torch, softmax", calls(attention, sides)
    try:
        from fla.ops.attn import parallel_attn

        turned = {n: arranged("parallax", x) for n, x in given.items() if isinstance(x, Tensor)}
        yield "fla, softmax", calls(parallel_attn, {n: turned[n] for n in "qkv"})
        parallax = rival("parallax", "fwd")
        assert parallax is not None
        theirs = calls(parallax, turned)
        found, ours = theirs["fwd"](), local_linear_attention(**given).transpose(1, 2)
        assert isinstance(found, Tensor)
        log(f"fla's parallax is apart from ours by {float((found - ours).norm() / ours.norm()):.1e}")
        yield "fla, parallax", theirs
    except Exception as error:
        log(f"fla: {' '.join(str(error).split())[-300:]}")


def products(shape: dict[str, int]) -> int:
    """FLOPs of the two products of causal attention, which are all that a call must have."""
    work = local_linear_attention.cases.work
    assert work is not None
    return work({**shape, "K": shape["d"]}, "fwd", 2).flops


def once(call: Callable[[], object], device: torch.device) -> Row:
    """A call that takes seconds, timed once."""
    begin = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return {"ms": (time.perf_counter() - begin) * 1e3, "ms_p10": None, "ms_p90": None}


class Race:
    """Times calls, writes a row of each and keeps a line."""

    def __init__(self, log: Log, device: torch.device, write: Callable[..., None], late: Callable[[], bool]):
        self.log, self.device, self.write, self.late = log, device, write, late
        self.lines: list[str] = []
        limits = list(ceilings(device))
        for row in limits:
            write(row)
        self.rate = limits[1]["tflops"]

    def clock(
        self, shape: dict[str, int], impl: str, phase: str, call: Callable[[], object], *, slow: bool = False
    ) -> None:
        name = f"{shape['B']}x{shape['T']} {impl} {phase}"
        if self.late():
            self.log(f"none  {name}: out of time")
            return
        try:
            if not slow:
                call()
            times = once(call, self.device) if slow else timed(call, self.device)
        except Exception as error:
            self.log(f"none  {name}: {' '.join(str(error).split())[-300:]}")
            return
        floor = products(shape) / self.rate / 1e9 * (1.0 if phase == "fwd" else 3.5)
        about = {
            "op": "local_linear_attention",
            "impl": impl,
            "phase": phase,
            "shape": shape,
            "dtype": "bfloat16",
        }
        rates = {"gbps": None, "tflops": products(shape) / times["ms"] / 1e9, "peak_bytes": None}
        self.write({**about, **times, **rates, "floor_ms": floor, "of_floor": floor / times["ms"]})
        self.lines.append(f"{name}: {times['ms']:.3f} ms, {floor / times['ms']:.1%} of attention's floor")
        self.log(self.lines[-1])

    def ours(self, shapes: list[dict[str, int]], dtype: torch.dtype, *, tiny: bool) -> None:
        for shape, (told, form) in itertools.product(shapes, TIMED.items()):
            given = drawn(shape, dtype, self.device, form)
            for phase, call in calls(local_linear_attention, given).items():
                self.clock(shape, f"heddle, {told}", phase, call)
        for shape in shapes[: 0 if tiny else None]:
            for impl, both in rivals(drawn(shape, dtype, self.device, TIMED["slope"]), self.log):
                for phase, call in both.items():
                    self.clock(shape, impl, phase, call)
        for shape, told in itertools.product(shapes, ("slope", "ridge 10")):
            both = calls(in_torch, drawn(shape, dtype, self.device, TIMED[told]))
            # At 32,768 tokens a solve in PyTorch takes longer than all the rest.
            for phase in () if told != "slope" and shape["T"] > 10_000 else both:
                self.clock(shape, f"heddle's PyTorch, {told}", phase, both[phase], slow=True)

    def launches(self, shape: dict[str, int]) -> None:
        checked = drawn(MAIN, torch.bfloat16, self.device, FORMS["ridge 10"])
        given = drawn(shape, torch.bfloat16, self.device, TIMED["ridge 10"])
        for kernel, tried in TRIED.items():
            phase = "fwd" if kernel in ("solve", "output", "mean") else "fwdbwd"
            for launch in tried:
                with tuning(**{kernel: launch}):
                    if not self.late() and judge(self.log, f"{kernel} {launch}", checked, **{kernel: launch}):
                        self.clock(
                            shape, f"{kernel} {launch}", phase, calls(local_linear_attention, given)[phase]
                        )


def held(log: Log, device: torch.device, *, tiny: bool) -> tuple[int, int]:
    """How many cases are right, and how many are not."""
    found = [0, 0]
    for what, given in samples(device, tiny=tiny):
        try:
            found[0 if judge(log, what, given) else 1] += 1
        except Exception as error:
            log.wrong.append(f"{what}: {' '.join(str(error).split())[-300:]}")
            found[1] += 1
    return found[0], found[1]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--budget", type=float, default=300.0, help="seconds after which nothing new is begun"
    )
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the log and the rows")
    parser.add_argument("--commit", help="what the code is")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--tiny", action="store_true", help="on a CPU, in Triton's interpreter")
    parser.add_argument("--warm", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.warm is not None:
        warm(chosen.warm, torch.device("cuda"), chosen.only)
        return 0
    device, begin = torch.device("cpu" if chosen.tiny else "cuda"), time.monotonic()
    late = lambda: time.monotonic() - begin > chosen.budget  # noqa: E731
    chosen.out.mkdir(parents=True, exist_ok=True)
    log = Log(chosen.out / "lla_check.log")
    if not chosen.tiny:
        compiled(log, begin, chosen.only)
    header = {**machine(device), "commit": chosen.commit}

    def write(row: Row) -> None:
        with (chosen.out / "evidence-lla.jsonl").open("a") as out:
            out.write(json.dumps({**header, **row}) + "\n")

    if "bounds" in chosen.only:
        right, wrong = held(log, device, tiny=chosen.tiny)
        write(
            {
                "what": "local_linear_attention held to float64",
                "right": right,
                "wrong": wrong,
                "note": "; ".join(log.wrong),
            }
        )
        log(f"checked after {time.monotonic() - begin:.0f} s")
    dtype, lines = torch.float32 if chosen.tiny else torch.bfloat16, []
    heads = {"H": 2, "N": 2, "d": 16, "V": 16} if chosen.tiny else {"H": 16, "N": 16, "d": 128, "V": 128}
    shapes = [{"B": B, "T": T, "S": T, **heads} for B, T in ([(1, 40)] if chosen.tiny else SHAPES.values())]
    if chosen.only != ["bounds"]:
        with force_path("triton"):
            race = Race(log, device, write, late)
            if "times" in chosen.only:
                race.ours(shapes, dtype, tiny=chosen.tiny)
            if "launches" in chosen.only and not chosen.tiny:
                race.launches(shapes[0])
            lines = race.lines
    for line in (*lines, *log.wrong, f"{len(log.wrong)} wrong, {time.monotonic() - begin:.0f} s"):
        log(line)
    return 1 if log.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
