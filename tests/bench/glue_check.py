"""One call on a GPU machine: what stands between products and recurrences, the short convolution and the norms, and whole layers.

    python tests/bench/glue_check.py --out "$OUT" --budget 300 --commit "$(git rev-parse --short=12 HEAD)"
    python tests/bench/glue_check.py --out /tmp/glue --budget 60 --commit none --tiny

Times causal_conv1d and rms_norm in both directions, in Triton and in plain torch, beside flash-linear-attention's where that is
installed and torch's fused norm, each launch after it was held to the reference at a small size and to plain torch in float64 at
the size that is timed, and found the same to the bit by two runs; and layers of Gated DeltaNet, KDA and GLA as they are built,
with those two ops in torch and in Triton, beside that library's layer of the same sizes. The floor is the bytes at the speed of a
large copy. Right or wrong in all dtypes and sizes is what `pytest -m gpu -k "causal_conv1d or rms_norm"` says. Writes
glue_check.log and rows to evidence-glue.jsonl, and a short table last; exits with 1 if anything was wrong. `--tiny`: small, on a
CPU, one launch each.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_check import Log
from rat_check import DEVICE, TINY, Rows
from torch import Tensor
from torch.nn import functional as F

from heddle.compose.cache import Call
from heddle.compose.init import initialise
from heddle.compose.modules.layer import make_mixer
from heddle.compose.modules.site import Site
from heddle.kernels import force_path
from heddle.kernels.accuracy import EPSILON
from heddle.kernels.bench import machine
from heddle.kernels.causal_conv1d import causal_conv1d, causal_conv1d_reference
from heddle.kernels.common.tuning import tuning
from heddle.kernels.configs.launch import Launch
from heddle.kernels.op import TRITON_DTYPES, Op
from heddle.kernels.rms_norm import rms_norm, rms_norm_reference
from heddle.specs import MIXERS
from heddle.specs import Site as SpecSite

HALF = torch.float32 if TINY else torch.bfloat16
SIZES = ((1, 64),) if TINY else ((8, 4096), (1, 32768), (1, 131072), (2, 1024))
CHANNELS, HEADS, SIZE = (96, 2, 16) if TINY else (6144, 16, 128)
# Times of ops and their ratio to ours, told last.
TABLE: list[str] = []
GLUE: tuple[Op[..., Any], ...] = (causal_conv1d, rms_norm)


def variants(chunks: tuple[int, ...], columns: tuple[int, ...]) -> list[Launch]:
    return [Launch(*one, 1) for one in itertools.product(chunks, columns, (4, 8))]


TRIED: dict[str, list[Launch | int]] = {
    # Two to eight channels a thread.
    "conv_forward": [
        *(Launch(chunk, columns, 4, 1) for chunk in (8, 16) for columns in (256, 512, 1024)),
        Launch(4, 512, 4, 1), Launch(8, 1024, 8, 1), Launch(8, 256, 2, 1),
    ],
    "conv_backward": [
        *(Launch(chunk, columns, 4, 1) for chunk in (4, 8) for columns in (256, 512)),
        Launch(16, 256, 4, 1), Launch(4, 1024, 8, 1), Launch(4, 256, 2, 1), Launch(8, 256, 2, 1),
        Launch(4, 512, 4, 1, 96), Launch(8, 512, 4, 1, 128),
    ],
    "conv_tokens": [64, 128, 256, 372],
    "norm_forward": [*variants((1,), (1024, 2048, 4096, 8192))],
    "norm_backward": [*variants((4, 16), (1024, 2048, 4096, 8192))],
}  # fmt: skip


def both_ways(function: Callable[[], Tensor], leaves: list[Tensor]) -> dict[str, Callable[[], object]]:
    """A forward pass, and one with all gradients."""
    with torch.no_grad():
        upstream = torch.randn_like(function())

    def forward() -> object:
        with torch.no_grad():
            return function()

    return {"fwd": forward, "fwdbwd": lambda: torch.autograd.grad(function(), leaves, upstream)}


def drawn(*size: int) -> Tensor:
    return torch.randn(*size, device=DEVICE, dtype=HALF, requires_grad=True)


def conv_calls(B: int, T: int, rows: Rows) -> None:
    x, weight = drawn(B, T, CHANNELS), drawn(CHANNELS, 4)
    shape, element = {"B": B, "T": T, "C": CHANNELS, "W": 4}, x.element_size()
    impls: dict[str, Callable[[], Tensor]] = {
        "heddle": lambda: causal_conv1d(x, weight, activation="silu")[0],
        "torch": in_torch(lambda: causal_conv1d(x, weight, activation="silu")[0]),
    }
    try:
        from fla.modules.convolution import causal_conv1d as rival

        impls["fla"] = lambda: rival(x, weight, activation="silu")[0]
    except ImportError:
        pass
    timed_beside(rows, "causal_conv1d", shape, impls, [x, weight], x.numel() * element)


def norm_calls(B: int, T: int, rows: Rows) -> None:
    x, gate, weight = drawn(B, T, HEADS, SIZE), drawn(B, T, HEADS, SIZE), drawn(SIZE)
    shape = {"B": B, "T": T, "H": HEADS, "K": SIZE}
    impls: dict[str, Callable[[], Tensor]] = {
        "heddle": lambda: rms_norm(x, weight, gate=gate, eps=1e-6),
        "torch": in_torch(lambda: rms_norm(x, weight, gate=gate, eps=1e-6)),
        "torch, fused norm": lambda: F.rms_norm(x, (SIZE,), weight, 1e-6) * F.silu(gate),
    }
    try:
        from fla.modules.fused_norm_gate import rms_norm_gated as rival

        impls["fla"] = lambda: rival(x, gate, weight, None, activation="swish", eps=1e-6)
    except ImportError:
        pass
    timed_beside(rows, "rms_norm", shape, impls, [x, weight, gate], 1.5 * x.numel() * x.element_size())


def in_torch(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def forced() -> Tensor:
        with force_path("torch"):
            return call()

    return forced


def timed_beside(
    rows: Rows, op: str, shape: dict[str, int], impls: dict[str, Callable[[], Tensor]], leaves: list[Tensor],
    one: float,
) -> None:  # fmt: skip
    """`one`: bytes that a forward pass reads, half of what it moves."""
    for name, impl in impls.items():
        for phase, call in both_ways(impl, leaves).items():
            least = (0.0, (2.0 if phase == "fwd" else 5.0) * one)
            rows.attempt((op, name, phase), shape, call, least)
    for phase in ("fwd", "fwdbwd"):
        ms = {name: rows.ms.pop((op, name, phase, str(shape["B"])), 0.0) for name in impls}
        rivals = (f"{name} {ms[name]:8.4f} ({ms[name] / ms['heddle']:.2f})" for name in impls if ms["heddle"])
        TABLE.append(f"{op:13} {shape['B']} x {shape['T']:6} {phase:6} ms: {', '.join(rivals)}")


@contextmanager
def glue(path: str) -> Iterator[None]:
    """The two ops in torch, or in Triton unasked, all others as they are."""
    before = [op.unproven for op in GLUE]
    for op in GLUE:
        object.__setattr__(op, "unproven", TRITON_DTYPES if path == "torch" else ())
    try:
        yield
    finally:
        for op, old in zip(GLUE, before, strict=True):
            object.__setattr__(op, "unproven", old)


def layer(kind: str, width: int, **sizes: int) -> torch.nn.Module:
    spec = MIXERS[kind].model_validate({"kind": kind, **sizes})
    mixer = make_mixer(Site(width, 1, 3), spec.runtime(SpecSite(width, 1, 3)))
    for module in mixer.modules():
        initialise(module, std=width**-0.5)
    return mixer.to(DEVICE, HALF)


def layers(B: int, T: int, rows: Rows, late: Callable[[], bool]) -> None:
    width = HEADS * SIZE
    x, shape = drawn(B, T, width), {"B": B, "T": T, "hidden": width}
    places = torch.arange(T, device=DEVICE).expand(B, T)
    for kind in ("gated_deltanet", "kda", "gla"):
        mixer = layer(kind, width, heads=HEADS, head_dim=SIZE)
        for path in ("torch", "triton"):
            with glue(path):
                calls = both_ways(lambda mixer=mixer: mixer(x, Call(places)), [x, *mixer.parameters()])
                for phase, call in calls.items():
                    rows.attempt((f"layer {kind}", f"heddle, glue in {path}", phase), shape, call)
        if late():
            return
    for kind, rival in rivals(width):
        rival.to(DEVICE, HALF)
        calls = both_ways(lambda rival=rival: rival(x)[0], [x, *rival.parameters()])
        for phase, call in calls.items():
            rows.attempt((f"layer {kind}", "fla", phase), shape, call)
        if late():
            return


def rivals(width: int) -> Iterator[tuple[str, Any]]:
    """That library's layers, as they are built when they are used."""
    try:
        from fla.layers import GatedDeltaNet, GatedLinearAttention
    except ImportError:
        return
    yield (
        "gated_deltanet",
        GatedDeltaNet(hidden_size=width, expand_v=1, head_dim=SIZE, num_heads=HEADS, mode="chunk"),
    )
    yield (
        "gla",
        GatedLinearAttention(hidden_size=width, expand_k=1.0, expand_v=1.0, num_heads=HEADS, mode="chunk"),
    )


