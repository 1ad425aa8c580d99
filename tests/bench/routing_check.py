"""One call on a GPU machine: span_attention against float64, its launches, its time beside plain torch and dense attention.

    python tests/bench/routing_check.py --out "$OUT" --budget 170 --commit "$(git rev-parse --short=12 HEAD)"
    TRITON_INTERPRET=1 python tests/bench/routing_check.py --out /tmp/tiny --budget 60 --commit none --tiny

Compiles side by side first, then checks every dtype and form against masked softmax in float64, twice, the second time with fresh
memory full of NaN, and that later tokens change no bit; each launch before its time, of a step at full size and in a process of
their own, which may end. Times the op on clusters by chance, of which a token sees 127 members, and a whole routing layer,
beside dense attention by cuDNN and its layer; peak memory at 65,536 tokens. Writes routing_check.log and rows to
evidence-routing.jsonl; exits with 1 if anything was wrong. `--tiny` tries the script itself on a CPU, with interpreted kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_check import Log
from head_sparse_check import mixer_of, phases, spoilt_memory
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from window_check import compare

from heddle.compose.cache import Call
from heddle.compose.modules.clusters import Members
from heddle.kernels import force_path
from heddle.kernels.bench import Row, ceilings, machine, timed, timed_in_graph
from heddle.kernels.common.tuning import tuning
from heddle.kernels.configs.launch import Launch
from heddle.kernels.span_attention import TILE, span_attention

Given = dict[str, Any]
Late = Callable[[], bool]
WORKERS, ON_GPU = 12, torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
HALF = torch.bfloat16 if ON_GPU else torch.float32
DTYPES = (torch.bfloat16, torch.float16, torch.float32) if ON_GPU else (torch.float32,)
WANTED = ("q", "k", "v", "own")
# `kept`: keys from before; `clusters`: 0 for a window to both sides.
MAIN = {"B": 2, "H": 3, "T": 1000, "kept": 0, "K": 128, "V": 128, "width": 127, "clusters": 5}
STEP = {"B": 32, "H": 16, "T": 1, "kept": 8192, "K": 128, "V": 128, "width": 127, "clusters": 64}
SIZES, LENGTHS = ((64, 64), (192, 128), (256, 256), (100, 72)), (1, 16, 63, 65)
SHAPES = tuple({**one, "kept": 0} for one in span_attention.cases.bench_shapes)
LONGEST = {**SHAPES[-1], "T": 65_536}
TRIED = {
    "forward": (
        Launch(64, 64, 4, 2), Launch(64, 64, 4, 3), Launch(128, 64, 8, 2), Launch(128, 64, 8, 3), Launch(128, 64, 4, 2),
        Launch(64, 32, 4, 3), Launch(64, 64, 4, 1),
    ),
    "queries": (
        Launch(64, 64, 4, 2), Launch(64, 64, 4, 3), Launch(64, 64, 8, 2), Launch(128, 64, 8, 2), Launch(64, 32, 4, 2),
        Launch(64, 64, 4, 1),
    ),
    "keys": (
        Launch(64, 64, 4, 2), Launch(64, 64, 4, 1), Launch(32, 64, 4, 2), Launch(64, 64, 8, 2), Launch(32, 64, 4, 3),
        Launch(128, 64, 8, 1),
    ),
}  # fmt: skip
# Nothing is loaded ahead in the first ones.
STEPS: tuple[Launch, ...] = (
    Launch(16, 32, 4, 1), Launch(16, 64, 4, 1), Launch(16, 32, 4, 2), Launch(16, 64, 4, 2), Launch(16, 16, 4, 2),
    Launch(16, 32, 2, 2), Launch(16, 64, 8, 2), Launch(16, 32, 4, 3),
)  # fmt: skip


def tiny() -> None:
    """Sizes that a CPU interprets in seconds."""
    global LENGTHS, LONGEST, SHAPES, SIZES, STEPS, TRIED
    MAIN.update(B=1, H=2, T=80, K=16, V=16, width=20, clusters=2)
    STEP.update(B=1, H=2, kept=60, K=16, V=16, width=20, clusters=3)
    LENGTHS, SIZES, SHAPES, LONGEST = (1, 33), ((20, 12),), ({**MAIN, "B": 2},), {**MAIN, "T": 160}
    TRIED = {name: (Launch(16, 32, 4, 1), Launch(32, 16, 4, 1)) for name in TRIED}
    STEPS = STEPS[:2]


def drawn(shape: dict[str, int], dtype: torch.dtype | None = None) -> Given:
    """Arguments by name; of clusters some keys are no members."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    B, H, T, S, width = (
        *(shape[name] for name in ("B", "H", "T")), shape["kept"] + shape["T"], shape["width"]
    )  # fmt: skip
    sides = {"q": (T, shape["K"]), "k": (S, shape["K"]), "v": (S, shape["V"]), "own": (T, shape["V"])}
    # As projections leave them: in memory with time before heads.
    made: Given = {
        name: torch.randn(B, length, H, size, generator=generator, device=DEVICE)
        .to(HALF if dtype is None else dtype)
        .transpose(1, 2)
        for name, (length, size) in sides.items()
    }
    if not shape["clusters"]:
        place, reach = torch.arange(T, device=DEVICE).expand(B, H, -1), (width - 1) // 2
        first = (place - reach).clamp(min=0, max=max(0, T - width))
        return {**made, "order": place, "first": first, "last": (first + width).clamp(max=T), "width": width}
    z = torch.randint(shape["clusters"], (B, H, S), generator=generator, device=DEVICE)
    is_member = torch.rand(B, H, S, generator=generator, device=DEVICE) > (0.1 if S < 2048 else 0.0)
    return {**made, **spans_of(z, is_member, shape)}


