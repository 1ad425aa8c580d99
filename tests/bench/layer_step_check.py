"""One call on a GPU machine: is gated_delta_layer_step right, how fast beside the same chain of fla's ops, which launch is best.

    python tests/bench/layer_step_check.py --budget 110 --out "$OUT"

Compiles side by side first, then checks dtypes, head sizes, options and every launch against the float64 reference, and times
the op in a CUDA graph beside our own ops one by one and beside flash-linear-attention's (where that is installed), once as its
layer calls them, with a convolution each for q, k and v, and once with a single one. The floor is the state, read and written
once, at the speed of a copy. Writes layer_step_check.log, rows as those of run.py to layer-step.jsonl and rows of launches to
evidence-layer-step.jsonl; the short table comes last. Exits with 1 if anything was wrong.
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
import triton
from gpu_check import Log
from torch import Tensor

from heddle.kernels import force_path
from heddle.kernels.accuracy import EPSILON, worst_error
from heddle.kernels.bench import Row, ceilings, machine, timed, timed_in_graph
from heddle.kernels.common.tuning import tuning
from heddle.kernels.configs.launch import Launch
from heddle.kernels.gated_delta_layer import _chain, gated_delta_layer_step, gated_delta_layer_step_reference

DEVICE = torch.device("cuda")
WORKERS = 12
EPS = 1e-6
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SIZES = ((128, 128), (64, 64), (100, 72), (128, 256), (256, 256), (192, 160))
OPTIONS: dict[str, dict[str, Any]] = {
    "to two, scaled": {"beta_max": 2.0, "scale": 0.3},
    "no activation": {"activation": None},
    "no norm of keys": {"qk_norm": None},
    "no convolution": {"conv_state": None, "conv_weight": None},
    "bias": {},
}
TRIED = (
    Launch(1, 128, 8, 1), Launch(1, 128, 4, 1), Launch(1, 128, 16, 1), Launch(1, 128, 8, 1, 128), Launch(1, 64, 4, 1),
    Launch(1, 64, 8, 1), Launch(1, 64, 2, 1), Launch(1, 64, 4, 1, 128), Launch(1, 64, 8, 2), Launch(1, 32, 4, 1),
    Launch(1, 32, 2, 1), Launch(1, 32, 1, 1), Launch(1, 32, 4, 2), Launch(1, 32, 2, 2), Launch(1, 16, 1, 1),
    Launch(1, 16, 2, 1), Launch(1, 16, 4, 1), Launch(1, 16, 2, 2), Launch(1, 64, 8, 1, 80), Launch(1, 32, 4, 1, 96),
)  # fmt: skip
TALL = (
    Launch(1, 64, 8, 1), Launch(1, 64, 16, 1), Launch(1, 32, 8, 1), Launch(1, 32, 4, 1), Launch(1, 32, 8, 2),
    Launch(1, 128, 16, 1), Launch(1, 16, 4, 1),
)  # fmt: skip
WIDE = {"T": 1, "H": 16, "HV": 16, "K": 128, "V": 128, "W": 4}
BATCHES = (1, 32, 256)
SMALL = {"B": 3, "H": 2, "HV": 4, "K": 128, "V": 128, "W": 4}
SMALL_TALL = {"B": 3, "H": 2, "HV": 4, "K": 256, "V": 256, "W": 4}
Given = dict[str, Any]
Case = tuple[str, Launch | None, Given]


def drawn(
    shape: dict[str, int], dtype: torch.dtype, device: torch.device | str = "cpu", **changes: Any
) -> Given:
    """Arguments by name, those that come rounded in `dtype`."""
    traits, generator = gated_delta_layer_step.cases, torch.Generator(device).manual_seed(0)
    given = {**traits.inputs(shape, generator), "state": traits.initial_state(shape, generator)}
    rounded = {name: x.to(dtype if name in traits.rounded else torch.float32) for name, x in given.items()}
    return {**rounded, "eps": EPS, **changes}


def with_option(dtype: torch.dtype, option: str) -> Given:
    given = drawn({**SMALL, "K": 64, "V": 64}, dtype, **OPTIONS[option])
    if option != "bias":
        return given
    bias = torch.randn(given["qkv"].shape[2], generator=torch.Generator().manual_seed(1))
    return {**given, "conv_bias": bias.to(dtype)}


def every_case() -> Iterator[Case]:
    """What is compared with the reference: a name, a launch or that of the table, arguments."""
    for dtype in DTYPES:
        short = str(dtype).removeprefix("torch.")
        for K, V in SIZES:
            yield f"{short} K={K} V={V}", None, drawn({**SMALL, "K": K, "V": V}, dtype)
        yield f"{short} many heads", None, drawn({**SMALL, "B": 70}, dtype)
        yield from ((f"{short} {option}", None, with_option(dtype, option)) for option in OPTIONS)
    yield from ((f"bfloat16 {launch}", launch, drawn(SMALL, torch.bfloat16)) for launch in TRIED)
    yield from ((f"bfloat16 tall {launch}", launch, drawn(SMALL_TALL, torch.bfloat16)) for launch in TALL)


def run(launch: Launch | None, given: Given) -> tuple[Tensor, ...]:
    """The kernel's results: asked for, since what has not passed here yet is not taken otherwise."""
    with tuning(**({} if launch is None else {"layer_step": launch})), force_path("triton"):
        return tuple(x for x in gated_delta_layer_step(**given) if x is not None)