@dataclass
class Case:
    """An op with its arguments, how far plain torch is from what is exact, and what that is."""

    call: Callable[..., Tensor]
    leaves: list[Tensor]
    exact: list[Tensor]
    allowed: list[float]

    def results(self) -> list[Tensor]:
        return results(self.call, self.leaves)


def results(function: Callable[..., Tensor], given: list[Tensor]) -> list[Tensor]:
    """Output and gradients."""
    given = [x.detach().requires_grad_() for x in given]
    out = function(*given)
    upstream = torch.randn(out.shape, generator=torch.Generator(DEVICE).manual_seed(1), device=DEVICE)
    return [out.detach(), *torch.autograd.grad(out, given, upstream.to(HALF).to(out))]


def farthest(found: Tensor, exact: Tensor) -> float:
    """The norm of the error in the worst row over that of a row whose numbers are as large as all are in the mean."""
    errors = (found.double() - exact).norm(dim=-1)
    return float(errors.max() / (exact.norm() / errors.numel() ** 0.5))


def case(call: Callable[..., Tensor], exactly: Callable[..., Tensor], leaves: list[Tensor]) -> Case:
    with force_path("torch"):
        exact = results(exactly, [x.double() for x in leaves])
        plain = results(call, leaves)
    errors = [farthest(x, truth) for x, truth in zip(plain, exact, strict=True)]
    return Case(call, leaves, exact, [2 * error + EPSILON[HALF] for error in errors])


