"""Launches the kernels of local_linear_attention."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.functional import pad

from heddle.kernels._local_linear_bwd import (
    _local_linear_bwd_key_kernel,
    _local_linear_bwd_query_kernel,
    _local_linear_bwd_right_kernel,
)
from heddle.kernels._local_linear_fwd import (
    _local_linear_fwd_mean_kernel,
    _local_linear_fwd_output_kernel,
    _local_linear_solve_kernel,
)
from heddle.kernels.common.layout import aligned, block, room, strides
from heddle.kernels.common.tuning import tuned
from heddle.kernels.configs.launch import Launch
from heddle.kernels.configs.local_linear_attention import INTERPRETER, Family, Plan, family

# The most channels of a head.
WIDEST = 256
# Of what a residual was at first: where a row stops. Twice as many steps as channels are the most.
TOLERANCE = {torch.float32: 1e-7, torch.float16: 5e-5, torch.bfloat16: 3e-4}
STEPS_PER_CHANNEL = 2


@functools.cache
def _family(device: torch.device) -> Family:
    return INTERPRETER if device.type != "cuda" else family(torch.cuda.get_device_capability(device))


def plan(device: torch.device, element: int, size: int) -> Plan:
    """The launches for tensors on `device`, elements of so many bytes and the larger head size; overrides come first."""
    table = _family(device).plan(element, block(size))
    names = ("mean", "solve", "output", "right", "queries", "keys")
    return replace(table, **{name: tuned(name, getattr(table, name)) for name in names})


@dataclass(frozen=True, slots=True)
class Means:
    """What is known of each query's weights.  Shapes:  lse: [B, H, T], base 2;  mean: [B, H, T, K], of keys, float32"""

    lse: Tensor
    mean: Tensor