def there(given: Given) -> Given:
    return {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in given.items()}


def judge(log: Log, what: str, launch: Launch | None, given: Given) -> bool:
    """Whether every result is within twice the error of plain torch, and the same in a second run."""
    exact = gated_delta_layer_step_reference(
        **{n: x.double() if isinstance(x, Tensor) else x for n, x in given.items()}
    )
    on_gpu, dtype = there(given), given["qkv"].dtype
    found, again = run(launch, on_gpu), run(launch, on_gpu)
    with force_path("torch"):
        plain = gated_delta_layer_step(**on_gpu)
    bad, told = [], []
    for name, tensor, other, base, truth in zip(
        ("out", "state", "conv_state"), found, again, plain, exact, strict=False
    ):
        assert base is not None
        assert truth is not None
        error, worst = worst_error(tensor, truth, timed=name == "out")
        bound = 2 * worst_error(base, truth, timed=name == "out")[0] + EPSILON[dtype]
        told.append(f"{name} {error:.1e} of {bound:.1e}")
        bad += [] if error <= bound else [f"{what}: {name} {error:.2e}, at most {bound:.2e}: {worst}"]
        bad += [] if torch.equal(tensor, other) else [f"{what}: two runs differ in {name}"]
    log(f"{'ok   ' if not bad else 'WRONG'} {what}: {', '.join(told)}")
    log.wrong += bad
    return not bad


def warm(index: int) -> None:
    """Compiles every `WORKERS`th thing that will run, into Triton's cache on disk."""
    for what, launch, given in list(every_case())[index::WORKERS]:
        try:
            run(launch, there(given))
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