def held(log: Log, name: str, cases: list[Case]) -> bool:
    """Whether output and gradients are right, and two runs the same to the bit; told where not."""
    for each in cases:
        try:
            found, again = each.results(), each.results()
        except Exception as error:
            log(f"none  {name}: {' '.join(str(error).split())[-200:]}")
            return False
        about = f"{name}, {'x'.join(map(str, each.leaves[0].shape))}"
        if not all(map(torch.equal, found, again)):
            log.wrong.append(f"{about}: two runs differ")
        for one, truth, allowed in zip(found, each.exact, each.allowed, strict=True):
            error = farthest(one, truth)
            if not error <= allowed:
                log.wrong.append(f"{about}: {error:.2e}, at most {allowed:.2e}")
        if log.wrong and log.wrong[-1].startswith(about):
            log(f"WRONG {log.wrong[-1]}")
            return False
    return True


def cases_of(op: str) -> list[Case]:
    """One that is small and ragged, against the reference, and one as it is timed, against plain torch in float64."""
    B, T = SIZES[1 % len(SIZES)]
    if op == "conv":

        def call(x: Tensor, weight: Tensor, function: Any = causal_conv1d) -> Tensor:
            return function(x, weight, activation="silu")[0]  # type: ignore[no-any-return]

        exactly = partial(call, function=causal_conv1d_reference)
        small, large = (
            [drawn(2, 300, 1104), drawn(1104, 4)],
            [drawn(B, T, CHANNELS), drawn(CHANNELS, 4)],
        )
    else:

        def call(x: Tensor, weight: Tensor, gate: Tensor, function: Any = rms_norm) -> Tensor:
            return function(x, weight, gate=gate, eps=1e-6)  # type: ignore[no-any-return]

        exactly = partial(call, function=rms_norm_reference)
        small, large = (
            [drawn(*size, HEADS, SIZE), drawn(SIZE), drawn(*size, HEADS, SIZE)] for size in ((2, 77), (B, T))
        )
    return [case(call, exactly, small), case(call, call, large)]


def launches(rows: Rows, log: Log, op: str, late: Callable[[], bool]) -> None:
    """Each launch of an op where it is right, at the middle size, beside those found best before it."""
    (B, T), cases, best = SIZES[1 % len(SIZES)], cases_of(op), dict[str, Any]()
    if not held(log, f"{op}, as it is set", cases):
        return
    for name in (name for name in TRIED if name.startswith(op)):
        times: list[tuple[float, int]] = []
        phase = "fwd" if name.endswith("forward") else "fwdbwd"
        for index, launch in enumerate(TRIED[name][: 1 if TINY else None]):
            if late():
                return
            with tuning(**best, **{name: launch}):
                if held(log, f"{name} {launch}", cases):
                    call, leaves = cases[-1].call, cases[-1].leaves
                    timing = both_ways(partial(call, *leaves), leaves)[phase]
                    times.append((rows((name, told(launch), phase), {"B": B, "T": T}, timing), index))
        for ms, index in sorted(times)[:3]:
            log(f"best  {name}: {ms:.4f} ms, {TRIED[name][index]}")
        if times:
            best[name] = TRIED[name][min(times)[1]]


def told(launch: Launch | int) -> str:
    if isinstance(launch, int):
        return f"{launch} tokens"
    few = "" if launch.registers is None else f", {launch.registers} registers"
    return f"{launch.chunk} x {launch.columns}, {launch.warps} warps{few}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--budget", type=float, default=300.0, help="seconds after which nothing new is begun"
    )
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the log and the rows")
    parser.add_argument("--commit", default=None, help="what the code is")
    parser.add_argument("--tiny", action="store_true", help="small, on a CPU")
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    begin, log = time.monotonic(), Log(chosen.out / "glue_check.log")
    rows = Rows(log, chosen.out / "evidence-glue.jsonl", {**machine(DEVICE), "commit": chosen.commit})
    rows.ceilings()

    def late() -> bool:
        return time.monotonic() - begin > chosen.budget

    with glue("triton"):
        for B, T in SIZES:
            conv_calls(B, T, rows)
            norm_calls(B, T, rows)
        for op in ("conv", "norm"):
            launches(rows, log, op, late)
    log(f"ops after {time.monotonic() - begin:.0f} s")
    for B, T in SIZES:
        if not late():
            layers(B, T, rows, late)
    for line in (*TABLE, *log.wrong, f"{len(log.wrong)} wrong, {time.monotonic() - begin:.0f} s"):
        log(line)
    return 1 if log.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