def spans_of(z: Tensor, is_member: Tensor, shape: dict[str, int]) -> Given:
    members = Members(z, is_member, shape["clusters"] + 1, tile=1 if shape["T"] == 1 else TILE)
    first, last, queries = members.spans(z[..., shape["kept"] :], shape["width"])
    return {"order": members.order, "first": first, "last": last, "queries": queries, "width": shape["width"]}


def samples() -> Iterator[tuple[str, Given, dict[str, Any]]]:
    """What is checked: a name, arguments, and overrides."""
    for dtype in DTYPES:
        yield f"{dtype} clusters", drawn(MAIN, dtype), {}
        yield f"{dtype} many small clusters", drawn({**MAIN, "clusters": 60}, dtype), {}
        yield f"{dtype} one cluster, all seen", drawn({**MAIN, "clusters": 1, "width": MAIN["T"]}, dtype), {}
        yield f"{dtype} past", drawn({**MAIN, "kept": 300}, dtype), {}
        yield f"{dtype} window", drawn({**MAIN, "clusters": 0}, dtype), {}
        yield f"{dtype} step", drawn({**STEP, "B": 2, "kept": min(STEP["kept"], 600)}, dtype), {}
        weight = torch.ones(MAIN["B"], MAIN["T"], device=DEVICE)
        yield f"{dtype} bias", {**drawn(MAIN, dtype), "weight": weight}, {}
        for length in LENGTHS:
            yield f"{dtype} T={length}", drawn({**MAIN, "T": length}, dtype), {}
        for K, V in SIZES if dtype == HALF else SIZES[-1:]:
            yield f"{dtype} {K} {V}", drawn({**MAIN, "K": K, "V": V}, dtype), {}


