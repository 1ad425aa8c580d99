"""One call on a GPU machine: are the kernels of block_attention right, which launches are best, and how fast are the rivals.

    python tests/bench/block_attention_check.py --budget 400 --out "$OUT"

Checks every dtype and form against the reference in float64, then at sizes of models against plain torch in float64, and each
launch configuration before it is timed. Times dense causal attention by cuDNN, fla's `parallel_nsa` on the same lists, and a
decode step beside a copy of as many bytes as it must read. Writes block_attention_check.log, and rows to
evidence-block-attention.jsonl; exits with 1 if anything was wrong.

Lists come in two kinds: neighbours share what they chose (`shared` of them), as queries that stand together mostly do, or every
query chose on its own. The second is bound by the L2 cache: each query reads its blocks alone.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_check import Log
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from heddle.kernels import force_path
from heddle.kernels.accuracy import EPSILON, worst_error
from heddle.kernels.bench import Row, machine, timed, timed_in_graph
from heddle.kernels.block_attention import block_attention, block_attention_reference
from heddle.kernels.common.tuning import tuning
from heddle.kernels.configs.launch import Launch

DEVICE = torch.device("cuda")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SIZES = ((128, 128), (64, 64), (192, 128), (256, 256), (100, 72))
SHORT = {"B": 2, "H": 8, "N": 2, "T": 37, "S": 50, "K": 16, "V": 24, "block": 8, "L": 3}
LONG = {"B": 1, "H": 32, "N": 2, "T": 1000, "S": 1500, "block": 64, "L": 6}
WANTED = ("q", "k", "v")
TRIED = {
    "forward": (
        Launch(64, 64, 4, 3), Launch(64, 64, 4, 2), Launch(64, 64, 8, 3), Launch(128, 64, 8, 2), Launch(128, 64, 8, 3),
        Launch(64, 32, 4, 3), Launch(32, 64, 4, 3), Launch(16, 64, 4, 3), Launch(16, 64, 2, 3), Launch(16, 64, 4, 2),
    ),
    "queries": (
        Launch(64, 64, 4, 2), Launch(64, 64, 4, 3), Launch(64, 64, 8, 2), Launch(64, 64, 4, 1), Launch(128, 64, 8, 2),
        Launch(32, 64, 4, 2), Launch(16, 64, 4, 2),
    ),
    "keys": (
        Launch(64, 64, 8, 2), Launch(64, 64, 8, 1), Launch(64, 64, 8, 3), Launch(64, 64, 4, 1), Launch(64, 32, 4, 2),
        Launch(64, 32, 8, 2),
    ),
}  # fmt: skip
TRIED_GATED = {
    "gated_queries": (
        Launch(64, 64, 4, 2), Launch(64, 64, 4, 3), Launch(64, 64, 8, 2), Launch(128, 64, 4, 2), Launch(128, 64, 8, 2),
        Launch(128, 64, 8, 3),
    ),
    "gated_keys": (
        Launch(64, 64, 4, 2), Launch(64, 64, 8, 3), Launch(64, 64, 4, 3), Launch(64, 32, 4, 2),
        Launch(128, 64, 8, 2), Launch(128, 64, 4, 1),
    ),
}  # fmt: skip
SPLITS = (1, 2, 4, 6, 8, 12, 16, 32)
# Heads as NAtS-L has them, each with gates of its own, a quarter of them 1.
GATED = {"B": 1, "H": 32, "N": 32, "T": 32768, "S": 32768, "K": 64, "V": 64, "block": 64, "L": 1}
Given = dict[str, Any]


def drawn(shape: dict[str, int], dtype: torch.dtype, device: torch.device = DEVICE) -> Given:
    """Arguments by name, rounded to `dtype`."""
    inputs = block_attention.cases.inputs(shape, torch.Generator(device).manual_seed(0))
    given: Given = {name: x.to(dtype) if name in WANTED else x for name, x in inputs.items()}
    return {**given, "block": shape["block"]}


def results(
    function: Callable[..., Tensor], given: Given, dtype: torch.dtype, device: str
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


def judge(log: Log, what: str, given: Given, exact: dict[str, Tensor], **overrides: Any) -> bool:
    """Whether every result is within twice the error of plain torch."""
    dtype = given["q"].dtype
    with tuning(**overrides), force_path("triton"):
        found = results(block_attention, given, dtype, DEVICE)
    with force_path("torch"):
        plain = results(block_attention, given, dtype, DEVICE)
    bad, told = [], []
    for name, tensor in exact.items():
        error, worst = worst_error(found[name], tensor, timed=True)
        bound = 2 * worst_error(plain[name], tensor, timed=True)[0] + EPSILON[dtype]
        told.append(f"{name} {error:.1e} of {bound:.1e}")
        bad += [] if error <= bound else [f"{what}: {name} {error:.2e}, at most {bound:.2e}: {worst}"]
    log(f"{'ok   ' if not bad else 'WRONG'} {what}: {', '.join(told)}")
    log.wrong += bad
    return not bad


def samples() -> Iterator[tuple[str, Given, bool]]:
    """What is checked: a name, arguments, and whether it is short enough for the reference."""
    for dtype in DTYPES:
        given = drawn(SHORT, dtype)
        chosen = torch.rand(2, 2, 37, 7, generator=torch.Generator().manual_seed(1)).to(DEVICE) > 0.5
        plain = {name: x for name, x in given.items() if name != "listed"}
        real, written = torch.ones(2, 50, device=DEVICE) > 0, torch.ones(2, 50, device=DEVICE)
        real[0, 48:], written[1, 3:5] = False, 0.0
        limited = {"real": real, "written": written, "start": torch.tensor([11, 13], device=DEVICE)}
        yield f"{dtype} listed", given, True
        yield f"{dtype} chosen, padded", {**plain, "chosen": chosen, **limited}, True
        yield f"{dtype} gates", {**plain, "gates": chosen[:, :, 0].to(dtype)}, True
        for K, V in SIZES:
            for extra in ({}, {"T": 1, "B": 3}, {"T": 64, "S": 64, "shared": 64}):
                yield f"{dtype} {K} {V} {extra}", drawn({**LONG, "K": K, "V": V, **extra}, dtype), False


def correctness(log: Log, late: Callable[[], bool]) -> None:
    for what, given, is_short in samples():
        if late():
            log("correctness: out of time")
            return
        try:
            function, device = (block_attention_reference, "cpu") if is_short else (block_attention, DEVICE)
            exact = results(function, given, torch.float64, device)
            judge(log, what, given, exact)
            if given["q"].shape[2] == 1:
                for splits in (1, 3):
                    judge(log, f"{what} in {splits}", given, exact, splits=splits)
            with force_path("triton"):
                first, second = (results(block_attention, given, given["q"].dtype, DEVICE) for _ in range(2))
            if not all(torch.equal(first[name], second[name]) for name in first):
                log.wrong.append(f"{what}: two runs differ")
        except Exception as error:
            log.wrong.append(f"{what}: {' '.join(str(error).split())[-300:]}")


def phases(function: Callable[..., Tensor], given: Given) -> dict[str, Callable[[], object]]:
    """A call forward, and one forward and backward."""
    leaves = {**given, **{name: given[name].detach().requires_grad_() for name in WANTED}}
    upstream = torch.randn_like(given["q"])

    def forward() -> object:
        with torch.no_grad():
            return function(**given)

    wanted = [x for x in leaves.values() if isinstance(x, Tensor) and x.requires_grad]

    def both() -> object:
        found = function(**leaves)
        return torch.autograd.grad(found, wanted, upstream.view(found.shape))

    return {"fwd": forward, "fwdbwd": both}


def ours(**given: Any) -> Tensor:
    with force_path("triton"):
        return block_attention(**given)


def dense(*, q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    # Not every release gives that backend groups; the copy is less than a hundredth of the time.
    group = q.shape[1] // k.shape[1]
    k, v = (side.repeat_interleave(group, dim=1) for side in (k, v))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return scaled_dot_product_attention(q, k, v, is_causal=True)


def as_rival(given: Given) -> Given:
    """The same arguments with time before heads."""
    turned = {name: given[name].transpose(1, 2).contiguous() for name in (*WANTED, "listed")}
    return {**turned, "block": given["block"]}


def rival(*, q: Tensor, k: Tensor, v: Tensor, listed: Tensor, block: int) -> Tensor:
    run = importlib.import_module("fla.ops.nsa.parallel").parallel_nsa
    return run(q, k, v, block_indices=listed, block_counts=listed.shape[-1], block_size=block)  # type: ignore[no-any-return]


def sweep(log: Log, row: Callable[..., None], late: Callable[[], bool]) -> None:
    """Each launch configuration on one shape of either kind of lists: whether it is right, and its time."""
    small = drawn({**LONG, "K": 128, "V": 128}, torch.bfloat16)
    exact = results(block_attention, small, torch.float64, DEVICE)
    shapes = [dict(one) for one in block_attention.cases.bench_shapes if one["T"] == 32768]
    timings = [(shape, phases(ours, drawn(shape, torch.bfloat16))) for shape in shapes]
    for name, launch in ((name, launch) for name, launches in TRIED.items() for launch in launches):
        if late():
            log("sweep: out of time")
            return
        try:
            if not judge(log, f"{name} {launch}", small, exact, **{name: launch}):
                continue
            with tuning(**{name: launch}):
                for shape, calls in timings:
                    phase = "fwd" if name == "forward" else "fwdbwd"
                    row(f"heddle, {name} {launch}", phase, shape, calls[phase])
        except Exception as error:
            log(f"none  {name} {launch}: {' '.join(str(error).split())[-200:]}")


def compare_speed(log: Log, row: Callable[..., None], late: Callable[[], bool]) -> None:
    for shape, phase in itertools.product(map(dict, block_attention.cases.bench_shapes), ("fwd", "fwdbwd")):
        if late():
            log("speed: out of time")
            return
        given = drawn(shape, torch.bfloat16)
        for impl, function in (("heddle", ours), ("cudnn", dense), ("fla", rival)):
            if impl == "fla" and shape["T"] > 32768:
                continue
            try:
                arguments = as_rival(given) if impl == "fla" else given
                row(impl, phase, shape, phases(function, arguments)[phase])
            except Exception as error:
                log(f"none  {impl} {phase} {shape}: {' '.join(str(error).split())[-200:]}")


def decode(row: Callable[..., None]) -> None:
    """A step in a CUDA graph, however its list is split; a copy of half the bytes moves as many in all."""
    for shape in map(dict, block_attention.cases.decode_shapes):
        given = drawn(shape, torch.bfloat16)
        read = shape["B"] * shape["N"] * shape["L"] * shape["block"] * (shape["K"] + shape["V"]) * 2
        source = torch.empty(read // 2, dtype=torch.uint8, device=DEVICE)
        target = torch.empty_like(source)
        row("copy of the bytes", "decode_graph", shape, lambda: target.copy_(source))  # noqa: B023
        for splits in SPLITS:
            with tuning(splits=splits):
                row(f"heddle, splits {splits}", "decode_graph", shape, lambda: ours(**given))  # noqa: B023
        row("heddle", "decode_graph", shape, lambda: ours(**given))  # noqa: B023
        row("heddle", "decode", shape, lambda: ours(**given))  # noqa: B023


def gated(log: Log, row: Callable[..., None], late: Callable[[], bool]) -> None:
    """Blocks behind gates; the same blocks as marks of each query, whose tiles hold eight; dense attention; and launches."""
    given, generator = drawn(GATED, torch.bfloat16), torch.Generator(DEVICE).manual_seed(3)
    del given["listed"]
    blocks = torch.arange(GATED["T"] // GATED["block"], device=DEVICE)
    gates = (torch.rand(1, GATED["N"], len(blocks), generator=generator, device=DEVICE) > 0.75).float()
    own = torch.arange(GATED["T"], device=DEVICE)[:, None] // GATED["block"] == blocks
    forms = {"gates": {"gates": gates.requires_grad_()}, "marks": {"chosen": (gates[:, :, None] > 0.5) | own}}
    for (form, choice), phase in itertools.product(forms.items(), ("fwd", "fwdbwd")):
        row(f"heddle, {form}", phase, GATED, phases(ours, given | choice)[phase])
    for phase, call in phases(dense, given).items():
        row("cudnn", phase, GATED, call)
    sweep_gated(log, row, late, phases(ours, given | forms["gates"])["fwdbwd"])


def sweep_gated(
    log: Log, row: Callable[..., None], late: Callable[[], bool], call: Callable[[], object]
) -> None:
    """Launches of the gradients behind gates, pairs whose tiles are as tall: whether each is right, and its time."""
    small = drawn({**LONG, "H": 4, "N": 4, "K": 64, "V": 64}, torch.bfloat16)
    drawn_gates = torch.rand(1, 4, 24, generator=torch.Generator(DEVICE).manual_seed(3), device=DEVICE)
    small |= {"gates": (drawn_gates > 0.75).float()}
    del small["listed"]
    exact = results(block_attention, small, torch.float64, str(DEVICE))
    pairs = itertools.product(*(TRIED_GATED[name] for name in ("gated_queries", "gated_keys")))
    for queries, keys in pairs:
        if late():
            log("gates: out of time")
            return
        if queries.chunk != keys.chunk:
            continue
        launches = {"gated_queries": queries, "gated_keys": keys}
        try:
            if judge(log, f"gates, {queries}, {keys}", small, exact, **launches):
                with tuning(**launches):
                    row(f"heddle, gates, {queries}, {keys}", "fwdbwd", GATED, call)
        except Exception as error:
            log(f"none  gates {queries} {keys}: {' '.join(str(error).split())[-200:]}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--budget", type=float, default=400.0, help="seconds after which nothing new is begun"
    )
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the log")
    parser.add_argument(
        "--skip", nargs="*", default=[], choices=["correctness", "decode", "gates", "speed", "sweep"]
    )
    parser.add_argument("--commit", help="what the code is")
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    begin, log, header = (
        time.monotonic(),
        Log(chosen.out / "block_attention_check.log"),
        machine(DEVICE) | ({"commit": chosen.commit} if chosen.commit else {}),
    )

    def row(impl: str, phase: str, shape: dict[str, int], call: Callable[[], object]) -> None:
        call()
        times = timed_in_graph(call) if phase == "decode_graph" else timed(call, DEVICE)
        about: Row = {
            "op": "block_attention",
            "impl": impl,
            "phase": phase,
            "shape": shape,
            "dtype": "bfloat16",
        }
        with (chosen.out / "evidence-block-attention.jsonl").open("a") as file:
            file.write(json.dumps({**header, **about, **times}) + "\n")
        sizes = " ".join(
            f"{name}={size}" for name, size in shape.items() if name in ("B", "T", "L", "shared")
        )
        log(f"{phase:12} {sizes:32} {times['ms']:9.4f} ms  {impl}")

    def late(share: float) -> Callable[[], bool]:
        return lambda: time.monotonic() - begin > share * chosen.budget

    steps: dict[str, Callable[[], None]] = {
        "correctness": lambda: correctness(log, late(0.4)),
        "decode": lambda: decode(row),
        "gates": lambda: gated(log, row, late(0.9)),
        "speed": lambda: compare_speed(log, row, late(0.8)),
        "sweep": lambda: sweep(log, row, late(1.0)),
    }
    for name, run in steps.items():
        if name not in chosen.skip:
            run()
            log(f"{name} done after {time.monotonic() - begin:.0f} s")
    for line in (*log.wrong, f"{len(log.wrong)} wrong, {time.monotonic() - begin:.0f} s"):
        log(line)
    return 1 if log.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
