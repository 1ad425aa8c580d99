"""The backends of torch's dense attention on a GPU, one beside the other: a part of window_check.py."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from gpu_check import Log
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from heddle.kernels.dense_attention import dense_attention
from heddle.kernels.sliding_window_attention import sliding_window_attention

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.bfloat16
WANTED = ("q", "k", "v")
BACKENDS = {
    name: getattr(SDPBackend, f"{name.upper()}_ATTENTION") for name in ("flash", "cudnn", "efficient")
} | {"math": SDPBackend.MATH}
Given = dict[str, Any]
Report = Callable[..., float]


def drawn(shape: dict[str, int], dtype: torch.dtype = HALF, **rest: Any) -> Given:
    """Arguments by name, rounded to `dtype`."""
    inputs = sliding_window_attention.cases.inputs(shape, torch.Generator(DEVICE).manual_seed(0))
    numbers = {name: shape[name] for name in ("window", "sinks") if name in shape}
    return {**{name: x.to(dtype) for name, x in inputs.items()}, **numbers, **rest}


def phases(function: Callable[..., Tensor], given: Given) -> dict[str, Callable[[], object]]:
    """A call forward, and one forward and backward."""
    leaves = {**given, **{name: given[name].detach().requires_grad_() for name in WANTED}}
    upstream = torch.randn_like(given["q"])[..., : given["v"].shape[3]]

    def forward() -> object:
        with torch.no_grad():
            return function(**given)

    def both() -> object:
        return torch.autograd.grad(function(**leaves), [leaves[name] for name in WANTED], upstream)

    return {"fwd": forward, "fwdbwd": both}


def scaled_as_dense(
    *, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool
) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    return scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, enable_gqa=grouped)


def backend(name: str, *, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **rest: Any) -> Tensor:
    with sdpa_kernel(BACKENDS[name]):
        return scaled_as_dense(q=q, k=k, v=v, mask=mask, is_causal=rest.get("is_causal", mask is None))


def attempt(log: Log, row: Report, what: tuple[str, str, str], shape: dict[str, int], call: Any) -> float:
    """The time, or infinity where it does not run."""
    op, impl, phase = what
    try:
        return row(op, impl, phase, shape, call)
    except Exception as error:
        log(f"none  {op} {impl} {phase} {shape}: {' '.join(str(error).split())[-160:]}")
        return float("inf")


def dense_shapes() -> Iterator[tuple[dict[str, int], tuple[str, ...], tuple[str, ...]]]:
    """Shape, backends and phases of causal attention."""
    fused = ("flash", "cudnn", "efficient", "torch", "heddle")
    for K in (128, 64, 256):
        heads = {"H": 16, "N": 16, "K": K, "V": K}
        yield {"B": 8, "T": 4096, "S": 4096, **heads}, (*fused, "math"), ("fwd", "fwdbwd")
        yield {"B": 1, "T": 32768, "S": 32768, **heads}, fused[: 5 if K == 128 else 2], ("fwd", "fwdbwd")
    yield {"B": 1, "T": 131072, "S": 131072, "H": 16, "N": 16, "K": 128, "V": 128}, fused[:3], ("fwd",)
    for B, T, N in ((1, 512, 16), (1, 2048, 16), (8, 4096, 4)):
        heads = {"H": 16, "N": N, "K": 128, "V": 128}
        yield {"B": B, "T": T, "S": T, **heads}, ("flash", "cudnn", "torch", "heddle"), ("fwd", "fwdbwd")


def named(impl: str) -> Callable[..., Tensor]:
    """torch: by its own order; heddle: by that of the table."""
    whole = {"torch": scaled_as_dense, "heddle": dense_attention}
    return whole.get(impl) or partial(backend, impl)


def dense(log: Log, row: Report, late: Callable[[], bool]) -> None:
    for shape, impls, parts in dense_shapes():
        if late():
            log("dense: out of time")
            return
        given = drawn(shape, is_causal=True)
        for impl, phase in itertools.product(impls, parts):
            attempt(log, row, ("dense_attention", impl, phase), shape, phases(named(impl), given)[phase])
    shape = {"B": 8, "T": 4096, "S": 4096, "H": 16, "N": 16, "K": 128, "V": 128, "masked": 1}
    mask = torch.rand(1, 1, 4096, 4096, device=DEVICE) > 0.1
    given = drawn(shape, mask=mask, is_causal=False)
    for impl, phase in itertools.product(("cudnn", "efficient", "torch"), ("fwd", "fwdbwd")):
        attempt(log, row, ("dense_attention", impl, phase), shape, phases(named(impl), given)[phase])
    for B, S, N in ((32, 8192, 16), (1, 131072, 16), (32, 8192, 2)):
        shape = {"B": B, "T": 1, "S": S, "H": 16, "N": N, "K": 128, "V": 128}
        given = drawn(shape, is_causal=False)
        for impl in ("flash", "cudnn", "efficient", "torch"):
            step = phases(named(impl), given)["fwd"]
            attempt(log, row, ("dense_attention", impl, "decode_graph"), shape, step)


def host(log: Log) -> None:
    """Microseconds of the host for a small call, and milliseconds of the first call of a length."""
    given = drawn({"B": 1, "H": 2, "N": 2, "T": 2048, "S": 2048, "K": 64, "V": 64}, is_causal=True)
    for impl in ("torch", "heddle", "cudnn"):
        call = phases(named(impl), given)["fwd"]
        call()
        begin = time.perf_counter()
        for _ in range(200):
            call()
        log(f"host  {impl}: {(time.perf_counter() - begin) / 200 * 1e6:.1f} us a call")
        torch.cuda.synchronize()
    for impl, phase, T in itertools.product(("flash", "cudnn"), ("fwd", "fwdbwd"), (1037, 1411, 3001)):
        shape = {"B": 1, "H": 16, "N": 16, "T": T, "S": T, "K": 128, "V": 128}
        call = phases(named(impl), drawn(shape, is_causal=True))[phase]
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
        log(f"host  {impl} {phase} first call of {T}: {(time.perf_counter() - begin) * 1e3:.2f} ms")
