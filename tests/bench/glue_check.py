"""One call on a GPU machine: what stands between products and recurrences, the short convolution and the norms, and whole layers.

    python tests/bench/glue_check.py --out "$OUT" --budget 300 --commit "$(git rev-parse --short=12 HEAD)"
    python tests/bench/glue_check.py --out /tmp/glue --budget 60 --commit none --tiny

Times causal_conv1d and rms_norm in both directions, in Triton and in plain torch, beside flash-linear-attention's where that is
installed and torch's fused norm, each launch after it was held to the reference, and layers of Gated DeltaNet, KDA and GLA as
they are built, with those two ops in torch and in Triton, beside that library's layer of the same sizes. The floor is the bytes
at the speed of a large copy. Right or wrong in all dtypes and sizes is what `pytest -m gpu -k "causal_conv1d or rms_norm"` says.
Writes glue_check.log and rows to evidence-glue.jsonl; exits with 1 if anything was wrong. `--tiny`: small, on a CPU, no launches.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from heddle.kernels.accuracy import EPSILON, worst_error
from heddle.kernels.bench import machine
from heddle.kernels.causal_conv1d import causal_conv1d, causal_conv1d_reference
from heddle.kernels.common.tuning import tuning
from heddle.kernels.configs.launch import Launch
from heddle.kernels.op import TRITON_DTYPES, Op
from heddle.kernels.rms_norm import rms_norm, rms_norm_reference
from heddle.specs import MIXERS
from heddle.specs import Site as SpecSite

HALF = torch.float32 if TINY else torch.bfloat16
SIZES = ((1, 64),) if TINY else ((8, 4096), (1, 32768), (1, 131072))
CHANNELS, HEADS, SIZE = (96, 2, 16) if TINY else (6144, 16, 128)
GLUE: tuple[Op[..., Any], ...] = (causal_conv1d, rms_norm)


def variants(chunks: tuple[int, ...], columns: tuple[int, ...]) -> list[Launch]:
    return [Launch(*one, 1) for one in itertools.product(chunks, columns, (4, 8))]


CONV_FORWARD = variants((16, 32, 64), (64, 128, 256))
CONV_BACKWARD = variants((8, 16, 32), (64, 128, 256))
NORM_FORWARD = variants((1,), (1024, 2048, 4096, 8192))
NORM_BACKWARD = variants((4, 16), (1024, 2048, 4096, 8192))


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


def held(
    log: Log, name: str, call: Callable[..., Tensor], reference: Callable[..., Tensor], leaves: list[Tensor]
) -> bool:
    """Whether output and gradients are right, told."""

    def results(function: Callable[..., Tensor], given: list[Tensor]) -> list[Tensor]:
        given = [x.detach().requires_grad_() for x in given]
        out = function(*given)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(HALF)
        return [out.detach(), *torch.autograd.grad(out, given, upstream.to(out))]

    try:
        found = results(call, leaves)
    except Exception as error:
        log(f"none  {name}: {' '.join(str(error).split())[-200:]}")
        return False
    exact = results(reference, [x.double() for x in leaves])
    with force_path("torch"):
        plain = results(call, leaves)
    for one, base, truth in zip(found, plain, exact, strict=True):
        error, allowed = (worst_error(x, truth, timed=False)[0] for x in (one, base))
        if error > 2 * allowed + EPSILON[HALF]:
            log.wrong.append(f"{name}: {error:.2e}, at most {2 * allowed + EPSILON[HALF]:.2e}")
            log(f"WRONG {log.wrong[-1]}")
            return False
    return True


def launches(rows: Rows, log: Log, late: Callable[[], bool]) -> None:
    """Each launch where it is right, at the middle size."""
    B, T = SIZES[1]
    x, weight = drawn(B, T, CHANNELS), drawn(CHANNELS, 4)
    small, taps = drawn(2, 300, 200), drawn(200, 4)
    conv = partial(causal_conv1d, activation="silu")
    rows_of, gates, scale = drawn(B, T, HEADS, SIZE), drawn(B, T, HEADS, SIZE), drawn(SIZE)
    few, few_gates = drawn(2, 77, 3, SIZE), drawn(2, 77, 3, SIZE)

    def norm(x: Tensor, weight: Tensor, gate: Tensor, function: Any = rms_norm) -> Tensor:
        return function(x, weight, gate=gate, eps=1e-6)  # type: ignore[no-any-return]

    plans: list[tuple[str, list[Launch], str, Any, Any, list[Tensor], list[Tensor]]] = [
        ("conv_forward", CONV_FORWARD, "fwd", lambda x, w: conv(x, w)[0],
         lambda x, w: causal_conv1d_reference(x, w, activation="silu")[0], [small, taps], [x, weight]),
        ("conv_backward", CONV_BACKWARD, "fwdbwd", lambda x, w: conv(x, w)[0],
         lambda x, w: causal_conv1d_reference(x, w, activation="silu")[0], [small, taps], [x, weight]),
        ("norm_forward", NORM_FORWARD, "fwd", norm, partial(norm, function=rms_norm_reference), [few, scale, few_gates],
         [rows_of, scale, gates]),
        ("norm_backward", NORM_BACKWARD, "fwdbwd", norm, partial(norm, function=rms_norm_reference),
         [few, scale, few_gates], [rows_of, scale, gates]),
    ]  # fmt: skip
    for name, tried, phase, call, reference, leaves, large in plans:
        best: list[tuple[float, Launch]] = []
        for launch in tried:
            if late():
                return
            with tuning(**{name: launch}):
                if held(log, f"{name} {launch}", call, reference, leaves):
                    timing = both_ways(partial(call, *large), large)[phase]
                    label = f"{launch.chunk} x {launch.columns}, {launch.warps} warps"
                    ms = rows((name, label, phase), {"B": B, "T": T}, timing)
                    best.append((ms, launch))
        for ms, launch in sorted(best, key=lambda pair: pair[0])[:3]:
            log(f"best  {name}: {ms:.4f} ms, {launch}")


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
        if not TINY:
            launches(rows, log, late)
    log(f"ops after {time.monotonic() - begin:.0f} s")
    for B, T in SIZES:
        if not late():
            layers(B, T, rows, late)
    for line in (*log.wrong, f"{len(log.wrong)} wrong, {time.monotonic() - begin:.0f} s"):
        log(line)
    return 1 if log.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
