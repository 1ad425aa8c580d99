"""One call on a GPU machine: grid_window_attention against float64, its launches, its time beside Flex- and dense attention.

    python tests/bench/grid_check.py --out "$OUT" --budget 135 --commit "$(git rev-parse --short=12 HEAD)"
    TRITON_INTERPRET=1 python tests/bench/grid_check.py --out /tmp/tiny --budget 60 --commit none --tiny

Compiles side by side first, FlexAttention as well, then checks every dtype and form, lines, images and videos, against masked
softmax in float64, twice, the second time with fresh memory full of NaN. Times the op on images of 64 x 64 and a video of 16 x
32 x 64 beside dense attention of both sides by cuDNN, compiled FlexAttention with the same mask and, once, plain torch; whole
layers; peak memory. Each other launch is checked before its time. Writes grid_check.log and rows to evidence-grid.jsonl; exits
with 1 if anything was wrong. `--tiny` tries the script itself on a CPU, with interpreted kernels.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from gpu_check import Log
from head_sparse_check import mixer_of, phases, spoilt_memory
from torch import Tensor
from torch._inductor import config as inductor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from window_check import compare

from heddle.compose.cache import Call
from heddle.kernels import force_path
from heddle.kernels.bench import Row, ceilings, machine, timed
from heddle.kernels.common.tuning import tuning
from heddle.kernels.configs.launch import Launch
from heddle.kernels.grid_window_attention import grid_window_attention, grid_window_attention_reference

Given = dict[str, Any]
Late = Callable[[], bool]
WORKERS, ON_GPU = 12, torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
HALF = torch.bfloat16 if ON_GPU else torch.float32
DTYPES = (torch.bfloat16, torch.float16, torch.float32) if ON_GPU else (torch.float32,)
WANTED = ("q", "k", "v")
NUMBERS = ("width", "height", "column_window", "row_window", "frame_window")
MAIN = {"B": 2, "H": 4, "N": 4, "T": 1100, "K": 128, "V": 128}
SIZES = (64, 96, 256)
SHAPES: tuple[dict[str, int], ...] = tuple(dict(one) for one in grid_window_attention.cases.bench_shapes)
# Plain torch takes seconds there, and gathers more elsewhere.
SLOW = {"row_window": 8, "T": 4096}
TRIED = {
    "forward": (
        Launch(64, 64, 4, 2), Launch(64, 64, 4, 3), Launch(128, 64, 8, 2), Launch(128, 64, 8, 3), Launch(64, 32, 4, 3),
    ),
    "queries": (Launch(64, 64, 4, 2), Launch(64, 64, 8, 2), Launch(64, 32, 4, 2), Launch(64, 64, 4, 3)),
    "keys": (Launch(32, 64, 4, 2), Launch(32, 64, 4, 3), Launch(64, 64, 8, 2), Launch(32, 64, 8, 2)),
}  # fmt: skip


def tiny() -> None:
    """Sizes that a CPU interprets in seconds."""
    global SHAPES, SIZES, TRIED
    MAIN.update(B=1, H=2, N=2, T=70, K=16, V=16)
    SIZES = (20,)
    SHAPES = ({**MAIN, "T": 64, "width": 8, "row_window": 2, "column_window": 2},)
    TRIED = {name: (Launch(32, 16, 4, 1),) for name in TRIED}


def drawn(shape: dict[str, int], dtype: torch.dtype = HALF, **rest: Any) -> Given:
    """Arguments by name, as projections leave them: in memory with time before heads."""
    generator, made = torch.Generator(DEVICE).manual_seed(0), dict[str, Any]()
    for name, heads, size in (("q", "H", "K"), ("k", "N", "K"), ("v", "N", "V")):
        sizes = (shape["B"], shape["T"], shape[heads], shape[size])
        x = torch.randn(*sizes, generator=generator, device=DEVICE)
        made[name] = x.to(dtype).transpose(1, 2)
    numbers = {name: shape[name] for name in NUMBERS if name in shape}
    return {**made, **numbers, "boundary": "inward", **rest}


def samples() -> Iterator[tuple[str, Given]]:
    """What is checked; the last row of an image and the last frame of a video are not full."""
    real = torch.ones(MAIN["B"], MAIN["T"], dtype=torch.bool, device=DEVICE)
    real[0, :17] = real[0, -9:] = False
    image = {**MAIN, "width": 37, "row_window": 5, "column_window": 8}
    video = {**MAIN, "width": 14, "height": 9, "row_window": 4, "column_window": 6, "frame_window": 3}
    for dtype in DTYPES:
        yield f"{dtype} image", drawn(image, dtype)
        yield (
            f"{dtype} image, clipped, padded, grouped",
            drawn({**image, "N": 2}, dtype, boundary="clip", real=real),
        )
        yield f"{dtype} video", drawn(video, dtype)
        yield f"{dtype} video, padded, grouped", drawn({**video, "N": 1}, dtype, real=real)
        yield (
            f"{dtype} all frames, whole rows",
            drawn({**MAIN, "width": 14, "height": 9, "row_window": 4}, dtype),
        )
        yield f"{dtype} line", drawn({**MAIN, "width": MAIN["T"], "column_window": 90}, dtype)
        yield f"{dtype} few keys", drawn({**MAIN, "width": 20, "row_window": 2, "column_window": 1}, dtype)
        for size in SIZES if dtype == HALF else SIZES[-1:]:
            yield f"{dtype} image, heads of {size}", drawn({**image, "K": size, "V": size}, dtype)


def results(function: Callable[..., Tensor], given: Given, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output and gradients in this dtype, heads behind time."""
    leaves = {name: given[name].detach().to(dtype).requires_grad_() for name in WANTED}
    out = function(**{**given, **leaves})
    upstream = torch.randn(out.shape, generator=torch.Generator(DEVICE).manual_seed(7), device=DEVICE)
    found = torch.autograd.grad(out, list(leaves.values()), upstream.to(given["q"].dtype).to(out))
    return {name: x.detach().transpose(1, 2) for name, x in zip(("out", *WANTED), (out, *found), strict=True)}


