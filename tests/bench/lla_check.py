"""One call on a GPU machine: is local_linear_attention right, how fast, in how many steps, which launches are best.

    python tests/bench/lla_check.py --budget 300 --commit "$(git rev-parse --short=12 HEAD)" --out "$OUT"

Compiles side by side first, then holds every dtype, head size and form to the paper's uncentred form in float64, forward and
backward, twice for its bits. Then, in bfloat16 at H = 16, d = 128: times forward and both directions at ridges of 10 and 1 and
with a learned slope (no solve), and beside them softmax attention by fla, where it is installed, and by torch; then each launch
that is right. The floor is `products`, those of softmax attention, at the speed of a product of this machine. Writes
lla_check.log and rows to evidence-lla.jsonl; the short table comes last. Exits with 1 if anything was wrong. `--tiny`: on a
CPU with TRITON_INTERPRET=1, small, without launches and rivals.
"""

from __future__ import annotations

import argparse
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
from heddle.kernels.bench import Row, ceilings, machine, timed
from heddle.kernels.common.tuning import tuning
from heddle.kernels.configs.launch import Launch
from heddle.kernels.local_linear_attention import local_linear_attention, local_linear_attention_reference
from heddle.kernels.op import TRITON_DTYPES

Given = dict[str, Any]
MAIN = {"B": 1, "H": 4, "N": 2, "T": 150, "S": 200, "d": 128, "V": 128}
TINY = {"B": 1, "H": 2, "N": 1, "T": 20, "S": 40, "d": 16, "V": 16}
WORKERS = 14
FORMS: dict[str, Given] = {
    "ridge 10": {"ridge": 10.0},
    "ridge 1, window": {"ridge": 1.0, "window": 70},
    "ridge 0.2, masked": {"ridge": 0.2, "masked": True},
    "slope, window": {"ridge": 10.0, "slope": True, "window": 70},
}
# Keys that share a mean of several times their spread, and logits of thousands.
HARD = {"far from 0": ("k", 0.0, 5.0), "peaked": ("q", 100.0, 0.0)}
TRIED = {
    "solve": (Launch(64, 32, 8, 2), Launch(64, 64, 8, 2), Launch(64, 32, 8, 1), Launch(64, 32, 4, 2), Launch(128, 32, 8, 2)),
    "output": (Launch(64, 64, 4, 2), Launch(64, 64, 8, 2), Launch(128, 64, 8, 2)),
    "queries": (Launch(64, 32, 8, 2), Launch(64, 32, 8, 1), Launch(64, 64, 8, 1)),
    "keys": (Launch(32, 32, 8, 1), Launch(32, 64, 8, 1), Launch(32, 64, 8, 2), Launch(64, 64, 8, 1)),
}  # fmt: skip
SHAPES = {"8x4096": (8, 4096), "1x32768": (1, 32768)}


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
    """What is checked: a name and arguments."""
    main = TINY if tiny else MAIN
    for dtype in (torch.float32,) if tiny else TRITON_DTYPES:
        short = str(dtype).removeprefix("torch.")
        for name, form in FORMS.items():
            yield f"{short} {name}", drawn(main, dtype, device, form)
        yield f"{short} step", drawn({**main, "T": 1}, dtype, device, FORMS["ridge 10"])
        for d, V in ((64, 64), (100, 72), (256, 128)) if dtype == torch.bfloat16 else ():
            yield f"{short} d={d} V={V}", drawn({**MAIN, "d": d, "V": V}, dtype, device, FORMS["ridge 10"])
        for name, (which, factor, more) in HARD.items():
            given = drawn(main, dtype, device, FORMS["ridge 10"])
            given[which] = given[which] * (factor or 1.0) + more
            yield f"{short} {name}", given


def warm(index: int, device: torch.device) -> None:
    """Compiles every `WORKERS`th thing that will run, into Triton's cache on disk."""
    main = drawn(MAIN, torch.bfloat16, device, FORMS["ridge 10"])
    things: list[tuple[Given, Given]] = [(given, {}) for _, given in samples(device, tiny=False)]
    things += [(main, {kernel: launch}) for kernel, launches in TRIED.items() for launch in launches]
    for given, overrides in things[index::WORKERS]:
        try:
            with tuning(**overrides), force_path("triton"):
                results(local_linear_attention, given)
        except Exception as error:
            print(f"{overrides}: {' '.join(str(error).split())[-200:]}", flush=True)