class Call:
    """What all launches over the same inputs are told.

    Shapes:  q: [B, H, T, d];  k: [B, N, S, d];  v: [B, N, S, V];  seen: [1 or B, S] bool, or None
    """

    def __init__(
        self,
        sides: tuple[Tensor, Tensor, Tensor],
        seen: Tensor | None,
        numbers: tuple[float, float, int | None],
    ) -> None:
        q, k, v = (_with_room(side) for side in sides)
        # What all keys have in common changes no covariance and would only be rounded. Half precision cannot hold the rest.
        self.common = k[:, :, :1] if k.dtype == torch.float32 else None
        k = k if self.common is None else k - self.common
        self.q, self.k, self.v = aligned(q), aligned(k), aligned(v)
        self.scale, self.ridge, window = numbers
        (self.B, self.H, self.T, self.K), (self.N, self.S) = self.q.shape, self.k.shape[1:3]
        self.V = self.v.shape[3]
        # More than there is would run over in the kernels.
        self.window = min(window or self.S, self.S)
        self.seen = self.q if seen is None else seen.contiguous().view(torch.uint8)
        self.along = (
            self.H,
            self.T,
            self.S,
            self.window,
            self.S if seen is not None and len(seen) > 1 else 0,
        )
        self.plan = plan(self.q.device, self.q.element_size(), max(self.K, self.V))
        self.constants = {
            "K": self.K, "ROWS_K": block(self.K), "GROUP": self.H // self.N, "SEEN": seen is not None,
            "SPLIT": self.q.element_size() < 4, "PRECISION": "tf32x3" if self.q.device.type == "cuda" else "ieee",
        }  # fmt: skip

    def means(self) -> Means:
        """The log-sum-exp of the logits and the mean of the keys."""
        lse, mean = self._empty(self.T), self._empty(self.T, self.K)
        grid, options = self._tiles(self.plan.mean)
        _local_linear_fwd_mean_kernel[grid](
            self.q, self.k, lse, mean, self.seen, *strides(self.q, self.k), *self.along, self.scale,
            **self.constants, **options,
        )  # fmt: skip
        return Means(lse, mean)

    def solve(self, means: Means, right: Tensor | None = None) -> Tensor:
        """x with (Cov_p(k) + ridge I) x = right, which is q less the mean key if not given."""
        if right is None and self.common is not None:
            group = self.H // self.N
            right = (self.q - self.common.repeat_interleave(group, dim=1) - means.mean).contiguous()
        x = self._empty(self.T, self.K)
        grid, options = self._tiles(self.plan.solve)
        steps = tuned("steps", STEPS_PER_CHANNEL * self.K)
        _local_linear_solve_kernel[grid](
            self.q, self.k, means.lse, means.mean, x if right is None else right, x, self.seen,
            *strides(self.q, self.k), *self.along, steps, self.scale, self.ridge, TOLERANCE[self.q.dtype],
            GIVEN=right is not None, **self.constants, **options,
        )  # fmt: skip
        return x

    def slopes(self, means: Means, slope: Tensor | None) -> Tensor:
        """x of every query: solved, or what is given, with its sign turned."""
        return self.solve(means) if slope is None else -_with_room(slope).float().contiguous()

    def output(self, means: Means, x: Tensor) -> Tensor:
        out = torch.empty(self.B, self.H, self.T, self.V, dtype=self.v.dtype, device=self.v.device)
        grid, options = self._tiles(self.plan.output)
        _local_linear_fwd_output_kernel[grid](
            self.q, self.k, self.v, means.lse, means.mean, x, out, self.seen,
            *strides(self.q, self.k, self.v), *self.along, self.scale,
            V=self.V, ROWS_V=block(self.V), **self.constants, **options,
        )  # fmt: skip
        return out

    def right(self, means: Means, d_out: Tensor) -> tuple[Tensor, Tensor]:
        """The right side of the adjoint solve, and room for two numbers of each query, of which the first are there."""
        right, middle = self._empty(self.T, self.K), self._empty(self.T)
        middle = torch.cat((middle, middle))
        grid, options = self._tiles(self.plan.right)
        _local_linear_bwd_right_kernel[grid](
            self.q, self.k, self.v, d_out, means.lse, means.mean, right, middle, self.seen,
            *strides(self.q, self.k, self.v, d_out), *self.along, self.scale,
            V=self.V, ROWS_V=block(self.V), **self.constants, **options,
        )  # fmt: skip
        return right, middle

    def gradients(
        self, means: Means, d_out: Tensor, slopes: tuple[Tensor, Tensor | None], middle: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of q, k and v, and of a bias of the logits, [B, N, S]; `slopes` are x, and y if x was solved."""
        x, y = slopes
        dq, dk, dv = (x.new_empty(x.shape) for x in (self.q, self.k, self.v))
        d_seen = torch.empty(self.B, self.N, self.S, dtype=torch.float32, device=x.device)
        tensors = (self.q, self.k, self.v, d_out, means.lse, means.mean, x, x if y is None else y, middle)
        told = (*strides(self.q, self.k, self.v, d_out), *self.along, self.scale)
        constants = {**self.constants, "V": self.V, "ROWS_V": block(self.V), "SOLVED": y is not None}
        grid, options = self._tiles(self.plan.queries)
        _local_linear_bwd_query_kernel[grid](*tensors, dq, self.seen, *told, **constants, **options)
        _, options = self._tiles(self.plan.keys)
        grid = (triton.cdiv(self.S, options["KEYS"]), self.B * self.N)
        _local_linear_bwd_key_kernel[grid](*tensors, dk, dv, d_seen, self.seen, *told, **constants, **options)
        return dq, dk, dv, d_seen

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(self.B, self.H, *shape, dtype=torch.float32, device=self.q.device)

    def _tiles(self, launch: Launch) -> tuple[tuple[int, int], dict[str, Any]]:
        """The grid, and what kernels are told of tiles."""
        rows, keys = min(launch.chunk, block(self.T)), min(launch.columns, block(self.S))
        return (triton.cdiv(self.T, rows), self.B * self.H), {"ROWS": rows, "KEYS": keys, **launch.options()}


def _with_room(x: Tensor) -> Tensor:
    """Head sizes as the kernels take them, by zeros, which change nothing."""
    more = room(x.shape[3], x.device) - x.shape[3]
    return pad(x, (0, more)) if more else x


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slope: Tensor | None,
    seen: Tensor | None,
    numbers: tuple[float, float, int | None],
) -> Tensor:
    """The output; `numbers` are the factor of the logits, the ridge and the window."""
    call = Call((q, k, v), seen, numbers)
    means = call.means()
    return call.output(means, call.slopes(means, slope))[..., : v.shape[3]]


def launch_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slope: Tensor | None,
    seen: Tensor | None,
    numbers: tuple[float, float, int | None],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of q, k, v and the slope, if given, and of a bias of the logits of each key but a query's own, [B, S]."""
    call = Call((q, k, v), seen, numbers)
    d_out = aligned(_with_room(d_out.to(v.dtype)))
    means = call.means()
    x = call.slopes(means, slope)
    right, middle = call.right(means, d_out)
    y = call.solve(means, right) if slope is None else None
    dq, dk, dv, d_seen = call.gradients(means, d_out, (x, y), middle)
    size = q.shape[3]
    d_slope = None if slope is None else -right[..., :size]
    return dq[..., :size], dk[..., :size], dv[..., : v.shape[3]], d_slope, d_seen.sum(1)