def judge(log: Log, what: str, given: Given, **overrides: Any) -> bool:
    dtype, before = given["q"].dtype, len(log.wrong)
    exact = results(grid_window_attention_reference, given, torch.float64)
    with tuning(**overrides), force_path("triton"):
        found = results(grid_window_attention, given, dtype)
        with spoilt_memory():
            again = results(grid_window_attention, given, dtype)
    differ = [name for name in found if not torch.equal(found[name], again[name])]
    if differ:
        log.wrong.append(f"{what}: two runs differ, or fresh memory is read: {differ}")
    with force_path("torch"):
        plain = results(grid_window_attention, given, dtype)
    compare(log, what, found=found, plain=plain, exact=exact)
    return len(log.wrong) == before


def attempt(log: Log, what: str, given: Given, **overrides: Any) -> bool:
    """`judge`, of a launch that may not run at all."""
    try:
        return judge(log, what, given, **overrides)
    except Exception as error:
        log.wrong.append(f"{what}: {' '.join(str(error).split())[-300:]}")
        return False


def ours(**given: Any) -> Tensor:
    with force_path("triton"):
        return grid_window_attention(**given)


def plain(**given: Any) -> Tensor:
    with force_path("torch"):
        return grid_window_attention(**given)


def dense(*, q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> Tensor:  # noqa: ARG001
    """Attention to all, by torch's cuDNN backend; on a CPU by whatever there is."""
    if not ON_GPU:
        return scaled_dot_product_attention(q, k, v)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return scaled_dot_product_attention(q, k, v)


@cache
def flexed(length: int, numbers: tuple[tuple[str, int], ...]) -> Callable[..., Any]:
    """FlexAttention with the inward mask of a grid, compiled for it; elements of blocks that are seen whole have no mask."""
    grid = dict(numbers)
    width, height = grid["width"], grid.get("height", -(-length // grid["width"]))
    sizes = {"column_window": (1, width), "row_window": (width, height),
             "frame_window": (width * height, length // (width * height))}  # fmt: skip
    axes = [(step, size, grid[name] - 1) for name, (step, size) in sizes.items() if name in grid]

    def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG001
        found = key >= 0
        for step, size, reach in axes:
            first = (query // step % size - reach).clamp(0, max(size - 2 * reach - 1, 0))
            distance = key // step % size - first
            found = found & (distance >= 0) & (distance <= 2 * reach)
        return found

    # In each process alike, so that one finds what another left.
    inductor.compile_threads = 1
    mask = create_block_mask(seen, None, None, length, length, device=DEVICE.type, _compile=ON_GPU)
    torch._dynamo.reset()
    run: Any = torch.compile(flex_attention, dynamic=False) if ON_GPU else flex_attention
    return lambda q, k, v: run(q, k, v, block_mask=mask)


def flex(*, q: Tensor, k: Tensor, v: Tensor, boundary: str, **numbers: Any) -> Tensor:  # noqa: ARG001
    return flexed(q.shape[2], tuple(numbers.items()))(q, k, v)  # type: ignore[no-any-return]


@dataclass
class Bench:
    """Times calls, writes rows, and keeps the times by (shape, phase, impl)."""

    log: Log
    file: Path
    header: Row
    times: dict[tuple[str, str, str], float] = field(default_factory=dict)

    def __call__(self, impl: str, phase: str, shape: dict[str, int], call: Callable[[], object]) -> float:
        """The time, or infinity where it does not run."""
        try:
            if impl == "torch":
                found = once(call)
            else:
                call()
                found = timed(call, DEVICE)
        except Exception as error:
            self.log(f"none  {impl} {phase} {shape}: {' '.join(str(error).split())[-200:]}")
            return float("inf")
        self.write(impl, phase, shape, found)
        self.log(f"{phase:7} {named(shape):24} {found['ms']:10.4f} ms  {impl}")
        self.times[named(shape), phase, impl] = float(found["ms"])
        return float(found["ms"])

    def write(self, impl: str, phase: str, shape: dict[str, int], found: Row) -> None:
        about: Row = {
            "op": "grid_window_attention",
            "impl": impl,
            "phase": phase,
            "shape": shape,
            "dtype": str(HALF)[6:],
        }
        with self.file.open("a") as file:
            file.write(json.dumps({**self.header, **about, **found}) + "\n")


def once(call: Callable[[], object]) -> Row:
    """Of what takes seconds and compiles nothing: one call."""
    if ON_GPU:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    if ON_GPU:
        torch.cuda.synchronize()
    return dict.fromkeys(("ms", "ms_p10", "ms_p90"), (time.perf_counter() - begin) * 1e3)


def named(shape: dict[str, int]) -> str:
    windows = [str(shape[name]) for name in reversed(NUMBERS) if name in shape and name.endswith("window")]
    return f"{shape['B']} x {shape['T']}, {' x '.join(windows)}"


def speed(bench: Bench, late: Late, impls: dict[str, Callable[..., Tensor]], **best: Any) -> None:
    for impl, function in impls.items():
        for shape in SHAPES:
            if impl == "torch" and ON_GPU and any(shape[name] != size for name, size in SLOW.items()):
                continue
            with tuning(**best):
                for phase, call in phases(function, drawn(shape), *WANTED).items():
                    if late():
                        bench.log(f"none  {impl} {phase} {named(shape)}: out of time")
                        continue
                    bench(impl, phase, shape, call)


def sweep(bench: Bench, late: Late) -> dict[str, Any]:
    """Each launch on one image: whether it is right, and its time; the best ones."""
    shape, best = SHAPES[-2:][0], dict[str, Any]()
    small, calls = drawn({**shape, "B": 1, "H": 2, "N": 2}), phases(ours, drawn(shape), *WANTED)
    for name, launches in TRIED.items():
        found: list[tuple[float, int, Launch]] = []
        phase = "fwd" if name == "forward" else "fwdbwd"
        for number, launch in enumerate(launches):
            overrides = {**best, name: launch}
            if late() or not attempt(bench.log, f"{name} {launch}", small, **overrides):
                continue
            with tuning(**overrides):
                found.append((bench(f"heddle, {name} {launch}", phase, shape, calls[phase]), number, launch))
        if found and math.isfinite(min(found)[0]):
            best[name] = min(found)[2]
    return best


def layers(bench: Bench, late: Late) -> None:
    """A whole layer with each window, and with that of earlier rows, beside one of attention of both sides."""
    shape = SHAPES[-2:][0]
    hidden, full = shape["H"] * shape["K"], {"kind": "attention", "heads": shape["H"], "causal": False}
    x = torch.randn(shape["B"], shape["T"], hidden, device=DEVICE, dtype=HALF)
    places = torch.arange(shape["T"], device=DEVICE).expand(shape["B"], -1)
    forms: dict[str, dict[str, Any]] = {"layer, both sides": full}
    for window in (4, shape["row_window"]):
        grid = {"width": shape["width"], "row_window": window, "column_window": window}
        forms[f"layer, window {window}"] = {**full, "boundary": "inward", "grid": grid}
    for impl, fields in forms.items():
        layer = mixer_of(hidden, fields)

        def forward(layer: Any = layer) -> Tensor:
            y: Tensor = layer(x, Call(places))
            return y

        def both(layer: Any = layer, forward: Callable[[], Tensor] = forward) -> object:
            y = forward()
            return torch.autograd.grad(y, [*layer.parameters()], torch.ones_like(y))

        if late():
            return
        with torch.no_grad():
            bench(impl, "fwd", shape, forward)
        bench(impl, "fwdbwd", shape, both)


def memory(bench: Bench) -> None:
    """Peak memory of both directions, beside inputs, output and gradients."""
    shape = SHAPES[-1]
    given = drawn(shape)
    both = phases(ours, given, *WANTED)["fwdbwd"]
    sides = [given[name] for name in WANTED]
    # Inputs and their gradients, the output and its own.
    told = 2 * sum(x.numel() * x.element_size() for x in (*sides, given["q"]))
    if ON_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    both()
    peak = torch.cuda.max_memory_allocated() if ON_GPU else 0
    bench.write("heddle", "memory", shape, {"peak_bytes": peak, "tensor_bytes": told})
    line = f"memory {named(shape)}: peak {peak / 2**20:.0f} MiB, {peak / told:.2f} of inputs, output and gradients"
    bench.log(f"{'ok   ' if peak <= 2 * told else 'WRONG'} {line}")
    bench.log.wrong += [] if peak <= 2 * told else [line]


def told(bench: Bench) -> Iterator[str]:
    """How many times as fast as others we are."""
    for (shape, phase, impl), ms in bench.times.items():
        if not impl.startswith("heddle") or "Launch" in impl:
            continue
        others = {name: bench.times.get((shape, phase, name)) for name in ("dense", "flex", "torch")}
        ratios = [f"{name} {other:.3f} ms, {other / ms:.2f} times" for name, other in others.items() if other]
        yield f"{impl:20} {phase:7} {shape:24} {ms:9.4f} ms; {'; '.join(ratios)}"


def warm(index: int) -> None:
    """Compiles every `WORKERS`th thing that will run, into caches on disk."""
    shape = SHAPES[-2:][0]
    things: list[Callable[[], object]] = [
        lambda one=one: phases(flex, drawn(one), *WANTED)["fwdbwd"]() for one in SHAPES
    ]
    things += [lambda one=one: phases(flex, drawn(one), *WANTED)["fwd"]() for one in SHAPES]
    for name, launches in TRIED.items():
        things += [
            lambda name=name, one=one: _tried(drawn({**shape, "B": 1, "H": 2, "N": 2}), **{name: one})
            for one in launches
        ]
    things += [lambda given=given: _tried(given) for _, given in samples()]
    things += [lambda one=one: _tried(drawn({**one, "B": 1})) for one in SHAPES]
    for thing in things[index::WORKERS]:
        try:
            thing()
        except Exception as error:
            print(f"warming: {str(error).splitlines()[0]}", flush=True)


def _tried(given: Given, **overrides: Any) -> None:
    with tuning(**overrides), force_path("triton"):
        results(grid_window_attention, given, given["q"].dtype)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--budget", type=float, default=135.0, help="seconds after which nothing new is begun"
    )
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the log and the rows")
    parser.add_argument("--commit", help="what the code is")
    parser.add_argument("--tiny", action="store_true", help="try the script itself")
    parser.add_argument("--warm", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.tiny:
        tiny()
    if chosen.warm is not None:
        warm(chosen.warm)
        return 0
    chosen.out.mkdir(parents=True, exist_ok=True)
    begin, log = time.monotonic(), Log(chosen.out / "grid_check.log")
    bench = Bench(log, chosen.out / "evidence-grid.jsonl", {**machine(DEVICE), "commit": chosen.commit})

    def late(share: float) -> Late:
        return lambda: time.monotonic() - begin > share * chosen.budget

    if ON_GPU:
        warm_up(log, begin + 0.4 * chosen.budget)
    check_all(bench, late, lambda what: log(f"{what} done after {time.monotonic() - begin:.0f} s"))
    for line in (*told(bench), *log.wrong):
        log(line)
    log(f"{len(log.wrong)} wrong, {time.monotonic() - begin:.0f} s")
    return 1 if log.wrong else 0


def warm_up(log: Log, end: float) -> None:
    """Side by side, until this time at most: what is not compiled by then is compiled where it is needed."""
    workers = [subprocess.Popen([sys.executable, __file__, "--warm", str(one)]) for one in range(WORKERS)]
    for process in workers:
        try:
            process.wait(max(1.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            log("a process that compiled was ended")


def check_all(bench: Bench, late: Callable[[float], Late], done: Callable[[str], None]) -> None:
    done("warm")
    for what, given in samples():
        if late(0.7)():
            bench.log.wrong.append(f"correctness: out of time before {what}")
            break
        attempt(bench.log, what, given)
    done("correctness")
    memory(bench)
    speed(bench, late(0.75), {"heddle": ours, "dense": dense})
    done("speed")
    layers(bench, late(0.8))
    best = sweep(bench, late(0.88))
    bench.log(f"best launches: {best}")
    speed(bench, late(0.9), {"heddle, best launches": ours}, **best)
    done("sweep")
    speed(bench, late(1.0), {"torch": plain, "flex": flex})
    for row in ceilings(DEVICE):
        bench.write("ceiling", "ceiling", {}, row)


if __name__ == "__main__":
    sys.exit(main())
