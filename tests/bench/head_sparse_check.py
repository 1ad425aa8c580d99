"""One call on a GPU machine: head_sparse_attention against float64, its launches, and its time beside dense attention by cuDNN.

    python tests/bench/head_sparse_check.py --out "$OUT" --budget 500 --commit "$(git rev-parse --short=12 HEAD)"
    python tests/bench/head_sparse_check.py --only sums --out "$OUT" --budget 90 --commit "$(git rev-parse --short=12 HEAD)"
    python tests/bench/head_sparse_check.py --only graph --out "$OUT" --budget 200 --commit "$(git rev-parse --short=12 HEAD)"
    TRITON_INTERPRET=1 python tests/bench/head_sparse_check.py --out /tmp/tiny --budget 60 --commit none --tiny

Compiles side by side first, then checks every dtype and form against masked softmax in float64, twice, the second time with fresh
memory full of NaN, and each launch before its time. Times the op with lists and all, the lists alone, and a whole moh layer,
with the launches of the table and with the best ones, beside dense attention and its layer. Of 16 heads 8 are chosen at random.
`sums`: gradients of keys that load sums of queries by descriptors, held and timed, and nothing else. `graph`: router and op in a
CUDA graph and compiled (routed_heads.py), and nothing else.
Writes head_sparse_check.log and rows to evidence-head-sparse-attention.jsonl; exits with 1 if anything was wrong. `--tiny` tries
the script itself on a CPU, with interpreted kernels.
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
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_check import Log
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from window_check import compare

from heddle.compose.cache import Call
from heddle.compose.init import initialise
from heddle.compose.modules.layer import make_mixer
from heddle.compose.modules.site import Site
from heddle.kernels import force_path
from heddle.kernels.bench import Row, ceilings, machine, timed, timed_in_graph
from heddle.kernels.common.tuning import tuning
from heddle.kernels.configs.launch import Launch
from heddle.kernels.dense_attention import dense_attention_reference
from heddle.kernels.head_sparse_attention import head_sparse_attention
from heddle.specs import MIXERS
from heddle.specs import Site as SpecSite

Given = dict[str, Any]
Late = Callable[[], bool]
WORKERS, ON_GPU = 12, torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
HALF = torch.bfloat16 if ON_GPU else torch.float32
DTYPES = (torch.bfloat16, torch.float16, torch.float32) if ON_GPU else (torch.float32,)
WANTED = ("q", "k", "v", "weights")
GROUPED = {"B": 2, "H": 8, "N": 2, "T": 1000, "S": 1500, "K": 128, "V": 128, "active": 3}
PLAIN = {"B": 1, "H": 16, "N": 16, "T": 1000, "S": 1000, "K": 128, "V": 128, "active": 8}
STEP = {**GROUPED, "B": 3, "T": 1}
SIZES = ((64, 64), (192, 128), (256, 256), (100, 72))
LENGTHS = (1, 63, 64, 65)
SHAPES = tuple(dict(one) for one in head_sparse_attention.cases.bench_shapes)
STEPS = tuple(dict(one) for one in head_sparse_attention.cases.decode_shapes)
TRIED = {
    "forward": (
        Launch(128, 64, 8, 2, 128), Launch(128, 64, 8, 3), Launch(128, 128, 8, 2), Launch(128, 128, 8, 3),
        Launch(64, 64, 4, 3), Launch(64, 64, 4, 2), Launch(64, 128, 4, 2), Launch(128, 64, 8, 2), Launch(128, 32, 8, 3, 128),
        Launch(128, 64, 4, 3),
    ),
    "queries": (
        Launch(128, 64, 8, 2), Launch(128, 64, 8, 3), Launch(64, 64, 4, 2), Launch(64, 64, 4, 3), Launch(128, 32, 8, 3),
        Launch(128, 32, 8, 2, 128), Launch(64, 32, 4, 3), Launch(64, 32, 4, 3, 168), Launch(128, 128, 8, 1),
    ),
    "keys": (
        Launch(64, 128, 8, 2), Launch(64, 128, 8, 3), Launch(64, 128, 8, 1), Launch(32, 128, 8, 2), Launch(32, 128, 8, 3),
        Launch(32, 64, 4, 2), Launch(64, 64, 4, 2), Launch(32, 64, 4, 3), Launch(32, 64, 4, 2, 168), Launch(16, 128, 8, 3),
    ),
}  # fmt: skip


BY_SUMS: tuple[dict[str, Any], ...] = (
    {}, {"sums": 1}, {"sums": 1, "keys": Launch(32, 64, 4, 4)}, {"sums": 1, "keys": Launch(32, 64, 4, 3)},
)  # fmt: skip


def tiny() -> None:
    """Sizes that a CPU interprets in seconds."""
    global BY_SUMS, LENGTHS, SHAPES, SIZES, STEPS, TRIED
    for shape in (GROUPED, PLAIN, STEP):
        shape.update(
            {"B": 1, "H": 4, "N": 2, "K": 16, "V": 16, "active": 2, "S": 40, "T": min(shape["T"], 40)}
        )
    GROUPED["T"], LENGTHS, SIZES = 33, (1, 63), ((16, 24),)
    SHAPES, STEPS = ({**PLAIN, "N": 4},), (dict(STEP),)
    TRIED = {name: (Launch(16, 16, 4, 1), Launch(32, 16, 4, 1)) for name in TRIED}
    BY_SUMS = ({"sums": 1},)


def routed_shapes() -> tuple[dict[str, int], ...]:
    """Those with a router, which of one shared head would have no weights for it."""
    few = {"H": 8, "N": 8, "active": 4}
    return SHAPES if ON_GPU else tuple(one | few for one in SHAPES)


def drawn(shape: dict[str, int], dtype: torch.dtype | None = None, **rest: Any) -> Given:
    """Arguments by name, q, k and v rounded to `dtype`."""
    inputs = head_sparse_attention.cases.inputs(shape, torch.Generator(DEVICE).manual_seed(0))
    sides = {name: x.to(HALF if dtype is None else dtype) for name, x in inputs.items() if name != "weights"}
    return {**sides, "weights": inputs["weights"].float(), **rest}


def uneven(given: Given) -> Given:
    """The first head is chosen by all, the last one by nobody, one of the others by neighbours alone."""
    weights = given["weights"].clone()
    weights[..., 0], weights[..., -1], weights[:, ::3, 1] = 1.5, 0.0, 0.0
    weights[:, weights.shape[1] // 2 :, 2] = 0.0
    return {**given, "weights": weights}


def samples() -> Iterator[tuple[str, Given, dict[str, Any]]]:
    """What is checked: a name, arguments, and overrides."""
    T, S = PLAIN["T"], GROUPED["S"]
    real = torch.rand(2, S, device=DEVICE) > 0.3
    bounds = torch.tensor([0, 1, T // 8, T // 8, T * 2 // 3, T], device=DEVICE)
    for dtype in DTYPES:
        yield f"{dtype} grouped", drawn(GROUPED, dtype), {}
        yield f"{dtype} uneven", uneven(drawn(PLAIN, dtype)), {}
        yield f"{dtype} by pointers", uneven(drawn(PLAIN, dtype)), {"descriptors": 0}
        yield f"{dtype} in two loops", drawn(PLAIN, dtype), {"apart": 1}
        yield f"{dtype} packed", drawn(PLAIN, dtype, cu_seqlens=bounds), {}
        yield f"{dtype} padded", drawn({**GROUPED, "B": 2}, dtype, real=real), {}
        for splits in (1, 3):
            yield f"{dtype} step in {splits}", drawn(STEP, dtype), {"splits": splits}
        for length in LENGTHS:
            yield f"{dtype} T={length}", drawn({**PLAIN, "T": length, "S": max(length, 9)}, dtype), {}
        for K, V in SIZES if dtype == HALF else SIZES[1:2]:
            yield f"{dtype} {K} {V}", drawn({**GROUPED, "K": K, "V": V}, dtype), {}
    for name, weight in (("nobody", 0.0), ("all", 1.0)):
        given = drawn(PLAIN)
        yield name, {**given, "weights": torch.full_like(given["weights"], weight)}, {}


def exact_of(*, q: Tensor, k: Tensor, v: Tensor, weights: Tensor, **limits: Any) -> Tensor:
    """All logits in float64, and a mask."""
    query = torch.arange(k.shape[2] - q.shape[2], k.shape[2], device=DEVICE)[:, None]
    key, bounds, real = torch.arange(k.shape[2], device=DEVICE), limits.get("cu_seqlens"), limits.get("real")
    seen = key <= query
    if bounds is not None:
        own = torch.searchsorted(bounds[1:], key, right=True)
        seen = seen & (own == own[query])
    mask = seen[None, None] if real is None else (seen & (real[:, None, None] | (key == query)))
    out = dense_attention_reference(q, k, v, mask)
    return torch.where(weights.mT[..., None] != 0, out * weights.mT[..., None], 0.0)


def results(function: Callable[..., Tensor], given: Given, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output and gradients in this dtype (of weights in float32 at least), heads behind time."""
    wide = torch.promote_types(dtype, torch.float32)
    there = {
        **given,
        **{
            name: given[name].detach().to(wide if name == "weights" else dtype).requires_grad_()
            for name in WANTED
        },
    }
    out = function(**there)
    upstream = torch.randn(out.shape, generator=torch.Generator(DEVICE).manual_seed(7), device=DEVICE)
    upstream = upstream.to(given["q"].dtype).to(out)
    found = torch.autograd.grad(out, [there[name] for name in WANTED], upstream)
    named = {"out": out.detach(), **dict(zip(WANTED, found, strict=True))}
    return {name: x[..., None] if name == "weights" else x.transpose(1, 2) for name, x in named.items()}