def exact_of(
    *, q: Tensor, k: Tensor, v: Tensor, order: Tensor, first: Tensor, last: Tensor, own: Tensor, **rest: Any
) -> Tensor:
    """All logits in float64, and a mask."""
    B, H, S, N = *k.shape[:3], order.shape[2]
    index = torch.where(order >= 0, order, S)
    slots = torch.arange(N, device=DEVICE).expand(B, H, -1)
    slot = torch.full((B, H, S + 1), -1, device=DEVICE).scatter(2, index, slots)[:, :, None, :S]
    seen = (slot >= first[..., None]) & (slot < last[..., None])
    logits = q @ k.mT * q.shape[3] ** -0.5
    if rest.get("weight") is not None:
        bias = rest["weight"][:, None, None]
        logits = logits + (bias - bias.detach())
    some = seen.any(-1, keepdim=True)
    p = torch.softmax(logits.masked_fill(~seen & some, -torch.inf), dim=-1)
    return torch.where(some, p @ v, own)


def results(function: Callable[..., Tensor], given: Given, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output and gradients in this dtype, heads behind time; of a bias, by key."""
    wanted = [*WANTED, *(["weight"] if given.get("weight") is not None else [])]
    wide = torch.promote_types(dtype, torch.float32)
    leaves = {
        name: given[name].detach().to(wide if name == "weight" else dtype).requires_grad_() for name in wanted
    }
    out = function(**{**given, **leaves})
    upstream = torch.randn(out.shape, generator=torch.Generator(DEVICE).manual_seed(7), device=DEVICE)
    found = torch.autograd.grad(
        out, list(leaves.values()), upstream.to(given["q"].dtype).to(out), materialize_grads=True
    )
    named = {"out": out.detach(), **dict(zip(wanted, found, strict=True))}
    return {name: x[..., None, None] if name == "weight" else x.transpose(1, 2) for name, x in named.items()}


def judge(log: Log, what: str, given: Given, exact: dict[str, Tensor], **overrides: Any) -> bool:
    dtype, before = given["q"].dtype, len(log.wrong)
    with tuning(**overrides), force_path("triton"):
        found = results(span_attention, given, dtype)
        with spoilt_memory():
            again = results(span_attention, given, dtype)
    differ = [name for name in found if not torch.equal(found[name], again[name])]
    if differ:
        log.wrong.append(f"{what}: two runs differ, or fresh memory is read: {differ}")
    with force_path("torch"):
        plain = results(span_attention, given, dtype)
    # What is 0 has no relative error.
    zero = [name for name, x in exact.items() if not x.any()]
    log.wrong += [f"{what}: {name} is not 0" for name in zero if found[name].any()]
    some = {name: x for name, x in exact.items() if name not in zero}
    compare(log, what, found=found, plain=plain, exact=some)
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
    for dtype in DTYPES:
        later_changes_nothing(log, dtype)


def judge_steps(begin: int) -> None:
    """Tells of each step from `begin` on, as large as it is timed, whether it is right; for a process of its own."""
    given = drawn(STEP)
    exact = {"out": exact_of(**{name: x.double() if name in WANTED else x for name, x in given.items()})}
    rival = {"out": plain(**given)}
    for number, launch in [*enumerate(STEPS)][begin:]:
        print(f"step {number} begins", flush=True)
        with tuning(step=launch):
            found = ours(**given)
            with spoilt_memory():
                same = torch.equal(found, ours(**given))
        log = Log(Path(os.devnull))
        named = (
            {name: x.transpose(1, 2) for name, x in one.items()} for one in ({"out": found}, rival, exact)
        )
        right = compare(log, f"step {launch}", **dict(zip(("found", "plain", "exact"), named, strict=True)))
        print(f"step {number} {'right' if right and same else 'wrong'}", flush=True)


def right_steps(log: Log, arguments: list[str]) -> list[Launch]:
    """The launches of a step that are right at full size. What ends the process that tries them does not end this one."""
    verdicts: dict[int, str] = {}
    while (begin := len(verdicts)) < len(STEPS):
        command = [sys.executable, __file__, *arguments, "--steps", str(begin)]
        environment = {**os.environ, "CUDA_LAUNCH_BLOCKING": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        told = [line.split() for line in done.stdout.splitlines() if line.startswith("step ")]
        verdicts |= {int(number): verdict for _, number, verdict in told} or {begin: "not begun"}
        if done.returncode:
            verdicts[max(verdicts)] += f", {' '.join(done.stderr.split())[-300:]}"
    for number, verdict in verdicts.items():
        log(f"{'ok   ' if verdict == 'right' else 'WRONG'} step at full size, {STEPS[number]}: {verdict}")
        log.wrong += [] if verdict == "right" else [f"step {STEPS[number]}: {verdict}"]
    return [STEPS[number] for number, verdict in verdicts.items() if verdict == "right"]


def fastest_step(bench: Bench, launches: list[Launch]) -> dict[str, Launch]:
    """Of those that were right."""
    given, found = drawn(STEP), []
    for number, launch in enumerate(launches):
        with tuning(step=launch):
            call = phases(ours, given)["fwd"]
            found.append((bench(f"heddle, step {launch}", "decode_graph", STEP, call), number))
    return {"step": launches[min(found)[1]]} if found else {}


def later_changes_nothing(log: Log, dtype: torch.dtype, **overrides: Any) -> None:
    """Bits of what was before, when later tokens go to other clusters with other keys."""
    given, generator = drawn(MAIN, dtype), torch.Generator(DEVICE).manual_seed(1)
    shape = (MAIN["B"], MAIN["H"], MAIN["T"])
    z, t = torch.randint(MAIN["clusters"], shape, generator=generator, device=DEVICE), MAIN["T"] * 3 // 5
    other = z.clone()
    other[..., t:] = z[..., t:].flip(-1)
    outs = []
    for one in (z, other):
        sides = {name: given[name].clone() for name in WANTED}
        if one is other:
            for x in sides.values():
                x[:, :, t:] += 1.0
        spans = spans_of(one, torch.ones_like(z, dtype=torch.bool), MAIN)
        with tuning(**overrides), force_path("triton"):
            outs.append(span_attention(**sides, **spans)[:, :, :t])
    most = (outs[0] - outs[1]).abs().max().item()
    # The products of numpy, which interprets, depend on which row of a tile a query is.
    ok = most == 0 if ON_GPU else most < 1e-5
    log(f"{'ok   ' if ok else 'WRONG'} {dtype} later tokens change {most:.1e}")
    log.wrong += [] if ok else [f"{dtype}: later tokens change {most:.1e}"]


def ours(**given: Any) -> Tensor:
    with force_path("triton"):
        return span_attention(**given)


def plain(**given: Any) -> Tensor:
    with force_path("torch"):
        return span_attention(**given)


def dense(*, q: Tensor, k: Tensor, v: Tensor, own: Tensor, **rest: Any) -> Tensor:  # noqa: ARG001
    """Causal attention to all, by torch's cuDNN backend; on a CPU by whatever there is."""
    call = partial(scaled_dot_product_attention, q, k, v, is_causal=q.shape[2] > 1)
    if not ON_GPU:
        return call()
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return call()


@dataclass
class Bench:
    """Times calls, writes rows, and keeps the times by (impl, phase, batch, length)."""

    log: Log
    file: Path
    header: Row
    times: dict[tuple[str, str, int, int], float] = field(default_factory=dict)

    def __call__(self, impl: str, phase: str, shape: dict[str, int], call: Callable[[], object]) -> float:
        """The time, or infinity where it does not run."""
        try:
            call()
            found = timed_in_graph(call) if phase == "decode_graph" and ON_GPU else timed(call, DEVICE)
        except Exception as error:
            self.log(f"none  {impl} {phase} {shape}: {' '.join(str(error).split())[-160:]}")
            return float("inf")
        self.write(impl, phase, shape, found)
        self.log(f"{phase:12} {shape['B']:2} x {shape['T']:6} {found['ms']:9.4f} ms  {impl}")
        self.times[impl, phase, shape["B"], shape["T"]] = float(found["ms"])
        return float(found["ms"])

    def write(self, impl: str, phase: str, shape: dict[str, int], found: Row) -> None:
        dtype = str(HALF).removeprefix("torch.")
        about: Row = {"op": "span_attention", "impl": impl, "phase": phase, "shape": shape, "dtype": dtype}
        with self.file.open("a") as file:
            file.write(json.dumps({**self.header, **about, **found}) + "\n")


def speed(bench: Bench, late: Late, name: str, best: dict[str, Any]) -> None:
    """The op, at first beside plain torch and dense attention; a step."""
    rivals = () if best else (("dense", dense), ("torch", plain))
    for shape in SHAPES:
        given = drawn(shape)
        for impl, function in ((name, ours), *rivals):
            wanted = WANTED[:3] if impl == "dense" else WANTED
            with tuning(**best):
                for phase, call in phases(function, given, *wanted).items():
                    if late():
                        bench.log("speed: out of time")
                        return
                    bench(impl, phase, shape, call)
    given = drawn(STEP)
    for impl, function in ((name, ours), *rivals):
        with tuning(**best):
            bench(impl, "decode_graph", STEP, phases(function, given)["fwd"])


def sweep(bench: Bench, late: Late) -> dict[str, Any]:
    """Each launch on the first shape: whether it is right, and its time; the best ones."""
    small, shape, log, best = drawn(MAIN), SHAPES[0], bench.log, dict[str, Any]()
    exact, calls = results(exact_of, small, torch.float64), phases(ours, drawn(shape), *WANTED)
    for name, launches in TRIED.items():
        found: list[tuple[float, int, Launch]] = []
        for number, launch in enumerate(launches):
            if late():
                break
            overrides = {**best, name: launch}
            try:
                if not judge(log, f"{name} {launch}", small, exact, **overrides):
                    continue
                with tuning(**overrides):
                    phase = "fwd" if name == "forward" else "fwdbwd"
                    found.append(
                        (bench(f"heddle, {name} {launch}", phase, shape, calls[phase]), number, launch)
                    )
            except Exception as error:
                log(f"none  {name} {launch}: {' '.join(str(error).split())[-200:]}")
        if found and min(found)[0] < float("inf"):
            best[name] = min(found)[2]
    return best


def layers(bench: Bench, late: Late, best: dict[str, Any]) -> None:
    """A whole routing layer on the kernels and in plain torch, beside a dense layer."""
    for shape in SHAPES:
        hidden = shape["H"] * shape["K"]
        heads = {"heads": shape["H"], "head_dim": shape["K"]}
        routing = {"kind": "routing", **heads, "clusters": shape["clusters"], "members": shape["width"] + 1}
        x = torch.randn(shape["B"], shape["T"], hidden, device=DEVICE, dtype=HALF)
        places = torch.arange(shape["T"], device=DEVICE).expand(shape["B"], -1)
        for impl, fields, path in (
            ("layer, routing", routing, "triton"), ("layer, dense", {"kind": "attention", **heads}, "torch"),
        ):  # fmt: skip
            layer = mixer_of(hidden, fields)

            def forward(layer: Any = layer, x: Tensor = x, places: Tensor = places) -> Tensor:
                y: Tensor = layer(x, Call(places))
                return y

            def both(layer: Any = layer, forward: Callable[[], Tensor] = forward) -> object:
                y = forward()
                return torch.autograd.grad(y, [*layer.parameters()], torch.ones_like(y))

            if late():
                return
            with force_path(path), tuning(**best):
                with torch.no_grad():
                    bench(impl, "fwd", shape, forward)
                bench(impl, "fwdbwd", shape, both)


def memory(bench: Bench, best: dict[str, Any]) -> None:
    """Peak memory of both directions, beside inputs, outputs and gradients."""
    given = drawn(LONGEST)
    both = phases(ours, given, *WANTED)["fwdbwd"]
    sides = [given[name] for name in WANTED]
    told = sum(x.numel() * x.element_size() for x in given.values() if isinstance(x, Tensor))
    told += sum(x.numel() * x.element_size() for x in (given["own"], *sides))
    if ON_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with tuning(**best):
        both()
    peak = torch.cuda.max_memory_allocated() if ON_GPU else 0
    bench.write("heddle", "memory", LONGEST, {"peak_bytes": peak, "tensor_bytes": told})
    line = f"memory T={LONGEST['T']}: peak {peak / 2**20:.0f} MiB, {peak / told:.2f} of inputs, output and gradients"
    bench.log(f"{'ok   ' if peak <= 4 * told else 'WRONG'} {line}")
    bench.log.wrong += [] if peak <= 4 * told else [line]


def told(bench: Bench) -> Iterator[str]:
    """Ratios to plain torch and to dense attention."""
    for (impl, phase, batch, length), ms in bench.times.items():
        if "Launch" in impl or impl in ("dense", "torch", "layer, dense"):
            continue
        rivals = ("layer, dense",) if impl.startswith("layer") else ("dense", "torch")
        ratios = [
            f"{rival} {bench.times[rival, phase, batch, length]:9.4f}, ratio {bench.times[rival, phase, batch, length] / ms:.2f}"
            for rival in rivals
            if (rival, phase, batch, length) in bench.times
        ]
        yield f"{impl:22} {phase:12} {batch:2} x {length:6} {ms:9.4f} ms, {'; '.join(ratios)}"


def warm(index: int) -> None:
    """Compiles every `WORKERS`th thing that will run, into Triton's cache on disk."""
    small, step = drawn(MAIN), drawn({**STEP, "B": 1, "kept": min(STEP["kept"], 600)})
    things = [*samples()]
    things += [("", small, {name: one}) for name, launches in TRIED.items() for one in launches]
    things += [("", step, {"step": one}) for one in STEPS]
    for _, given, overrides in things[index::WORKERS]:
        try:
            with tuning(**overrides), force_path("triton"):
                results(span_attention, given, given["q"].dtype)
        except Exception as error:
            print(f"{overrides}: {str(error).splitlines()[0]}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--budget", type=float, default=170.0, help="seconds after which nothing new is begun"
    )
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the log and the rows")
    parser.add_argument("--commit", help="what the code is")
    parser.add_argument("--tiny", action="store_true", help="try the script itself")
    parser.add_argument("--warm", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.tiny:
        tiny()
    if chosen.warm is not None:
        warm(chosen.warm)
        return 0
    if chosen.steps is not None:
        judge_steps(chosen.steps)
        return 0
    chosen.out.mkdir(parents=True, exist_ok=True)
    begin, log = time.monotonic(), Log(chosen.out / "routing_check.log")
    bench = Bench(log, chosen.out / "evidence-routing.jsonl", {**machine(DEVICE), "commit": chosen.commit})

    def late(share: float) -> Late:
        return lambda: time.monotonic() - begin > share * chosen.budget

    def done(what: str) -> None:
        log(f"{what} done after {time.monotonic() - begin:.0f} s")

    if ON_GPU:
        command = [sys.executable, __file__, "--warm"]
        for process in [subprocess.Popen([*command, str(index)]) for index in range(WORKERS)]:
            process.wait()
    done("warm")
    correctness(log, late(0.6))
    done("correctness")
    steps = right_steps(log, ["--tiny"] if chosen.tiny else [])
    done("steps")
    memory(bench, {})
    speed(bench, late(0.8), "heddle", {})
    done("speed")
    best = sweep(bench, late(0.9)) | fastest_step(bench, steps)
    done("sweep")
    speed(bench, late(0.95), "heddle, best launches", best)
    layers(bench, late(1.0), best)
    for row in ceilings(DEVICE):
        bench.write("ceiling", "ceiling", {}, row)
    for line in (*told(bench), f"best launches: {best}", *log.wrong):
        log(line)
    log(f"{len(log.wrong)} wrong, {time.monotonic() - begin:.0f} s")
    return 1 if log.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
