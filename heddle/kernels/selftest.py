"""A quick numeric check of every op on a device: what `heddle doctor` runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from heddle.kernels import OPS
from heddle.kernels.accuracy import Measured, Sample, compare, draw, is_timed, oracle, results, worst_error
from heddle.kernels.op import Op, Path

# Long enough for a whole chunk and a part of one.
TOKENS = 100
SIZES = {"B": 2, "H": 2, "HV": 2, "K": 32, "V": 32, "C": 32, "W": 4, "T": TOKENS}


@dataclass(frozen=True, slots=True)
class SelfTest:
    """One op, or its decode step, on one device in one dtype: the path it took, its worst error, and that of the baseline."""

    op: str
    path: Path
    dtype: str
    error: float
    baseline: float
    ok: bool

    @property
    def detail(self) -> str:
        """One line for a terminal."""
        return f"{self.path} path, {self.dtype}: error {self.error:.1e}, baseline {self.baseline:.1e}"


def self_test(device: torch.device | str | None = None) -> list[SelfTest]:
    """Every op and every decode step against the reference, output and gradients; on the GPU if there is one and no device
    is named."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtypes = [torch.float32, torch.bfloat16] if device.type == "cuda" else [torch.float32]
    return [found for op in OPS for dtype in dtypes for found in check_op(op, device, dtype)]


def check_op(op: Op[..., Any], device: torch.device, dtype: torch.dtype) -> Iterator[SelfTest]:
    """One op against its reference, and its step if it has one."""
    yield _worst(op.name, dtype, compare(op, draw(op, SIZES, dtype), device))
    if op.step is not None:
        sample = draw(op, {**SIZES, "T": 1}, dtype)
        yield _worst(f"{op.name}_step", dtype, _compare_step(op, op.step, sample, device))


def _compare_step(
    op: Op[..., Any], step: Callable[..., tuple[Tensor, Tensor]], sample: Sample, device: torch.device
) -> list[Measured]:
    """The step on one token, within the bounds of the whole op on it: their backward pass is one."""

    def one_token(*, initial_state: Tensor, **rest: Tensor) -> tuple[Tensor, Tensor]:
        return step(**rest, state=initial_state)

    found, exact = results(one_token, sample.to(device)), oracle(op, sample)
    return [
        replace(one, error=error, worst=worst)
        for one in compare(op, sample, device)
        for error, worst in [worst_error(found[one.name], exact[one.name], timed=is_timed(one.name))]
    ]


def _worst(name: str, dtype: torch.dtype, measured: list[Measured]) -> SelfTest:
    # Of what is too far one that is: of infinities the share may be NaN.
    worst = max(measured, key=lambda one: (not one.ok, one.error / one.bound))
    told = str(dtype).removeprefix("torch.")
    return SelfTest(name, worst.path, told, worst.error, worst.baseline, all(one.ok for one in measured))