@contextmanager
def spoilt_memory() -> Iterator[None]:
    """Fresh memory is full of NaN, of integers far too large, inside."""
    make = torch.empty

    def spoilt(*args: Any, **rest: Any) -> Tensor:
        made = make(*args, **rest)
        return made.fill_(float("nan") if made.is_floating_point() else 1 << 30)

    torch.empty = spoilt
    try:
        yield
    finally:
        torch.empty = make


def judge(log: Log, what: str, given: Given, exact: dict[str, Tensor], **overrides: Any) -> bool:
    dtype, before = given["q"].dtype, len(log.wrong)
    with tuning(**overrides), force_path("triton"):
        found = results(head_sparse_attention, given, dtype)
        with spoilt_memory():
            again = results(head_sparse_attention, given, dtype)
    if not all(torch.equal(found[name], again[name]) for name in found):
        log.wrong.append(f"{what}: two runs differ, or fresh memory is read")
    with force_path("torch"):
        plain = results(head_sparse_attention, given, dtype)
    if not given["weights"].any():
        # What is 0 has no relative error.
        log.wrong += [f"{what}: {name} is not 0" for name, x in found.items() if x.ne(0).any()]
    else:
        compare(log, what, found=found, plain=plain, exact=exact)
    return len(log.wrong) == before


