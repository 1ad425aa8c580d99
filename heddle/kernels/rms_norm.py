"""Root-mean-square norms of rows, with a gate: the op, its reference and its path in plain torch.

Predicted cost: bound by memory everywhere; plain torch makes some eight passes over numbers of four bytes, a kernel one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from heddle.errors import HeddleError
from heddle.kernels.op import Inputs, Shape, Traits, are_plain, check_tensors, normal, op, wide_dtype

try:
    from heddle.kernels._rms_norm_op import kernels

    HAS_KERNELS = True
except ImportError:
    HAS_KERNELS = False

# A program of the kernels holds whole rows.
MAX_SIZE = 8192
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "sigmoid": torch.sigmoid}


def rms_norm_reference(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    gate: Tensor | None = None,
    activation: str = "silu",
    eps: float = 1e-6,
    mean: bool = True,
) -> Tensor:
    """`rms_norm` in float64, by vectors; shares nothing with it."""
    x = x.double()
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    y = x / torch.sqrt(length**2 / (x.shape[-1] if mean else 1) + eps)
    y = y if weight is None else y * weight.double()
    if gate is None:
        return y
    opened = 1.0 / (1.0 + torch.exp(-gate.double()))
    return y * (opened if activation == "sigmoid" else gate.double() * opened)


def _draw(shape: Shape, generator: torch.Generator) -> Inputs:
    size = (shape["B"], shape["T"], shape["H"], shape["K"])
    return {
        "x": normal(generator, *size),
        "weight": normal(generator, size[-1]),
        "gate": normal(generator, *size),
    }


_CASES = Traits(
    inputs=_draw,
    initial_state=lambda shape, generator: normal(generator, shape["B"], 0),
    sequence=("x", "gate"),
    rounded=("x", "weight", "gate"),
    differentiable=("x", "weight", "gate"),
    output_like="x",
    test_shapes=({"B": 2, "T": 5, "H": 3, "K": 16}, {"B": 1, "T": 7, "H": 1, "K": 100}),
    bench_shapes=({"B": 1, "T": 32768, "H": 16, "K": 128},),
)


def _fits(shape: Shape) -> bool:
    return HAS_KERNELS and shape["K"] <= MAX_SIZE


@op(rms_norm_reference, _CASES, kernel=_fits, limits=f"rows of up to {MAX_SIZE}")
def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    gate: Tensor | None = None,
    activation: str = "silu",
    eps: float = 1e-6,
    mean: bool = True,
) -> Tensor:
    """Root-mean-square norm of the last axis, statistics in float32, scaled and gated.

        y = w x / sqrt(mean(x²) + eps) * activation(gate),   activation silu or sigmoid        (arXiv 1910.07467)

    Without `mean` it is the sum of squares in place of their mean, so that rows have length 1. Compilers and vmap see plain
    torch, which they fuse with what is around it.

    Shapes:  x, gate, y: [..., size];  weight: [size];  y has the dtype of x

    Raises:
        HeddleError: "bad-argument" for shapes that do not fit, or an unknown activation.
    """
    if activation not in ACTIVATIONS:
        raise HeddleError("bad-argument", f"rms_norm: no activation {activation!r}", hint="silu or sigmoid")
    if x.dim() < 1:
        raise HeddleError("bad-argument", "rms_norm: x has no axis, expected [..., size]")
    if weight is not None and weight.shape != x.shape[-1:]:
        found = list(weight.shape)
        raise HeddleError("bad-argument", f"rms_norm: weight has shape {found}, expected [{x.shape[-1]}]")
    if gate is not None and gate.shape != x.shape:
        raise HeddleError(
            "bad-argument", f"rms_norm: gate has shape {list(gate.shape)}, expected {list(x.shape)}"
        )
    check_tensors("rms_norm", {"x": x}, floats={"weight": weight, "gate": gate})
    if (
        are_plain((x, weight, gate))
        and x.numel() > 0
        and rms_norm.choose(x.device, x.dtype, K=x.shape[-1]) == "triton"
    ):
        return kernels(x, weight, gate, activation == "silu", eps, mean)  # type: ignore[no-any-return]
    y = x.to(wide_dtype(x.dtype))
    squares = y.square()
    total = squares.mean(dim=-1, keepdim=True) if mean else squares.sum(dim=-1, keepdim=True)
    y = y * torch.rsqrt(total + eps)
    return gated((y if weight is None else y * weight).to(x.dtype), gate, activation)


def gated(y: Tensor, gate: Tensor | None, activation: str) -> Tensor:
    """y times the activation of its gate, where there is one."""
    return y if gate is None else (y * ACTIVATIONS[activation](gate)).to(y.dtype)
