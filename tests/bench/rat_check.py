"""One call on a GPU machine: are rat_scan and rat_attention right, which launches are best, and how fast is a RAT layer.

    python tests/bench/rat_check.py --budget 560 --out "$OUT" --commit "$(git rev-parse --short=12 HEAD)" --skip sweep
    python tests/bench/rat_check.py --budget 400 --out "$OUT" --commit ... --skip forms apart ops layers steps

Compiles side by side first, then holds every dtype, form and launch of both ops to their float64 references, two runs to the bit,
fresh memory filled with NaN, inputs that lie apart, and addresses beyond 2^31 elements. Times the ops, then a whole layer (16
heads of 128, width 2048, chunks of 16) beside the same layer with torch's fastest dense attention and with compiled
FlexAttention: 1 x 102,400 tokens forward and in both directions, as it is and compiled as a whole, and a decode step behind 4,096
tokens in a CUDA graph; launches come last. Writes rat_check.log, and rows to evidence-rat.jsonl; a short table comes last. Exits
with 1 if anything was wrong. `--tiny` runs all of it but the kernels on a CPU, small; `--table FILE` prints rows as a table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_check import Log
from rat_layers import Bench, both_ways
from torch import Tensor

from heddle.kernels import force_path
from heddle.kernels.accuracy import EPSILON, draw, worst_error
from heddle.kernels.bench import Row, _peak, ceilings, machine, timed, timed_in_graph
from heddle.kernels.common.tuning import tuning
from heddle.kernels.configs.launch import Launch
from heddle.kernels.configs.rat_scan import PART
from heddle.kernels.rat_attention import rat_attention, rat_attention_reference
from heddle.kernels.rat_scan import rat_scan, rat_scan_reference

TINY = "--tiny" in sys.argv
DEVICE = torch.device("cpu" if TINY else "cuda")
WORKERS = 14
Given = dict[str, Any]
Sample = tuple[str, str, Given, dict[str, Any]]
REFERENCES = {
    "rat_scan": (rat_scan, rat_scan_reference),
    "rat_attention": (rat_attention, rat_attention_reference),
}
WANTED = {
    "rat_scan": ("q", "k", "x", "gate", "gate_bias", "past"),
    "rat_attention": ("q", "key", "value", "keys", "values"),
}
WIDE = ("gate_bias", "past")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LENGTHS = (1, 63, 64, 65, 1000)
TRIED = {
    "rat_forward": (
        Launch(128, 64, 8, 3), Launch(128, 64, 8, 2), Launch(64, 64, 4, 3), Launch(64, 64, 4, 2), Launch(128, 128, 8, 2),
        Launch(128, 64, 4, 2), Launch(64, 128, 4, 2), Launch(128, 32, 8, 3), Launch(64, 32, 4, 3),
    ),
    "rat_queries": (
        Launch(64, 64, 4, 2), Launch(64, 64, 4, 3), Launch(128, 64, 8, 2), Launch(128, 32, 8, 3), Launch(128, 64, 8, 3),
        Launch(64, 32, 4, 3), Launch(128, 128, 8, 1),
    ),
    "rat_keys": (
        Launch(32, 64, 4, 2), Launch(64, 64, 8, 3), Launch(64, 64, 4, 2), Launch(32, 128, 8, 2), Launch(64, 128, 8, 2),
        Launch(32, 64, 4, 3), Launch(64, 128, 8, 3),
    ),
    "scan_forward": (
        Launch(PART, 1024, 4, 1), Launch(PART, 512, 4, 1), Launch(PART, 1024, 8, 1), Launch(PART, 256, 4, 1),
        Launch(PART, 512, 2, 1), Launch(PART, 256, 2, 1),
    ),
    "scan_backward": (
        Launch(PART, 256, 4, 1), Launch(PART, 128, 4, 1), Launch(PART, 256, 8, 1), Launch(PART, 128, 2, 1),
        Launch(PART, 256, 4, 1, 168), Launch(PART, 512, 8, 1),
    ),
}  # fmt: skip


def scan_given(
    dtype: torch.dtype, *, B: int = 2, T: int = 65, H: int = 4, d: int = 128, chunk: int = 16, start: int = 0,
    bounds: tuple[int, ...] | None = None, bias: float = 0.0, turned: int | None = None,
) -> Given:  # fmt: skip
    generator = torch.Generator().manual_seed(T + chunk + d + start)
    normal = partial(torch.randn, generator=generator)
    turned = d if turned is None else turned
    angles = normal(-(-(start % chunk + T) // chunk), turned // 2).repeat(1, 2)
    return {
        "q": normal(B, T, 2, d).to(dtype), "k": normal(B, T, 2, d).to(dtype), "x": normal(B, T, H, d).to(dtype),
        "gate": normal(B, T, H, d).to(dtype), "gate_bias": normal(H, d) + bias, "chunk": chunk, "start": start,
        "past": normal(B, 2, H, d) if start else None, "rotation": (angles.cos(), angles.sin()) if turned else None,
        "cu_seqlens": None if bounds is None else torch.tensor(bounds, dtype=torch.int32),
    }  # fmt: skip


def attention_given(
    dtype: torch.dtype, *, B: int = 2, T: int = 65, H: int = 4, d: int = 128, chunk: int = 16, start: int = 0,
    bounds: tuple[int, ...] | None = None, sharp: float = 1.0,
) -> Given:  # fmt: skip
    generator = torch.Generator().manual_seed(T + chunk + d + start)
    normal = partial(torch.randn, generator=generator)
    sums = (start + T) // chunk if bounds is None else -(-T // chunk)
    return {
        "q": (sharp * normal(B, T, 2, d)).to(dtype), "key": normal(B, T, H, d).to(dtype),
        "value": normal(B, T, H, d).to(dtype), "keys": normal(B, H, sums, d).to(dtype),
        "values": normal(B, H, sums, d).to(dtype), "chunk": chunk, "start": start,
        "cu_seqlens": None if bounds is None else torch.tensor(bounds, dtype=torch.int32),
    }  # fmt: skip


def samples() -> Iterator[Sample]:
    """What is held to the reference: op, name, arguments, and overrides."""
    for dtype in DTYPES:
        short = str(dtype).removeprefix("torch.")
        for T in LENGTHS:
            yield "rat_scan", f"{short} T={T}", scan_given(dtype, T=T), {}
            yield "rat_attention", f"{short} T={T} chunks of 2", attention_given(dtype, T=T, chunk=2), {}
        for d, chunk in ((64, 64), (100, 5), (256, 16), (128, 1), (128, 1000), (8, 3)):
            yield "rat_scan", f"{short} d={d} chunk={chunk}", scan_given(dtype, T=150, d=d, chunk=chunk), {}
            yield (
                "rat_attention",
                f"{short} d={d} chunk={chunk}",
                attention_given(dtype, T=150, d=d, chunk=chunk),
                {},
            )
        for bias in (-30.0, 12.0, 300.0, -300.0):
            yield "rat_scan", f"{short} bias {bias:g}", scan_given(dtype, bias=bias), {}
        bounds = (0, 1, 70, 70, 333)
        for start, chunk in ((37, 16), (32, 16), (37, 100)):
            yield "rat_scan", f"{short} behind {start}", scan_given(dtype, start=start, T=90, chunk=chunk), {}
            yield (
                "rat_attention",
                f"{short} behind {start}",
                attention_given(dtype, start=start, T=90, chunk=chunk),
                {},
            )
        yield "rat_scan", f"{short} still", scan_given(dtype, turned=0), {}
        yield "rat_scan", f"{short} half turned", scan_given(dtype, turned=64), {}
        yield "rat_scan", f"{short} step", scan_given(dtype, B=70, T=1, start=95), {}
        yield "rat_attention", f"{short} sharp", attention_given(dtype, chunk=2, T=300, sharp=8.0), {}
        for splits in (1, 3):
            step = attention_given(dtype, B=3, T=1, start=4096)
            yield "rat_attention", f"{short} step in {splits}", step, {"splits": splits}
        packed = attention_given(dtype, B=1, T=333, chunk=4, bounds=bounds)
        for tiles in (0, 1):
            yield "rat_attention", f"{short} packed, descriptors {tiles}", packed, {"descriptors": tiles}
        yield "rat_scan", f"{short} packed", scan_given(dtype, B=1, T=333, chunk=4, bounds=bounds), {}


def launches() -> Iterator[Sample]:
    """The same for every launch that is tried, those of rat_scan also with large heads."""
    attention = attention_given(torch.bfloat16, B=1, T=1000, chunk=2)
    scans = {d: scan_given(torch.bfloat16, B=1, T=1000, d=d) for d in (128, 256)}
    for name, tried in TRIED.items():
        for launch in tried:
            if not name.startswith("scan"):
                for tiles in (1, 0):
                    overrides = {name: launch, "descriptors": tiles}
                    yield "rat_attention", f"{name} {told(launch)}, descriptors {tiles}", attention, overrides
                continue
            for d, given in scans.items():
                yield "rat_scan", f"{name} {told(launch)}{' tall' if d > 128 else ''}", given, {name: launch}


def told(launch: Launch) -> str:
    limit = f", {launch.registers} registers" if launch.registers else ""
    return f"{launch.chunk} x {launch.columns}, {launch.warps} warps, {launch.stages} stages{limit}"


def placed(given: Given, device: torch.device | str, dtype: torch.dtype | None = None) -> Given:
    """The same on a device, numbers in another dtype if one is named."""

    def move(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(map(move, x))
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x.to(device) if isinstance(x, Tensor) else x
        return x.to(device, dtype or x.dtype)

    return {name: move(x) for name, x in given.items()}


def results(op: str, function: Callable[..., Any], given: Given) -> dict[str, Tensor]:
    """Everything it gives and every gradient, heads behind time; what has no numbers is left out."""
    wanted = [name for name in WANTED[op] if given[name] is not None]
    there = given | {name: given[name].detach().requires_grad_() for name in wanted}
    found = function(**there)
    found = found if isinstance(found, tuple) else (found,)
    generator, kind = torch.Generator().manual_seed(7), given["q"].dtype
    # In float64 they are rounded on their way back (`_Rounded`).
    upstream = [torch.randn(x.shape, generator=generator).to(kind).to(x) for x in found]
    some = [x for x in found if x.numel()]
    upstream = [x for x in upstream if x.numel()]
    gradients = torch.autograd.grad(some, [there[name] for name in wanted], upstream, materialize_grads=True)
    names = ("turned", "key", "value", "keys", "values", "running") if op == "rat_scan" else ("out",)
    named = {name: x.detach() for name, x in zip(names, found, strict=True)}
    named |= {f"d_{name}": x for name, x in zip(wanted, gradients, strict=True)}
    turned = ("keys", "values", "d_keys", "d_values")
    return {name: x.transpose(1, 2) if name in turned else x for name, x in named.items() if x.numel()}


def kernels() -> AbstractContextManager[None]:
    """The kernels, asked for: what has not passed here yet is not taken otherwise."""
    return nullcontext() if TINY else force_path("triton")


_known: dict[int, tuple[Given, dict[str, Tensor]]] = {}


def exact_of(op: str, given: Given) -> dict[str, Tensor]:
    """What the reference gives, once for what is held to it several times."""
    if id(given) not in _known:
        function = partial(_rounded_upstream, REFERENCES[op][1], given["q"].dtype)
        # The arguments as well, or another could take their place.
        _known[id(given)] = (given, results(op, function, placed(given, "cpu", torch.float64)))
    return _known[id(given)][1]


def judge(log: Log, op: str, what: str, given: Given, overrides: dict[str, Any]) -> bool:
    """Whether every result is within twice the error of plain torch, and the same again in memory full of NaN."""
    function, rounding = REFERENCES[op][0], given["q"].dtype
    exact = exact_of(op, given)
    there, make = placed(given, DEVICE), torch.empty
    with tuning(**overrides), kernels():
        found = results(op, function, there)
        torch.empty = lambda *size, **rest: make(*size, **rest).fill_(float("nan"))  # type: ignore[assignment]
        try:
            again = results(op, function, there)
        finally:
            torch.empty = make
    with force_path("torch"):
        plain = results(op, function, there)
    bad, line = [], []
    for name, tensor in exact.items():
        error, worst = worst_error(found[name], tensor, timed=tensor.dim() == 4)
        bound = 2 * worst_error(plain[name], tensor, timed=tensor.dim() == 4)[0] + EPSILON[rounding]
        line.append(f"{name} {error:.1e} of {bound:.1e}")
        bad += [] if error <= bound else [f"{op} {what}: {name} {error:.2e}, at most {bound:.2e}: {worst}"]
        bad += [] if torch.equal(found[name], again[name]) else [f"{op} {what}: two runs differ in {name}"]
    log(f"{'ok   ' if not bad else 'WRONG'} {op} {what}: {', '.join(line)}")
    log.wrong += bad
    return not bad


def _rounded_upstream(reference: Callable[..., Any], rounding: torch.dtype, **given: Any) -> Any:
    """The reference, whose gradients come rounded as those of the op do."""
    found = reference(**given)
    alone = not isinstance(found, tuple)
    made = tuple(_Rounded.apply(x, rounding) for x in ((found,) if alone else found))  # type: ignore[no-untyped-call]
    return made[0] if alone else made


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rounding: torch.dtype) -> Tensor:
        ctx.rounding = rounding
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient.to(ctx.rounding).to(gradient), None


def correctness(log: Log, late: Callable[[], bool], chosen: Iterator[Sample]) -> set[str]:
    """Names of the samples that are right."""
    good = set()
    for op, what, given, overrides in chosen:
        if late():
            log.wrong.append("correctness: out of time")
            break
        if TINY and (given["q"].dtype != torch.float32 or given["q"].shape[1] > 70):
            continue
        try:
            good |= {what} if judge(log, op, what, given, overrides) else set()
        except Exception as error:
            line = f"{op} {what}: {' '.join(str(error).split())[-300:]}"
            log(f"none  {line}")
            # A launch that does not fit is no error of the op.
            log.wrong += [] if any(isinstance(x, Launch) for x in overrides.values()) else [line]
    return good


def apart(log: Log) -> None:
    """Sides that are cut out of one projection, and the last tokens of more than 2^31 numbers."""
    dtype = torch.float32 if TINY else torch.bfloat16
    given = placed(scan_given(dtype, T=50, H=4, d=64), DEVICE)
    joined = torch.cat([given[name].flatten(2) for name in ("x", "gate", "q", "k")], dim=-1)
    parts = joined.split([256, 256, 128, 128], dim=-1)
    views = dict(zip(("x", "gate", "q", "k"), (side.unflatten(-1, (-1, 64)) for side in parts), strict=True))
    with kernels():
        same = all(map(torch.equal, rat_scan(**given | views), rat_scan(**given)))
    log.wrong += [] if same else ["rat_scan: sides that lie apart give other results"]
    T, H, d, tail = (4096, 2, 16, 64) if TINY else (2**20 + 4096, 16, 128, 256)
    x, gate = (torch.randn(1, T, H, d, device=DEVICE, dtype=dtype) for _ in range(2))
    q, k = (torch.randn(1, T, 2, d, device=DEVICE, dtype=dtype) for _ in range(2))
    rest: Given = {"gate_bias": torch.zeros(H, d, device=DEVICE), "chunk": 16}
    with kernels(), torch.no_grad():
        turned, key, value, keys, values, _ = rat_scan(q, k, x, gate, **rest)
        last = rat_scan(*(side[:, -tail:] for side in (q, k, x, gate)), **rest)
        same = all(map(torch.equal, (turned[:, -tail:], key[:, -tail:], value[:, -tail:]), last[:3]))
        del x, gate, q, k
        sums: Given = {"keys": keys, "values": values, "chunk": 16}
        out = rat_attention(turned, key, value, **sums)[:, -tail:]
        end = rat_attention(*(side[:, -tail:] for side in (turned, key, value)), **sums, start=T - tail)
    log.wrong += [] if same else ["rat_scan: the last of more than 2^31 numbers are wrong"]
    log.wrong += (
        []
        if (out - end).abs().max() <= 1e-2
        else ["rat_attention: the last of more than 2^31 numbers are wrong"]
    )
    log(f"ok    sides apart and {T * H * d} numbers looked at")


class Rows:
    """Times calls, writes rows, and remembers medians."""

    def __init__(self, log: Log, file: Path, header: Row) -> None:
        self.log, self.file, self.header = log, file, header
        self.most = {"gbps": 1.0, "tflops": 1.0}
        self.ms: dict[tuple[str, ...], float] = {}

    def write(self, row: Row) -> None:
        with self.file.open("a") as out:
            out.write(json.dumps({**self.header, **row}) + "\n")

    def ceilings(self) -> None:
        for row in ceilings(DEVICE):
            self.write(row)
            self.most |= {name: row[name] for name in self.most if row[name]}

    def __call__(
        self, about: tuple[str, str, str], shape: dict[str, int], call: Callable[[], object],
        least: tuple[float, float] | None = None,
    ) -> float:  # fmt: skip
        """`about`: op, impl, phase;  `least`: FLOPs and bytes that there must be"""
        op, impl, phase = about
        first = time.perf_counter()
        call()
        if not TINY:
            torch.cuda.synchronize()
        first = time.perf_counter() - first
        times = timed_in_graph(call) if phase.endswith("_graph") and not TINY else timed(call, DEVICE)
        row: Row = {"op": op, "impl": impl, "phase": phase, "shape": shape, "dtype": "bfloat16", **times}
        row |= {"peak_bytes": _peak(call, DEVICE), "first_call_s": first}
        line = f"{phase:12} {op}: {impl:28} {' '.join(f'{k}={v}' for k, v in shape.items()):44} {times['ms']:9.4f} ms"
        if least is not None:
            flops, size = least
            row |= {"gbps": size / times["ms"] / 1e6, "tflops": flops / times["ms"] / 1e9}
            floor = max(size / self.most["gbps"] / 1e6, flops / self.most["tflops"] / 1e9)
            row |= {"floor_ms": floor, "share": floor / times["ms"]}
            line += f"  floor {floor:.4f} ms ({row['share']:.0%})"
        self.write(row)
        self.log(line)
        self.ms[op, impl, phase, str(shape.get("B"))] = times["ms"]
        return float(times["ms"])

    def attempt(self, *given: Any, **rest: Any) -> None:
        """The same; what cannot be timed is told."""
        try:
            self(*given, **rest)
        except Exception as error:
            self.log(f"none  {given[0]}: {' '.join(str(error).split())[-300:]}")


def op_calls(op: Any, shape: dict[str, int]) -> dict[str, Callable[[], object]]:
    """A forward pass of an op at a shape, and one with all gradients."""
    sample = draw(op, shape, torch.float32 if TINY else torch.bfloat16, initial_state=False, device=DEVICE)
    given: Given = {**sample.arguments, "chunk": shape["chunk"], "start": shape.get("start", 0)}
    if op is rat_scan:
        tokens = given["start"] % shape["chunk"] + shape["T"]
        angles = torch.randn(-(-tokens // shape["chunk"]), shape["K"] // 2, device=DEVICE).repeat(1, 2)
        given["rotation"] = (angles.cos(), angles.sin())
    leaves = given | {name: given[name].requires_grad_() for name in op.cases.differentiable}
    results = op(**leaves)
    upstream = [torch.randn_like(x) for x in (results if isinstance(results, tuple) else (results,))]
    wanted = [leaves[name] for name in op.cases.differentiable]

    def forward() -> object:
        with torch.no_grad():
            return op(**given)

    def both() -> object:
        found = op(**leaves)
        return torch.autograd.grad(found, wanted, upstream, materialize_grads=True)

    return {"fwd": forward, "fwdbwd": both}


def time_ops(rows: Rows, late: Callable[[], bool]) -> None:
    for op in (rat_scan, rat_attention):
        shapes = [dict(one) for one in op.cases.bench_shapes]
        for shape in [{**one, "T": 64, "H": 2, "K": 16} for one in shapes[:1]] if TINY else shapes:
            if late():
                return
            calls, work = op_calls(op, shape), op.cases.work
            assert work is not None
            for phase in ("fwd", "fwdbwd"):
                least = work(shape, phase, 2)
                rows.attempt((op.name, "heddle", phase), shape, calls[phase], (least.flops, least.bytes))


def time_layers(rows: Rows, late: Callable[[], bool]) -> None:
    bench = Bench(64, 4, DEVICE, torch.float32) if TINY else Bench(2048, 16, DEVICE, torch.bfloat16)
    T = 96 if TINY else 102_400
    shape = {"B": 1, "T": T, "D": bench.width, "H": bench.heads}
    u = torch.randn(1, T, bench.width, device=DEVICE, dtype=bench.dtype)
    for impl, layer, run in bench.layers(T):
        for form in ("", ", compiled"):
            if late() or (form and TINY):
                continue
            torch._dynamo.reset()
            # FlexAttention inside of a compiled layer is compiled with it.
            calls = both_ways(layer, torch.compile(run, dynamic=False) if form else run, u)
            for phase in ("fwd", "fwdbwd"):
                least = bench.least(phase, T) if impl == "heddle" else None
                rows.attempt(("rat_layer", impl + form, phase), shape, calls[phase], least)
        layer.to("meta")


@torch.no_grad()
def time_steps(rows: Rows, late: Callable[[], bool]) -> None:
    bench = Bench(64, 4, DEVICE, torch.float32) if TINY else Bench(2048, 16, DEVICE, torch.bfloat16)
    context = 40 if TINY else 4096
    for batch in (1, 32, 256):
        for impl, run in bench.steps(batch, context):
            if late():
                return
            shape = {"B": batch, "T": 1, "start": context, "D": bench.width, "H": bench.heads}
            least = bench.least("decode", batch, context) if impl == "heddle" else None
            for phase in ("decode_graph", "decode"):
                rows.attempt(("rat_layer", impl, phase), shape, run, least)
            if not TINY:
                torch._dynamo.reset()
                whole = torch.compile(run, dynamic=False)
                rows.attempt(("rat_layer", f"{impl}, compiled", "decode_graph"), shape, whole, least)


def sweep(log: Log, rows: Rows, good: set[str], late: Callable[[], bool]) -> None:
    """Times each launch that was right at 1 x 102,400, and the loads of the attention by pointers."""
    for op in (rat_scan, rat_attention):
        shape = dict(op.cases.bench_shapes[1])
        calls, best = op_calls(op, shape), {}
        names = [name for name in TRIED if name.startswith("scan") == (op is rat_scan)]
        for name, tiles in itertools.product(names, (1, 0) if op is rat_attention else (1,)):
            phase = "fwd" if name.endswith("forward") else "fwdbwd"
            for launch in TRIED[name]:
                what = f"{name} {told(launch)}" + (f", descriptors {tiles}" if op is rat_attention else "")
                if what not in good or late():
                    continue
                with tuning(**{name: launch, "descriptors": tiles}):
                    impl = f"heddle, {what}"
                    try:
                        best[impl] = (rows((op.name, impl, phase), shape, calls[phase]), name)
                    except Exception as error:
                        log(f"none  {impl}: {' '.join(str(error).split())[-200:]}")
        for name in names:
            times = [(ms, impl) for impl, (ms, of) in best.items() if of == name]
            log(f"best  {min(times)[0]:.4f} ms {min(times)[1]}" if times else f"best  of {name}: none timed")


def warm(index: int) -> None:
    """Compiles every `WORKERS`th thing that will run, into Triton's cache on disk."""
    for op, what, given, overrides in list(itertools.chain(samples(), launches()))[index::WORKERS]:
        try:
            with tuning(**overrides), kernels():
                results(op, REFERENCES[op][0], placed(given, DEVICE))
        except Exception as error:
            print(f"{op} {what}: {' '.join(str(error).split())[-200:]}", flush=True)


