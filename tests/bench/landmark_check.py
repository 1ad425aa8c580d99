"""One call on a GPU machine: landmark_attention against float64, its launches, and its times beside dense attention.

    python tests/bench/landmark_check.py --budget 500 --commit "$(git rev-parse --short=12 HEAD)" --out "$OUT"
    python tests/bench/landmark_check.py --budget 75 --only decode --commit "$(git rev-parse --short=12 HEAD)" --out "$OUT"
    TRITON_INTERPRET=1 python tests/bench/landmark_check.py --tiny --out /tmp/landmark

Compiles side by side first. Checks every dtype, head size and length, short ones against the reference, long ones against plain
torch in float64, twice for equal bits and once more with NaN in fresh memory; each launch before it is timed. Then holds and
times decode steps at 128 K, as landmark_steps.py says, and times the training form beside causal dense attention. The floor of a
step is a copy that moves the bytes it must read, that of training the products alone at the rate of one large product. Writes
landmark_check.log and rows to evidence-landmark.jsonl; the table comes last; exits with 1 if anything was wrong. `--tiny` is what
is held, less of it, on a CPU, and one time.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import landmark_steps
import torch
from landmark_steps import BACKENDS, HALF, WANTED, Given, Report, decode, dense, drawn, ours, poisoned
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from heddle.kernels import force_path
from heddle.kernels.accuracy import EPSILON, worst_error
from heddle.kernels.bench import timed
from heddle.kernels.common.tuning import tuning
from heddle.kernels.configs.launch import Launch
from heddle.kernels.landmark_attention import landmark_attention, landmark_attention_reference

WORKERS = 8
SHORT = {"B": 2, "H": 4, "N": 2, "T": 37, "S": 50, "K": 16, "V": 24, "block": 8}
MODEL = {"B": 1, "H": 8, "N": 2, "S": 1500, "K": 128, "V": 128, "block": 64}
# A step as it is timed, of one key head: what is compiled for it is the same.
STEP = {"B": 1, "H": 4, "N": 1, "T": 1, "S": 131072, "K": 128, "V": 128, "block": 64, "top": 32}
TINY = {"B": 1, "H": 4, "N": 2, "T": 9, "S": 40, "K": 16, "V": 16, "block": 8}
LENGTHS = (1, 63, 64, 65, 1000)
SIZES = ((64, 64), (192, 128), (256, 256), (100, 72))
TRIED = {
    "forward": (
        Launch(128, 1, 8, 2), Launch(128, 1, 8, 3), Launch(128, 1, 4, 2), Launch(64, 1, 4, 2), Launch(64, 1, 4, 3),
        Launch(128, 1, 8, 2, 128),
    ),
    "queries": (Launch(64, 1, 4, 2), Launch(64, 1, 4, 1), Launch(64, 1, 8, 2), Launch(128, 1, 8, 2), Launch(128, 1, 8, 1)),
    "keys": (
        Launch(64, 1, 8, 2), Launch(64, 1, 4, 2), Launch(64, 1, 8, 1), Launch(64, 1, 8, 3), Launch(128, 1, 8, 2),
        Launch(32, 1, 4, 2), Launch(32, 1, 8, 3),
    ),
}  # fmt: skip


def results(
    function: Callable[..., Tensor], given: Given, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """Output and gradients in this dtype, heads behind time."""
    there = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in given.items()}
    there |= {name: there[name].detach().to(dtype).requires_grad_() for name in WANTED}
    out = function(**there)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    upstream = upstream.to(given["q"].dtype).to(out)
    found = torch.autograd.grad(out, [there[name] for name in WANTED], upstream)
    named = {"out": out.detach(), **dict(zip(WANTED, found, strict=True))}
    return {name: x.transpose(1, 2) for name, x in named.items()}


def judge(report: Report, what: str, given: Given, exact: dict[str, Tensor], **overrides: Any) -> bool:
    """Whether every result is within twice the error of plain torch, and the same each time."""
    dtype, log = given["q"].dtype, report.log
    run = partial(results, landmark_attention, given, dtype, report.device)
    with tuning(**overrides), force_path("triton"):
        found, again = run(), run()
        with poisoned():
            third = run()
    with force_path("torch"):
        plain = run()
    bad, told = [], []
    for other, why in ((again, "two runs differ"), (third, "NaN in fresh memory shows")):
        bad += [f"{what}: {why} in {name}" for name in found if not torch.equal(found[name], other[name])]
    for name, tensor in exact.items():
        error, worst = worst_error(found[name], tensor, timed=True)
        bound = 2 * worst_error(plain[name], tensor, timed=True)[0] + EPSILON[dtype]
        told.append(f"{name} {error:.1e} of {bound:.1e}")
        bad += [] if error <= bound else [f"{what}: {name} {error:.2e}, at most {bound:.2e}: {worst}"]
    log(f"{'ok   ' if not bad else 'WRONG'} {what}: {', '.join(told)}")
    log.wrong += bad
    return not bad


def samples(device: torch.device, *, tiny: bool) -> Iterator[tuple[str, Given, bool, dict[str, int]]]:
    """What is checked: a name, arguments, whether it is short enough for the reference, and overrides."""
    dtypes = (torch.float32, torch.float16) if tiny else (HALF, torch.float16, torch.float32)
    for dtype in dtypes:
        shape = TINY if tiny else SHORT
        for top in (None, 2):
            given = {**drawn(shape, dtype, device), "top": top}
            yield f"{dtype} short, top {top}", given, True, {}
            real = torch.ones(shape["B"], shape["S"], device=device) > 0
            written = torch.ones(shape["B"], shape["S"], device=device)
            real[0, -2:], written[-1, 3:13] = False, 0.0
            start = given["start"] - 2 * (torch.arange(shape["B"], device=device) == 0)
            yield (
                f"{dtype} padded, top {top}",
                {**given, "real": real, "written": written, "start": start},
                True,
                {},
            )
        if tiny:
            continue
        yield f"{dtype} step at 128 K", drawn(STEP, dtype, device), False, {}
        for T in LENGTHS:
            yield f"{dtype} T={T}", drawn({**MODEL, "T": T}, dtype, device), False, {}
        for (K, V), T in itertools.product(SIZES, (1, 130)):
            yield f"{dtype} {K} {V} T={T}", drawn({**MODEL, "K": K, "V": V, "T": T}, dtype, device), False, {}
        for T, splits in ((1, 1), (1, 3), (5, 2), (130, 1)):
            given = drawn({**MODEL, "B": 3, "T": T, "top": 5}, dtype, device)
            yield f"{dtype} top 5 T={T} in {splits}", given, False, {"splits": splits}
        for block in (16, 50, 128):
            yield (
                f"{dtype} block {block}",
                drawn({**MODEL, "T": 300, "block": block}, dtype, device),
                False,
                {},
            )


def correctness(report: Report, late: Callable[[], bool], *, tiny: bool) -> None:
    for what, given, is_short, overrides in samples(report.device, tiny=tiny):
        if late():
            report.log("correctness: out of time")
            return
        try:
            function, device = landmark_attention, report.device
            if is_short:
                function, device = landmark_attention_reference, torch.device("cpu")  # type: ignore[assignment]
            judge(report, what, given, results(function, given, torch.float64, device), **overrides)
        except Exception as error:
            report.log.wrong.append(f"{what}: {' '.join(str(error).split())[-300:]}")


def expanded(name: str, *, q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    """The same with keys and values copied for each query head, since not every backend takes groups in both directions."""
    k, v = (side.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for side in (k, v))
    with sdpa_kernel(BACKENDS[name]):
        return scaled_dot_product_attention(q, k, v, is_causal=True)


def phases(
    function: Callable[..., Tensor], given: Given, wanted: tuple[str, ...]
) -> dict[str, Callable[[], object]]:
    """A call forward, and one forward and backward."""
    leaves = {**given, **{name: given[name].detach().requires_grad_() for name in wanted}}
    upstream = torch.randn_like(given["q"])

    def forward() -> object:
        with torch.no_grad():
            return function(**given)

    def both() -> object:
        return torch.autograd.grad(function(**leaves), [leaves[name] for name in wanted], upstream)

    return {"fwd": forward, "fwdbwd": both}


def product_rate(report: Report) -> float:
    """FLOP a second of one large product in bfloat16."""
    size = 8192
    a, b = (torch.randn(size, size, device=report.device, dtype=HALF) for _ in range(2))
    return 2.0 * size**3 / (float(timed(lambda: a @ b, report.device)["ms"]) * 1e-3)


def training(report: Report, late: Callable[[], bool]) -> None:
    rate = product_rate(report)
    for shape in map(dict, landmark_attention.cases.bench_shapes):
        given = drawn(shape, HALF, report.device)
        for phase, share in (("fwd", 1.0), ("fwdbwd", 3.5)):
            if late():
                report.log("training: out of time")
                return
            mine = report.row("heddle", phase, shape, phases(ours, given, WANTED)[phase])
            rivals = {
                f"{name}, {kind}": report.row(
                    f"{name}, {kind}", phase, shape, phases(partial(run, name), given, WANTED[:3])[phase]
                )
                for name in ("flash", "cudnn")
                for kind, run in (("grouped", dense), ("expanded", expanded))
            }
            best = min(rivals, key=rivals.__getitem__)
            products = 2.0 * shape["B"] * shape["H"] * shape["T"] ** 2 / 2 * (shape["K"] + shape["V"])
            floor = share * products / rate * 1e3
            report.table.append(
                f"{phase:6} {shape['B']} x {shape['T']:6}: {mine:8.3f} ms, dense {rivals[best]:8.3f} ({best}): "
                f"{rivals[best] / mine:.2f} x; floor {floor:.3f} ms, share {floor / mine:.2f}"
            )


def beside_torch(report: Report) -> None:
    """Both directions beside the path in plain torch, in half precision and in full."""
    shape = {**landmark_attention.cases.bench_shapes[0], "B": 1}
    for dtype in (HALF, torch.float32):
        call = phases(landmark_attention, drawn(shape, dtype, report.device), WANTED)["fwdbwd"]
        times = {}
        for path in ("triton", "torch"):
            with force_path(path):
                times[path] = report.row(f"heddle, {path}, {dtype}", "fwdbwd", shape, call)
        report.table.append(
            f"fwdbwd 1 x {shape['T']} {dtype}: {times['triton']:.3f} ms, plain torch {times['torch']:.3f}"
        )


def sweep(report: Report, late: Callable[[], bool]) -> None:
    """Each launch of the training form: whether it is right, and its time."""
    small = drawn({**MODEL, "T": 1000}, HALF, report.device)
    exact = results(landmark_attention, small, torch.float64, report.device)
    shape = dict(landmark_attention.cases.bench_shapes[0])
    calls = phases(ours, drawn(shape, HALF, report.device), WANTED)
    for name, launch in ((kernel, one) for kernel in ("forward", "keys", "queries") for one in TRIED[kernel]):
        if late():
            report.log("sweep: out of time")
            return
        try:
            if judge(report, f"{name} {launch}", small, exact, **{name: launch}):
                with tuning(**{name: launch}):
                    phase = "fwd" if name == "forward" else "fwdbwd"
                    report.row(f"heddle, {name} {launch}", phase, shape, calls[phase])
        except Exception as error:
            report.log(f"none  {name} {launch}: {' '.join(str(error).split())[-200:]}")


def warm(index: int, only: list[str]) -> None:
    """Compiles every `WORKERS`th thing that will run, into Triton's cache on disk."""
    device = torch.device("cuda")
    landmark_steps.warm(slice(index, None, WORKERS))
    if only == ["decode"]:
        return
    model = drawn({**MODEL, "T": 1000}, HALF, device)
    both = partial(results, landmark_attention)
    things: list[tuple[Given, dict[str, Any]]] = [
        (given, overrides) for _, given, _, overrides in samples(device, tiny=False)
    ]
    things += [(model, {name: launch}) for name, launches in TRIED.items() for launch in launches]
    for given, overrides in things[index::WORKERS]:
        try:
            with tuning(**overrides), force_path("triton"):
                both(given, given["q"].dtype, device)
        except Exception as error:
            print(f"{overrides}: {str(error).splitlines()[0]}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--budget", type=float, default=500.0, help="seconds after which nothing new is begun"
    )
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the log and the rows")
    parser.add_argument("--commit", help="what the code is")
    parser.add_argument("--tiny", action="store_true", help="a few short samples on a CPU, interpreted")
    parser.add_argument("--warm", type=int, help=argparse.SUPPRESS)
    parts = ["warm", "correctness", "decode", "training", "torch", "sweep"]
    parser.add_argument("--skip", nargs="*", default=[], choices=parts)
    parser.add_argument("--only", nargs="*", default=[], choices=parts[1:], help="these parts, and `warm`")
    chosen = parser.parse_args()
    if chosen.warm is not None:
        warm(chosen.warm, chosen.only)
        return 0
    if chosen.only:
        chosen.skip += [part for part in parts[1:] if part not in chosen.only]
    report = Report(chosen.out, torch.device("cpu" if chosen.tiny else "cuda"), chosen.commit)
    begin, log = time.monotonic(), report.log

    def late(share: float) -> Callable[[], bool]:
        return lambda: time.monotonic() - begin > share * chosen.budget

    def warm_up() -> None:
        only = ["--only", *chosen.only] if chosen.only else []
        command = [sys.executable, __file__, *only, "--warm"]
        for process in [subprocess.Popen([*command, str(index)]) for index in range(WORKERS)]:
            process.wait()

    def one_time() -> None:
        call = phases(ours, drawn(TINY, torch.float32, report.device), WANTED)["fwd"]
        report.table.append(f"fwd, interpreted: {report.row('heddle', 'fwd', TINY, call):.1f} ms")

    steps: dict[str, Callable[[], None]] = {
        "warm": warm_up,
        "correctness": lambda: correctness(report, late(0.5), tiny=chosen.tiny),
        "decode": lambda: decode(report, late(1.0 if chosen.only else 0.7)),
        "training": lambda: training(report, late(0.8)),
        "torch": lambda: beside_torch(report),
        "sweep": lambda: sweep(report, late(1.0)),
    }
    if chosen.tiny:
        steps = {
            "correctness": steps["correctness"],
            "decode": lambda: landmark_steps.tiny(report),
            "training": one_time,
        }
    for name, run in steps.items():
        if name not in chosen.skip:
            run()
            log(f"{name} done after {time.monotonic() - begin:.0f} s")
    for line in (*log.wrong, *report.table, f"{len(log.wrong)} wrong, {time.monotonic() - begin:.0f} s"):
        log(line)
    return 1 if log.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