def correctness(log: Log, late: Late) -> None:
    for what, given, overrides in samples():
        if late():
            log.wrong.append(f"correctness: out of time before {what}")
            return
        try:
            judge(log, what, given, results(exact_of, given, torch.float64), **overrides)
        except Exception as error:
            log.wrong.append(f"{what}: {' '.join(str(error).split())[-300:]}")


def ours(**given: Any) -> Tensor:
    with force_path("triton"):
        return head_sparse_attention(**given)


def cudnn(*, q: Tensor, k: Tensor, v: Tensor, weights: Tensor) -> Tensor:  # noqa: ARG001
    """All heads, by torch's backend of that name; on a CPU by whatever there is."""
    call = partial(scaled_dot_product_attention, q, k, v, is_causal=q.shape[2] > 1)
    if not ON_GPU:
        return call()
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return call()


def phases(function: Callable[..., Tensor], given: Given, *wanted: str) -> dict[str, Callable[[], object]]:
    """A call forward, and one forward and backward."""
    leaves = {**given, **{name: given[name].detach().requires_grad_() for name in wanted}}
    upstream = torch.randn_like(given["q"])[..., : given["v"].shape[3]]

    def forward() -> object:
        with torch.no_grad():
            return function(**given)

    def both() -> object:
        return torch.autograd.grad(function(**leaves), [leaves[name] for name in wanted], upstream)

    return {"fwd": forward, "fwdbwd": both}


