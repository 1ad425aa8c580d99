"""A quick numeric check of every op on a device: what `heddle doctor` runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from heddle.kernels import OPS
from heddle.kernels.accuracy import compare, draw
from heddle.kernels.op import Op, Path

# Long enough for a whole chunk and a part of one.
TOKENS = 100
SIZES = {"B": 2, "H": 2, "HV": 2, "K": 32, "V": 32, "C": 32, "W": 4, "T": TOKENS}


@dataclass(frozen=True, slots=True)
class SelfTest:
    """One op on one device in one dtype: the path it took, its worst error, and that of the baseline."""

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
    """Every op against its reference, output and gradients; on the GPU if there is one and no device is named."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtypes = [torch.float32, torch.bfloat16] if device.type == "cuda" else [torch.float32]
    return [_test(op, device, dtype) for op in OPS for dtype in dtypes]


def _test(op: Op[..., Any], device: torch.device, dtype: torch.dtype) -> SelfTest:
    measured = compare(op, draw(op, SIZES, dtype), device)
    worst = max(measured, key=lambda one: one.error / one.bound)
    name = str(dtype).removeprefix("torch.")
    return SelfTest(op.name, worst.path, name, worst.error, worst.baseline, all(one.ok for one in measured))
