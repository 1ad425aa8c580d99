"""How far an op is from its reference, and how far it may be: measured, not chosen.

    err(fast) ≤ 2 err(baseline) + ε

The oracle is the reference in float64 on inputs already rounded to the dtype. The baseline of a Triton path is the torch
path; that of a torch path is the oracle itself, rounded to the dtype of the output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from heddle.kernels.op import Op, Path, force_path, normal, watch_paths, wide_dtype

EPSILON = {torch.float32: 2e-6, torch.float16: 2e-4, torch.bfloat16: 1e-3, torch.float64: 1e-9}
# Tokens whose error is taken together.
BLOCK = 64


@dataclass(frozen=True, slots=True)
class Sample:
    """Arguments of an op by name, and the gradients that flow back into its two results."""

    dtype: torch.dtype
    arguments: dict[str, Tensor]
    wanted: tuple[str, ...]
    upstream: tuple[Tensor, Tensor]

    def to(self, device: torch.device | str) -> Sample:
        """The same on another device."""
        arguments = {name: tensor.to(device) for name, tensor in self.arguments.items()}
        first, second = self.upstream
        return Sample(self.dtype, arguments, self.wanted, (first.to(device), second.to(device)))


@dataclass(frozen=True, slots=True)
class Measured:
    """One result of one path: its error, that of the baseline, and the most it may be."""

    name: str
    path: Path
    error: float
    baseline: float
    bound: float
    worst: str

    @property
    def ok(self) -> bool:
        # A baseline that is not finite allows nothing.
        return self.error <= self.bound < float("inf")

    def __str__(self) -> str:
        verdict = "ok" if self.ok else f"too far, {self.worst}"
        return f"{self.name} ({self.path}): {self.error:.2e}, at most {self.bound:.2e}: {verdict}"


def draw(
    op: Op[..., Any],
    shape: Mapping[str, int],
    dtype: torch.dtype,
    *,
    seed: int = 0,
    initial_state: bool = True,
    cu_seqlens: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
) -> Sample:
    """A random sample, rounded to `dtype`; a seed means the same numbers on one kind of device."""
    generator = torch.Generator(device).manual_seed(seed)
    traits = op.cases
    arguments = {
        name: tensor.to(dtype if name in traits.rounded else wide_dtype(dtype))
        for name, tensor in traits.inputs(shape, generator).items()
    }
    count = shape["B"] if cu_seqlens is None else len(cu_seqlens) - 1
    state = traits.initial_state({**shape, "B": count}, generator)
    state_dtype = dtype if traits.rounded_state else wide_dtype(dtype)
    if initial_state:
        arguments["initial_state"] = state.to(state_dtype)
    if cu_seqlens is not None:
        arguments["cu_seqlens"] = torch.tensor(cu_seqlens, dtype=torch.int32, device=device)
    out = arguments[traits.output_like]
    upstream = normal(generator, *out.shape).to(dtype)
    d_state = normal(generator, *state.shape).to(state_dtype)
    wanted = tuple(name for name in (*traits.differentiable, "initial_state") if name in arguments)
    return Sample(dtype, arguments, wanted, (upstream, d_state))


def results(function: Callable[..., tuple[Tensor, Tensor]], sample: Sample) -> dict[str, Tensor]:
    """Output, final state and every gradient, by name."""
    arguments = {
        name: tensor.detach().clone().requires_grad_(name in sample.wanted)
        for name, tensor in sample.arguments.items()
    }
    found = function(**arguments)
    upstream = [gradient.to(result.dtype) for gradient, result in zip(sample.upstream, found, strict=True)]
    gradients = torch.autograd.grad(found, [arguments[name] for name in sample.wanted], upstream)
    named = {f"d_{name}": gradient for name, gradient in zip(sample.wanted, gradients, strict=True)}
    return {"out": found[0].detach(), "final_state": found[1].detach(), **named}


def oracle(op: Op[..., Any], sample: Sample) -> dict[str, Tensor]:
    """The results of the reference, in float64 on the CPU."""
    here = sample.to("cpu")
    exact = {name: x.double() if x.is_floating_point() else x for name, x in here.arguments.items()}
    return results(op.reference, Sample(torch.float64, exact, here.wanted, here.upstream))


def compare(op: Op[..., Any], sample: Sample, device: torch.device | str) -> list[Measured]:
    """Every result of the path that `op` takes on `device`, beside its bound."""
    there, exact = sample.to(device), oracle(op, sample)
    with watch_paths() as seen:
        found = results(op, there)
    path = seen[-1][1]
    if path == "triton":
        with force_path("torch"):
            baseline = results(op, there)
    else:
        baseline = {name: exact[name].to(tensor.dtype) for name, tensor in found.items()}
    return [_measure(name, path, found[name], baseline[name], exact[name], sample.dtype) for name in found]


def _measure(
    name: str, path: Path, found: Tensor, baseline: Tensor, exact: Tensor, dtype: torch.dtype
) -> Measured:
    timed = is_timed(name)
    error, worst = worst_error(found, exact, timed=timed)
    allowed, _ = worst_error(baseline, exact, timed=timed)
    return Measured(name, path, error, allowed, 2 * allowed + EPSILON[dtype], worst)


def is_timed(name: str) -> bool:
    """Whether a result has a time axis: a state has none, nor has the gradient of one or of a parameter."""
    return name not in ("final_state", "d_initial_state", "d_weight")


def worst_error(found: Tensor, exact: Tensor, *, timed: bool) -> tuple[float, str]:
    """The worst relative norm over (sequence, head, block of tokens), and where it is with the worst pair of values.

    The norm of a block is floored by the tensor's root mean square, so that a block of nearly nothing counts little.

    Shapes:  timed: [B, T, H, *] or [B, T, *];  otherwise [N, H, ...] or [..., *]
    """
    found, exact = found.detach().double().cpu(), exact.detach().double().cpu()
    if found.shape != exact.shape:
        return float("inf"), f"shape {list(found.shape)} instead of {list(exact.shape)}"
    if not bool(torch.isfinite(found).all()):
        return float("inf"), f"not finite at {_first(~torch.isfinite(found))}"
    if not bool(torch.isfinite(exact).all()):
        return float("inf"), f"what it is held to is not finite at {_first(~torch.isfinite(exact))}"
    difference, floor = (found - exact).abs(), exact.square().mean().sqrt()
    errors = torch.stack([
        part.norm() / (whole.square().mean().sqrt().maximum(floor) * whole.numel() ** 0.5).clamp_min(1e-300)
        for part, whole in zip(_blocks(difference, timed), _blocks(exact, timed), strict=True)
    ])  # fmt: skip
    place = _first(difference == difference.max())
    text = f"worst at {place}: {float(found[place]):.6g} instead of {float(exact[place]):.6g}"
    return float(errors.max()), text


def _blocks(x: Tensor, timed: bool) -> list[Tensor]:
    if not timed:
        return list(x.flatten(0, -3)) if x.dim() > 2 else [x]
    x = x if x.dim() == 4 else x[..., None]
    starts = range(0, x.shape[1], BLOCK)
    return [x[n, t : t + BLOCK, h] for t in starts for n in range(x.shape[0]) for h in range(x.shape[2])]


def _first(mask: Tensor) -> tuple[int, ...]:
    return tuple(int(index) for index in mask.nonzero()[0])