def work(shape: dict[str, int], phase: str) -> float:
    """FLOP of the heads that are chosen: two products forward, five backward; of a step the bytes of their keys and values."""
    if phase == "decode_graph":
        return 1.0 * shape["B"] * shape["S"] * shape["active"] * (shape["K"] + shape["V"]) * HALF.itemsize
    pairs = shape["T"] * (shape["S"] - (shape["T"] - 1) / 2) * shape["B"] * shape["active"]
    return 2.0 * pairs * (shape["K"] + shape["V"]) * (3.5 if phase == "fwdbwd" else 1.0)


@dataclass
class Bench:
    """Times calls, writes rows, and keeps the times by (impl, phase, length)."""

    log: Log
    file: Path
    header: Row
    tflops: float = 0.0
    gbps: float = 0.0
    times: dict[tuple[str, str, int], float] = field(default_factory=dict)

    def __call__(self, impl: str, phase: str, shape: dict[str, int], call: Callable[[], object]) -> float:
        """The time, or infinity where it does not run."""
        try:
            call()
            found = timed_in_graph(call) if phase == "decode_graph" and ON_GPU else timed(call, DEVICE)
        except Exception as error:
            self.log(f"none  {impl} {phase} {shape}: {' '.join(str(error).split())[-160:]}")
            return float("inf")
        about: Row = {
            "op": "head_sparse_attention",
            "impl": impl,
            "phase": phase,
            "shape": shape,
            "dtype": str(HALF).removeprefix("torch."),
        }
        if phase in ("fwd", "fwdbwd") and "hidden" not in shape and impl != "lists":
            done = {**shape, "active": shape["H"]} if impl == "cudnn" else shape
            about["tflops"] = work(done, phase) / found["ms"] / 1e9
        with self.file.open("a") as file:
            file.write(json.dumps({**self.header, **about, **found}) + "\n")
        sizes = " ".join(f"{name}={shape[name]}" for name in ("B", "T", "S", "hidden") if name in shape)
        self.log(f"{phase:12} {sizes:32} {found['ms']:9.4f} ms  {impl}")
        self.times[impl, phase, shape["T"] * shape["B"] + shape["S"]] = float(found["ms"])
        return float(found["ms"])


def speed(bench: Bench, late: Late, name: str, best: dict[str, Any]) -> None:
    """Dense attention of all heads, the op, and its lists alone."""
    from heddle.kernels._head_sparse_attention_launch import make_lists

    for shape in SHAPES:
        if late():
            bench.log("speed: out of time")
            return
        given = drawn(shape)
        rivals = phases(cudnn, given, *WANTED[:3])
        with tuning(**best):
            for phase, call in phases(ours, given, *WANTED).items():
                if ("cudnn", phase, shape["T"] * shape["B"] + shape["S"]) not in bench.times:
                    bench("cudnn", phase, shape, rivals[phase])
                bench(name, phase, shape, call)
        if not best:
            bench("lists", "fwd", shape, partial(make_lists, given["weights"]))
    for shape in STEPS if not best and not late() else ():
        given = drawn(shape)
        for impl, function in (("cudnn", cudnn), (name, ours)):
            bench(impl, "decode_graph", shape, phases(function, given)["fwd"])
        for splits in (1, 4, 16, 32):
            with tuning(splits=splits):
                bench(f"heddle, in {splits} parts", "decode_graph", shape, phases(ours, given)["fwd"])


def sweep(bench: Bench, late: Late) -> dict[str, Any]:
    """Each launch on the first shape: whether it is right, and its time; the best ones, then those by pointers."""
    small, shape, log, best = drawn(PLAIN), SHAPES[0], bench.log, dict[str, Any]()
    exact, calls = results(exact_of, small, torch.float64), phases(ours, drawn(SHAPES[0]), *WANTED)

    def attempt(name: str, overrides: dict[str, Any]) -> float:
        what, phase = f"{name} {overrides}", "fwd" if name in ("forward", "apart") else "fwdbwd"
        try:
            if not judge(log, what, small, exact, **overrides):
                return float("inf")
        except Exception as error:
            log(f"none  {what}: {' '.join(str(error).split())[-200:]}")
            return float("inf")
        with tuning(**overrides):
            return bench(f"heddle, {what}", phase, shape, calls[phase])

    for name, launches in TRIED.items():
        options = ({"apart": apart} for apart in (0, 1)) if name == "forward" else ({},)
        every = itertools.product(options, launches)
        tried = [{**best, name: launch, **more} for more, launch in every]
        found = [(attempt(name, one), number, one) for number, one in enumerate(tried) if not late()]
        if found and min(found)[0] < float("inf"):
            best = min(found)[2]
            log(f"best  {min(found)[0]:.4f} ms {best}")
    if not late():
        attempt("forward", {**best, "descriptors": 0})
        attempt("keys", {**best, "descriptors": 0})
    return best


