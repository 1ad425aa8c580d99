"""One call on a GPU machine: landmark_attention against float64, its launches, and its times beside dense attention.

    python tests/bench/landmark_check.py --budget 500 --commit "$(git rev-parse --short=12 HEAD)" --out "$OUT"
    TRITON_INTERPRET=1 python tests/bench/landmark_check.py --tiny --out /tmp/landmark

Compiles side by side first. Checks every dtype, head size and length, short ones against the reference, long ones against plain
torch in float64, twice for equal bits and once more with NaN in fresh memory; each launch before it is timed. Then times a decode
step at 128 K beside dense attention by each of torch's backends, in CUDA graphs over several caches so that L2 holds none, and
the training form beside causal dense attention. The floor of a step is a copy that moves the bytes it must read, that of
training the products alone at the rate of one large product. Writes landmark_check.log and rows to evidence-landmark.jsonl;
the table comes last; exits with 1 if anything was wrong. `--tiny` is the first part on a CPU, and one time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_check import Log
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from heddle.kernels import force_path
from heddle.kernels.accuracy import EPSILON, worst_error
from heddle.kernels.bench import machine, timed, timed_in_graph
from heddle.kernels.common.tuning import tuning
from heddle.kernels.configs.launch import Launch
from heddle.kernels.landmark_attention import landmark_attention, landmark_attention_reference

HALF = torch.bfloat16
WANTED = ("q", "k", "v", "landmarks")
WORKERS = 8
BACKENDS = {
    name: getattr(SDPBackend, f"{name.upper()}_ATTENTION") for name in ("flash", "cudnn", "efficient")
}
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
    "step": (Launch(1, 1, 4, 1, 128), Launch(1, 1, 4, 1), Launch(1, 1, 8, 1), Launch(1, 1, 4, 1, 96)),
    "score": (Launch(64, 64, 4, 1), Launch(64, 128, 4, 1), Launch(64, 32, 4, 1), Launch(64, 32, 2, 1)),
}  # fmt: skip
SPLITS = (1, 2, 3, 5, 7, 11, 17, 33)
# Caches that a step goes through in turn, where one would stay in L2.
CACHES = 4
Given = dict[str, Any]


class Report:
    """Logs, and writes and keeps rows."""

    def __init__(self, folder: Path, device: torch.device, commit: str | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log = Log(folder / "landmark_check.log")
        self.file, self.device = folder / "evidence-landmark.jsonl", device
        self.header = machine(device) | ({} if commit is None else {"commit": commit})
        self.table: list[str] = []

    def row(
        self, impl: str, phase: str, shape: dict[str, int], call: Callable[[], object], calls: int = 1
    ) -> float:
        """Milliseconds of one of the `calls` that `call` makes; infinity where it does not run."""
        try:
            call()
            times = timed_in_graph(call) if phase == "decode_graph" else timed(call, self.device)
        except Exception as error:
            self.log(f"none  {impl} {phase} {shape}: {' '.join(str(error).split())[-200:]}")
            return float("inf")
        times = {name: value / calls for name, value in times.items()}
        about = {
            "op": "landmark_attention",
            "impl": impl,
            "phase": phase,
            "shape": shape,
            "dtype": "bfloat16",
        }
        with self.file.open("a") as file:
            file.write(json.dumps({**self.header, **about, **times}) + "\n")
        sizes = " ".join(f"{name}={shape[name]}" for name in ("B", "T", "S"))
        self.log(f"{phase:12} {sizes:24} {times['ms']:9.4f} ms  {impl}")
        return float(times["ms"])


def drawn(shape: dict[str, int], dtype: torch.dtype, device: torch.device, seed: int = 0) -> Given:
    """Arguments by name, rounded to `dtype`."""
    inputs = landmark_attention.cases.inputs(shape, torch.Generator(device).manual_seed(seed))
    given: Given = {name: x.to(dtype) if name in WANTED else x for name, x in inputs.items()}
    return {**given, "block": shape["block"], "top": shape.get("top")}


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


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory is full of NaN inside."""
    kept = {name: getattr(torch, name) for name in ("empty", "empty_like")}

    def wrapped(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            x = make(*args, **kwargs)
            return x.fill_(float("nan") if x.is_floating_point() else 1 << 30)

        return made

    for name, make in kept.items():
        setattr(torch, name, wrapped(make))
    try:
        yield
    finally:
        for name, make in kept.items():
            setattr(torch, name, make)


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


def ours(**given: Any) -> Tensor:
    with force_path("triton"):
        return landmark_attention(**given)


def dense(name: str, *, q: Tensor, k: Tensor, v: Tensor, together: bool = False, **_: Any) -> Tensor:
    """Causal attention, or one query's; `together`: the heads of a group as queries of one head, so that keys are read once."""
    with sdpa_kernel(BACKENDS[name]):
        if together:
            q = q.view(q.shape[0], k.shape[1], -1, q.shape[3])
            return scaled_dot_product_attention(q, k, v)
        return scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=True)


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


def each(function: Callable[..., Tensor], caches: list[Given]) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return [function(**given) for given in caches]

    return run