def compiled(log: Log, begin: float) -> None:
    """Compiles all that will run, in processes side by side."""
    start = partial(subprocess.Popen, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = [start([sys.executable, __file__, "--warm", str(n)], env=environment) for n in range(WORKERS)]
    for index, worker in enumerate(workers):
        for line in worker.communicate()[0].splitlines()[-5:]:
            log(f"compile {index}: {line}")
    log(f"compiled in {time.monotonic() - begin:.0f} s")


def calls(
    form: Given, shape: dict[str, int], device: torch.device, dtype: torch.dtype
) -> dict[str, Callable[[], object]]:
    given = drawn(shape, dtype, device, form)
    leaves = {n: x.detach().requires_grad_() if isinstance(x, Tensor) else x for n, x in given.items()}
    upstream = torch.randn_like(given["q"])

    def forward() -> object:
        with torch.no_grad():
            return local_linear_attention(**given)

    return {
        "fwd": forward,
        "fwdbwd": lambda: torch.autograd.grad(
            local_linear_attention(**leaves), [x for x in leaves.values() if isinstance(x, Tensor)], upstream
        ),
    }


def products(shape: dict[str, int]) -> int:
    """FLOPs of the two products of causal attention, which are all that a call must have."""
    T, S = shape["T"], shape["S"]
    return 2 * shape["B"] * shape["H"] * (T * S - T * (T - 1) // 2) * (shape["d"] + shape["V"])


def race(
    log: Log, device: torch.device, write: Callable[..., None], late: Callable[[], bool], *, tiny: bool
) -> list[str]:
    """Rows of the op, of fla's attention, and of launches; a line of each."""
    limits = list(ceilings(device))
    for row in limits:
        write(row)
    dtype, lines = torch.float32 if tiny else torch.bfloat16, []
    heads = {"H": 2, "N": 2, "d": 16, "V": 16} if tiny else {"H": 16, "N": 16, "d": 128, "V": 128}

    def clock(name: str, impl: str, phase: str, shape: dict[str, int], call: Callable[[], object]) -> None:
        if late():
            log(f"none  {name} {impl} {phase}: out of time")
            return
        try:
            call()
            times = timed(call, device)
        except Exception as error:
            log(f"none  {name} {impl} {phase}: {' '.join(str(error).split())[-300:]}")
            return
        floor = products(shape) / limits[1]["tflops"] / 1e9 * (1.0 if phase == "fwd" else 3.5)
        about = {
            "op": "local_linear_attention",
            "impl": impl,
            "phase": phase,
            "shape": shape,
            "dtype": str(dtype),
        }
        write(
            {
                **about,
                **times,
                "gbps": None,
                "tflops": products(shape) / times["ms"] / 1e9,
                "peak_bytes": None,
            }
        )
        lines.append(f"{name} {impl} {phase}: {times['ms']:.4f} ms, attention's floor {floor:.4f}")
        log(lines[-1])

    shapes = {"1x40": (1, 40)} if tiny else SHAPES
    for name, (B, T) in shapes.items():
        shape = {"B": B, "T": T, "S": T, **heads}
        for told, form in {"ridge 10": {}, "ridge 1": {"ridge": 1.0}, "slope": {"slope": True}}.items():
            for phase, call in calls(form, shape, device, dtype).items():
                clock(name, f"heddle, {told}", phase, shape, call)
        if tiny:
            continue
        given = drawn(shape, dtype, device, {})
        q, k, v = (x.transpose(1, 2).contiguous() for x in given.values())
        try:
            from fla.ops.attn import parallel_attn

            clock(name, "fla, softmax", "fwd", shape, lambda q=q, k=k, v=v: parallel_attn(q=q, k=k, v=v))
        except ImportError as error:
            log(f"fla: {error}")
        clock(
            name,
            "torch, softmax",
            "fwd",
            shape,
            lambda g=given: torch.nn.functional.scaled_dot_product_attention(**g, is_causal=True),
        )
    for kernel, launches in () if tiny else TRIED.items():
        phase = "fwd" if kernel in ("solve", "output") else "fwdbwd"
        shape = {"B": 8, "T": 4096, "S": 4096, **heads}
        for launch in launches:
            if not late() and judge(
                log, f"{kernel} {launch}", drawn(MAIN, dtype, device, FORMS["ridge 10"]), **{kernel: launch}
            ):
                with tuning(**{kernel: launch}):
                    clock(
                        "8x4096", f"{kernel} {launch}", phase, shape, calls({}, shape, device, dtype)[phase]
                    )
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
    parser.add_argument("--tiny", action="store_true", help="on a CPU, in Triton's interpreter")
    parser.add_argument("--warm", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.warm is not None:
        warm(chosen.warm, torch.device("cuda"))
        return 0
    device, begin = torch.device("cpu" if chosen.tiny else "cuda"), time.monotonic()
    late = lambda: time.monotonic() - begin > chosen.budget  # noqa: E731
    chosen.out.mkdir(parents=True, exist_ok=True)
    log = Log(chosen.out / "lla_check.log")
    if not chosen.tiny:
        compiled(log, begin)
    for what, given in samples(device, tiny=chosen.tiny):
        try:
            judge(log, what, given)
        except Exception as error:
            log.wrong.append(f"{what}: {' '.join(str(error).split())[-300:]}")
    log(f"checked after {time.monotonic() - begin:.0f} s")
    header = {**machine(device), "commit": chosen.commit}

    def write(row: Row) -> None:
        with (chosen.out / "evidence-lla.jsonl").open("a") as out:
            out.write(json.dumps({**header, **row}) + "\n")

    with force_path("triton"):
        lines = race(log, device, write, late, tiny=chosen.tiny)
    for line in (*lines, *log.wrong, f"{len(log.wrong)} wrong, {time.monotonic() - begin:.0f} s"):
        log(line)
    return 1 if log.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