def sums(bench: Bench, late: Late) -> None:
    """Log-sum-exp and delta by descriptors, with a few launches of the kernel of keys: whether it is right, and its time."""
    forms = [one for one in samples() if one[1]["q"].shape[2] % 4 == 0 and not one[2]]
    held = [(what, given, results(exact_of, given, torch.float64)) for what, given, _ in forms]
    for overrides in BY_SUMS:
        named, right = f"sums {overrides}", True
        for what, given, exact in held:
            if late():
                bench.log("sums: out of time")
                return
            # Launches are those of two bytes and heads of up to 128.
            is_large = given["q"].dtype == torch.float32 or given["q"].shape[3] > 128
            if "keys" in overrides and is_large and ON_GPU:
                continue
            try:
                right = judge(bench.log, f"{named}, {what}", given, exact, **overrides) and right
            except Exception as error:
                right = False
                bench.log.wrong.append(f"{named}, {what}: {' '.join(str(error).split())[-200:]}")
        for shape in SHAPES if right else ():
            call = phases(ours, drawn(shape), *WANTED)["fwdbwd"]
            with tuning(**overrides):
                bench(f"heddle, {named}" if overrides else "heddle", "fwdbwd", shape, call)
    for shape in SHAPES:
        bench("cudnn", "fwdbwd", shape, phases(cudnn, drawn(shape), *WANTED[:3])["fwdbwd"])


def layers(bench: Bench, late: Late, best: dict[str, Any]) -> None:
    """A whole moh layer, 4 heads shared and 4 of 12 active, beside the same with all heads computed and a dense layer."""
    for shape in SHAPES:
        if late():
            return
        hidden = shape["H"] * shape["K"]
        inner = {"kind": "attention", "heads": shape["H"], "kv_heads": shape["N"], "head_dim": shape["K"]}
        shared = shape["H"] // 4
        moh = {"kind": "moh", "mixer": inner, "shared_heads": shared, "active": shape["active"] - shared}
        x = torch.randn(shape["B"], shape["T"], hidden, device=DEVICE, dtype=HALF)
        places = torch.arange(shape["T"], device=DEVICE).expand(shape["B"], -1)
        told = {**shape, "hidden": hidden}
        for impl, fields, path in (
            ("layer, dense", inner, "torch"), ("layer, moh", moh, "triton"), ("layer, moh, all heads", moh, "torch"),
        ):  # fmt: skip
            layer = mixer_of(hidden, fields)

            def forward(layer: Any = layer, x: Tensor = x, places: Tensor = places) -> Tensor:
                y: Tensor = layer(x, Call(places))
                return y

            def both(layer: Any = layer, forward: Callable[[], Tensor] = forward) -> object:
                y = forward()
                return torch.autograd.grad(y, [*layer.parameters()], torch.ones_like(y))

            with force_path(path), tuning(**best if path == "triton" else {}):
                with torch.no_grad():
                    bench(impl, "fwd", told, forward)
                bench(impl, "fwdbwd", told, both)
            if fields is moh and path == "triton":
                with torch.no_grad():
                    bench(
                        "router",
                        "fwd",
                        told,
                        lambda layer=layer, x=x, places=places: layer.gates(x, Call(places)),
                    )


def mixer_of(hidden: int, fields: dict[str, Any]) -> Any:
    spec = MIXERS[fields["kind"]].model_validate(fields)
    made = make_mixer(Site(hidden, 1, 3), spec.runtime(SpecSite(hidden, 1, 3)))
    for module in made.modules():
        initialise(module, std=hidden**-0.5)
    return made.to(DEVICE, HALF).train()