def step_bytes(shape: dict[str, int]) -> int:
    """What a step reads: landmarks of each key head, and for each query head `top` blocks and half of the own one."""
    B, H, N, K, V, block = (shape[name] for name in ("B", "H", "N", "K", "V", "block"))
    keys = shape["top"] * block + block // 2
    return 2 * B * (N * shape["S"] // block * K + H * keys * (K + V))


def decode(report: Report, late: Callable[[], bool]) -> None:
    for shape in map(dict, landmark_attention.cases.decode_shapes):
        if late():
            report.log("decode: out of time")
            return
        count = CACHES if shape["B"] == 1 else 1
        caches = [drawn(shape, HALF, report.device, seed) for seed in range(count)]
        read = step_bytes(shape)
        source = [torch.empty(read // 2, dtype=torch.uint8, device=report.device) for _ in range(2 * count)]

        def copy(pairs: list[Tensor] = source) -> None:
            for to, of in zip(pairs[::2], pairs[1::2], strict=True):
                to.copy_(of)

        floor = report.row("copy of the bytes", "decode_graph", shape, copy, count)
        rivals = {
            f"{name}{', groups together' if together else ''}": report.row(
                f"{name}{', groups together' if together else ''}",
                "decode_graph", shape, each(partial(dense, name, together=together), caches), count,
            )
            for name, together in itertools.product(BACKENDS, (False, True))
        }  # fmt: skip
        for splits in SPLITS:
            with tuning(splits=splits):
                report.row(f"heddle, splits {splits}", "decode_graph", shape, each(ours, caches), count)
        for name, launch in ((kernel, one) for kernel in ("step", "score") for one in TRIED[kernel]):
            with tuning(**{name: launch}):
                report.row(f"heddle, {name} {launch}", "decode_graph", shape, each(ours, caches), count)
        mine = report.row("heddle", "decode_graph", shape, each(ours, caches), count)
        report.row("heddle, eager", "decode", shape, each(ours, caches), count)
        best = min(rivals, key=rivals.__getitem__)
        report.table.append(
            f"decode B={shape['B']:3} 128 K: {mine * 1e3:8.1f} us, dense {rivals[best] * 1e3:8.1f} ({best}): "
            f"{rivals[best] / mine:.2f} x (goal 8); floor {floor * 1e3:.1f} us, share {floor / mine:.2f}"
        )


def product_rate(report: Report) -> float:
    """FLOP a second of one large product in bfloat16."""
    size = 8192
    a, b = (torch.randn(size, size, device=report.device, dtype=HALF) for _ in range(2))
    return 2.0 * size**3 / (timed(lambda: a @ b, report.device)["ms"] * 1e-3)


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


def warm(index: int) -> None:
    """Compiles every `WORKERS`th thing that will run, into Triton's cache on disk."""
    device = torch.device("cuda")
    model, step = (drawn(shape, HALF, device) for shape in ({**MODEL, "T": 1000}, STEP))
    both = partial(results, landmark_attention)
    things: list[tuple[Given, dict[str, Any]]] = [
        (given, overrides) for _, given, _, overrides in samples(device, tiny=False)
    ]
    things += [
        (step if name in ("step", "score") else model, {name: launch})
        for name, launches in TRIED.items()
        for launch in launches
    ]
    for given, overrides in things[index::WORKERS]:
        try:
            with tuning(**overrides), force_path("triton"):
                if given is step:
                    landmark_attention(**given)
                else:
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
    parser.add_argument(
        "--skip",
        nargs="*",
        default=[],
        choices=["warm", "correctness", "decode", "training", "torch", "sweep"],
    )
    chosen = parser.parse_args()
    if chosen.warm is not None:
        warm(chosen.warm)
        return 0
    report = Report(chosen.out, torch.device("cpu" if chosen.tiny else "cuda"), chosen.commit)
    begin, log = time.monotonic(), report.log

    def late(share: float) -> Callable[[], bool]:
        return lambda: time.monotonic() - begin > share * chosen.budget

    def warm_up() -> None:
        command = [sys.executable, __file__, "--warm"]
        for process in [subprocess.Popen([*command, str(index)]) for index in range(WORKERS)]:
            process.wait()

    def one_time() -> None:
        call = phases(ours, drawn(TINY, torch.float32, report.device), WANTED)["fwd"]
        report.table.append(f"fwd, interpreted: {report.row('heddle', 'fwd', TINY, call):.1f} ms")

    steps: dict[str, Callable[[], None]] = {
        "warm": warm_up,
        "correctness": lambda: correctness(report, late(0.5), tiny=chosen.tiny),
        "decode": lambda: decode(report, late(0.7)),
        "training": lambda: training(report, late(0.8)),
        "torch": lambda: beside_torch(report),
        "sweep": lambda: sweep(report, late(1.0)),
    }
    if chosen.tiny:
        steps = {"correctness": steps["correctness"], "training": one_time}
    for name, run in steps.items():
        if name not in chosen.skip:
            run()
            log(f"{name} done after {time.monotonic() - begin:.0f} s")
    for line in (*log.wrong, *report.table, f"{len(log.wrong)} wrong, {time.monotonic() - begin:.0f} s"):
        log(line)
    return 1 if log.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