def summary(log: Log, rows: Rows) -> None:
    """Layers beside each other: milliseconds, and how many times that of ours."""
    for phase, batch in (("fwd", "1"), ("fwdbwd", "1"), *(("decode_graph", B) for B in ("1", "32", "256"))):
        found = {
            impl: ms
            for (op, impl, what, B), ms in rows.ms.items()
            if (op, what, B) == ("rat_layer", phase, batch)
        }
        ours = min((ms for impl, ms in found.items() if impl.startswith("heddle")), default=None)
        if ours is not None:
            line = "; ".join(f"{impl} {ms:.4f} ({ms / ours:.2f})" for impl, ms in found.items())
            log(f"{phase} B={batch}: {line}")


def table(file: Path) -> str:
    """The rows of layers as a table for docs/performance.md: milliseconds, and how many times that of the faster of ours."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in map(json.loads, file.read_text().splitlines()):
        if row["op"] == "rat_layer" and row["phase"] != "decode":
            key = (row["phase"], " ".join(f"{name} {size}" for name, size in row["shape"].items()))
            found.setdefault(key, {})[row["impl"]] = row
    lines = [
        "| phase | shape | layer | ms | ratio | share of floor | peak, GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for (phase, shape), impls in found.items():
        ours = min(
            (row["ms"] for impl, row in impls.items() if impl.startswith("heddle")), default=float("nan")
        )
        for impl, row in impls.items():
            share = f"{row['share']:.0%}" if "share" in row else ""
            peak = (row["peak_bytes"] or 0) / 1e9
            lines.append(
                f"| {phase} | {shape} | {impl} | {row['ms']:.4f} | {row['ms'] / ours:.2f} | {share} | {peak:.2f} |"
            )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--budget", type=float, default=560.0, help="seconds after which nothing new is begun"
    )
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the log and the rows")
    parser.add_argument("--commit", help="what the code is")
    parser.add_argument("--tiny", action="store_true", help="small, on a CPU, without the kernels")
    parser.add_argument("--skip", nargs="*", default=[])
    parser.add_argument("--warm", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--table", type=Path, help="print the table of a file of rows, and nothing else")
    chosen = parser.parse_args()
    if chosen.table is not None:
        print(table(chosen.table))
        return 0
    if chosen.warm is not None:
        warm(chosen.warm)
        return 0
    chosen.out.mkdir(parents=True, exist_ok=True)
    begin, log = time.monotonic(), Log(chosen.out / "rat_check.log")
    rows = Rows(log, chosen.out / "evidence-rat.jsonl", {**machine(DEVICE), "commit": chosen.commit})
    good: set[str] = set()

    def late(share: float) -> Callable[[], bool]:
        return lambda: time.monotonic() - begin > share * chosen.budget

    def warm_up() -> None:
        command = [sys.executable, __file__, "--warm"]
        for process in [subprocess.Popen([*command, str(index)]) for index in range(WORKERS)]:
            process.wait()

    steps: dict[str, Callable[[], object]] = {
        "warm": warm_up,
        "forms": lambda: correctness(log, late(0.45), samples()),
        "apart": lambda: apart(log),
        "launches": lambda: good.update(correctness(log, late(0.55), launches())),
        "ceilings": rows.ceilings,
        "ops": lambda: time_ops(rows, late(0.65)),
        "layers": lambda: time_layers(rows, late(0.85)),
        "steps": lambda: time_steps(rows, late(0.95)),
        "sweep": lambda: sweep(log, rows, good, late(1.0)),
    }
    for name, run in steps.items():
        if name in chosen.skip or (TINY and name in ("warm", "ceilings", "launches", "sweep")):
            continue
        with nullcontext() if name in ("warm", "forms", "apart", "launches") else kernels():
            try:
                run()
            except Exception as error:
                log.wrong.append(f"{name}: {' '.join(str(error).split())[-400:]}")
        log(f"{name} done after {time.monotonic() - begin:.0f} s")
    summary(log, rows)
    for line in (*log.wrong, f"{len(log.wrong)} wrong, {time.monotonic() - begin:.0f} s"):
        log(line)
    return 1 if log.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