def told(bench: Bench) -> Iterator[str]:
    """Ratios to dense attention, and shares of the floor that FLOP (of a step bytes) set at the measured ceiling."""
    rivals = {"layer, moh": "layer, dense", "layer, moh, all heads": "layer, dense"}
    for (impl, phase, size), ms in bench.times.items():
        is_layer = impl.startswith("layer")
        dense = bench.times.get((rivals.get(impl, "" if is_layer else "cudnn"), phase, size))
        if dense is None or "Launch" in impl or impl in ("cudnn", "lists", "router"):
            continue
        shape = next(one for one in (*SHAPES, *STEPS) if one["T"] * one["B"] + one["S"] == size)
        line = f"{impl:22} {phase:12} {shape['B']:2} x {shape['S']:6} {ms:9.4f} ms, dense {dense:9.4f}, ratio {dense / ms:.2f}"
        if not is_layer:
            floor = work(shape, phase) / (1e6 * bench.gbps if phase == "decode_graph" else 1e9 * bench.tflops)
            line += f", floor {floor:.4f}, share {floor / ms:.2f}"
        yield line


def warm(index: int, only: str | None) -> None:
    """Compiles every `WORKERS`th thing that will run, into Triton's cache on disk."""
    if only == "graph":
        from routed_heads import warm as warm_routers

        warm_routers(routed_shapes(), index, WORKERS)
        return
    small = drawn(PLAIN)
    things = [*samples()]
    things += [("", small, {name: one}) for name, launches in TRIED.items() for one in launches]
    things += [("", small, {"forward": one, "apart": 1}) for one in TRIED["forward"]]
    if only == "sums":
        things = [
            (what, given, overrides) for overrides in BY_SUMS for what, given, more in samples() if not more
        ]
    for _, given, overrides in things[index::WORKERS]:
        try:
            with tuning(**overrides), force_path("triton"):
                results(head_sparse_attention, given, given["q"].dtype)
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
    parser.add_argument("--tiny", action="store_true", help="try the script itself")
    parser.add_argument("--only", choices=["sums", "graph"], help="this part, and nothing else")
    parser.add_argument("--warm", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.tiny:
        tiny()
    if chosen.warm is not None:
        warm(chosen.warm, chosen.only)
        return 0
    chosen.out.mkdir(parents=True, exist_ok=True)
    begin, log = time.monotonic(), Log(chosen.out / "head_sparse_check.log")
    header = {**machine(DEVICE), "commit": chosen.commit}
    bench = Bench(log, chosen.out / "evidence-head-sparse-attention.jsonl", header)

    def late(share: float) -> Late:
        return lambda: time.monotonic() - begin > share * chosen.budget

    def done(what: str) -> None:
        log(f"{what} done after {time.monotonic() - begin:.0f} s")

    if ON_GPU:
        command = [sys.executable, __file__, *(["--only", chosen.only] if chosen.only else []), "--warm"]
        for process in [subprocess.Popen([*command, str(index)]) for index in range(WORKERS)]:
            process.wait()
    done("warm")
    bench.gbps, bench.tflops = (float(row["gbps"] or row["tflops"]) for row in ceilings(DEVICE))
    best = dict[str, Any]()
    if chosen.only == "graph":
        from routed_heads import graph, lines

        graph(bench, late(1.0), routed_shapes())
        for line in lines(bench, routed_shapes()):
            log(line)
    elif chosen.only == "sums":
        sums(bench, late(1.0))
    else:
        correctness(log, late(0.65))
        done("correctness")
        speed(bench, late(0.75), "heddle", {})
        done("speed")
        best = sweep(bench, late(0.9))
        done("sweep")
        speed(bench, late(0.97), "heddle, best launches", best)
        layers(bench, late(1.0), best)
    log(f"ceilings: {bench.tflops:.0f} TFLOP/s, {bench.gbps:.0f} GB/s")
    ratios = () if chosen.only == "graph" else told(bench)
    for line in (*ratios, f"best launches: {best}", *log.wrong):
        log(line)
    log(f"{len(log.wrong)} wrong, {time.monotonic() - begin:.0f} s")
    return 1 if log.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