def rivals(given: Given) -> dict[str, Callable[[], Tensor]]:
    """The same chain of flash-linear-attention's ops, as its layer in version 0.6.0 calls them and with one convolution.

    Their convolution writes over its cache of W inputs; their state lies [V, K], as in their layer.
    """
    from fla.modules import FusedRMSNormGated
    from fla.modules.convolution import causal_conv1d_update
    from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule

    x, state, weight = given["qkv"], given["state"].mT.contiguous(), given["conv_weight"]
    B, HV, K, V = given["state"].shape
    keys = (x.shape[2] - HV * V) // 2
    sizes = (keys, keys, HV * V)
    cache = torch.nn.functional.pad(given["conv_state"], (1, 0))
    parts = [
        tuple(part.clone(memory_format=torch.contiguous_format) for part in each)
        for each in zip(x.split(sizes, 2), cache.split(sizes, 1), weight.split(sizes, 0), strict=True)
    ]
    norm = FusedRMSNormGated(V, eps=EPS, device=DEVICE, dtype=x.dtype)
    norm.weight.data.copy_(given["norm_weight"])

    def rest(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = q.view(B, 1, -1, K), k.view(B, 1, -1, K), v.view(B, 1, HV, V)
        o, _ = fused_recurrent_gated_delta_rule(
            q, k, v, g=given["a"], beta=given["b"], initial_state=state, output_final_state=True,
            use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, A_log=given["A_log"], dt_bias=given["dt_bias"],
            use_beta_sigmoid_in_kernel=True, state_v_first=True,
        )  # fmt: skip
        return norm(o, given["z"])

    def three() -> Tensor:
        return rest(*(causal_conv1d_update(p, c, weight=w, activation="silu")[0] for p, c, w in parts))

    def one() -> Tensor:
        y, _ = causal_conv1d_update(x, cache, weight=weight, activation="silu")
        return rest(*y.split(sizes, 2))

    return {"fla": three, "fla, one convolution": one}


def implementations(log: Log, given: Given) -> dict[str, Callable[[], object]]:
    """What is timed, by the name in the rows."""
    names = ("qkv", "z", "a", "b", "A_log", "dt_bias", "norm_weight", "state", "conv_state", "conv_weight")
    tensors, scale = [given[name] for name in names], given["state"].shape[2] ** -0.5
    found: dict[str, Callable[[], object]] = {
        "heddle": lambda: run(None, given),
        "heddle, one op after the other": lambda: _chain(*tensors, None, "silu", "l2", 1.0, scale, EPS),
    }
    try:
        for name, call in rivals(given).items():
            error, _ = worst_error(call(), run(None, given)[0], timed=True)
            log(f"{name} differs from ours by {error:.1e}")
            found[name] = call
    except Exception as error:
        log(f"fla: {' '.join(str(error).split())[-300:]}")
    return found


def peak(call: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@torch.no_grad()
def race(log: Log, file: Path) -> list[str]:
    """Rows of all implementations at all batches, and a line of each batch."""
    header, lines = machine(DEVICE), []

    def write(row: Row) -> None:
        with file.open("a") as out:
            out.write(json.dumps({**header, **row, "commit": None}) + "\n")

    copy = next(ceilings(DEVICE))
    write(copy)
    work = gated_delta_layer_step.cases.work
    assert work is not None
    for B in BATCHES:
        shape = {"B": B, **WIDE}
        given, least, graph = drawn(shape, torch.bfloat16, DEVICE), work(shape, "decode", 2), {}
        for impl, call in implementations(log, given).items():
            first = time.perf_counter()
            call()
            torch.cuda.synchronize()
            first = time.perf_counter() - first
            for phase, clock in (("decode_graph", timed_in_graph), ("decode", partial(timed, device=DEVICE))):
                times = clock(call)
                speeds = {"gbps": least.bytes / times["ms"] / 1e6, "tflops": least.flops / times["ms"] / 1e9}
                about = {"op": "gated_delta_layer_step", "impl": impl, "phase": phase, "shape": shape}
                rest = {"peak_bytes": peak(call), "first_call_s": first}
                write({**about, "dtype": "bfloat16", **times, **speeds, **rest})
                log(f"B={B} {impl} {phase}: {times['ms']:.5f} ms")
                if phase == "decode_graph":
                    graph[impl] = times["ms"]
        floor = 2 * given["state"].numel() * 4 / copy["gbps"] / 1e6
        told = f"B={B} in a graph: {graph['heddle']:.5f} ms, {floor / graph['heddle']:.0%} of the floor {floor:.5f}"
        ratios = (
            f"{impl} {ms:.5f} ({ms / graph['heddle']:.2f})" for impl, ms in graph.items() if impl != "heddle"
        )
        lines.append("; ".join((told, *ratios)))
    return lines


@torch.no_grad()
def sweep(log: Log, file: Path, good: set[str], late: Callable[[], bool]) -> list[str]:
    """Times every launch that was right; a line of each case."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    made = {"time": now, "commit": None, "device": torch.cuda.get_device_name()}
    made |= {"torch": torch.__version__, "triton": triton.__version__, "op": "gated_delta_layer_step"}
    cases = [({"B": B, **WIDE}, TRIED, "") for B in BATCHES]
    cases += [({"B": B, **WIDE, "K": 256, "V": 256}, TALL, "tall ") for B in (1, 32)]
    lines = []
    for shape, launches, told in cases:
        given, found = drawn(shape, torch.bfloat16, DEVICE), {}
        for launch in launches:
            if f"bfloat16 {told}{launch}" not in good or late():
                continue
            ms = timed_in_graph(partial(run, launch, given))["ms"]
            text = f"{launch.columns} columns, {launch.warps} warps" + (
                ", ahead" if launch.stages > 1 else ""
            )
            found[text + (f", {launch.registers} registers" if launch.registers else "")] = ms
        case = " ".join(f"{letter}={size}" for letter, size in shape.items())
        with file.open("a") as out:
            out.writelines(
                json.dumps({**made, "case": case, "tried": tried, "ms": ms}) + "\n"
                for tried, ms in found.items()
            )
        ranked = sorted(found.items(), key=lambda item: item[1])
        lines.append(f"{case}: {'; '.join(f'{tried} {ms:.5f}' for tried, ms in ranked)}")
        log(lines[-1])
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", type=float, default=110.0, help="seconds after which no launch is tried")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the log and the rows")
    parser.add_argument("--warm", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.warm is not None:
        warm(chosen.warm)
        return 0
    begin = time.monotonic()
    chosen.out.mkdir(parents=True, exist_ok=True)
    log = Log(chosen.out / "layer_step_check.log")
    compiled(log, begin)
    good = set()
    for what, launch, given in every_case():
        try:
            good |= {what} if judge(log, what, launch, given) else set()
        except Exception as error:
            # A launch that does not fit is no error of the op.
            told = f"{what}: {' '.join(str(error).split())[-300:]}"
            log(f"none  {told}")
            log.wrong += [told] if launch is None else []
    log(f"checked after {time.monotonic() - begin:.0f} s")
    lines = race(log, chosen.out / "layer-step.jsonl")
    late = lambda: time.monotonic() - begin > chosen.budget  # noqa: E731
    lines += sweep(log, chosen.out / "evidence-layer-step.jsonl", good, late)
    for line in (*lines, *log.wrong, f"{len(log.wrong)} wrong, {time.monotonic() - begin:.0f} s"):
        log(line)
    return 1 if log.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
