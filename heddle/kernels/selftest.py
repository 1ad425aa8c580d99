"""A quick numeric check of every op on a device: what `heddle doctor` runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from heddle.kernels import OPS
from heddle.kernels.accuracy import compare, draw
from heddle.kernels.op import Op, Path, Traits

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
    return [_test(each, device, dtype) for op in OPS for each in _forms(op) for dtype in dtypes]


def _forms(op: Op[..., Any]) -> list[Op[..., Any]]:
    """`op`, and its step as an op of its own that takes one token."""
    if op.step is None:
        return [op]
    step = op.step

    def one_token(*, initial_state: Tensor, **rest: Tensor) -> tuple[Tensor, Tensor]:
        return step(**rest, state=initial_state)

    return [op, replace(op, name=f"{op.name}_step", fast=one_token, step=None, cases=_one_token(op.cases))]


def _one_token(cases: Traits) -> Traits:
    return replace(cases, inputs=lambda shape, generator: cases.inputs({**shape, "T": 1}, generator))


def _test(op: Op[..., Any], device: torch.device, dtype: torch.dtype) -> SelfTest:
    measured = compare(op, draw(op, SIZES, dtype), device)
    worst = max(measured, key=lambda one: one.error / one.bound)
    name = str(dtype).removeprefix("torch.")
    return SelfTest(op.name, worst.path, name, worst.error, worst.baseline, all(one.ok for one in measured))
