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
    _local_linear_middle_kernel,
    _local_linear_solve_kernel,
)
from heddle.kernels.common.layout import aligned, block, room, strides
from heddle.kernels.common.tuning import tuned
from heddle.kernels.configs.launch import Launch
from heddle.kernels.configs.local_linear_attention import INTERPRETER, Family, Plan, family

# The most channels of a head.
WIDEST = 256
# Of what a residual was at first: where a row stops. Twice as many steps as channels are the most.
TOLERANCE = {torch.float32: 1e-7, torch.float16: 2e-5, torch.bfloat16: 1e-4}
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
    """What is known of each query's weights.

    Shapes:  norm: [2, B, H, T], the largest product and the logarithm of the sum to base 2;  mean: [B, H, T, K], of keys less
             what is common to them;  of_slope: [B, H, T], its product with a given x, or nothing known;  all float32
    """

    norm: Tensor
    mean: Tensor
    of_slope: Tensor


@dataclass(frozen=True, slots=True)
class Slopes:
    """x (or y) of each query, and its product with the mean key.

    Shapes:  parts: [P, B, H, T, K], whose sum it is;  of_mean: [B, H, T], float32
    """

    parts: Tensor
    of_mean: Tensor


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
        self.common = k[:, :, 0].contiguous() if k.dtype == torch.float32 else k
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
            "SPLIT": self.q.element_size() < 4,
        }  # fmt: skip

    def means(self, x: Tensor | None = None) -> Means:
        """Of the keys that each query sees; `x`, [1, B, H, T, K], if it is given."""
        norm, mean = self._empty(2, self.B, self.H, self.T), self._empty(self.B, self.H, self.T, self.K)
        of_slope = self._empty(self.B, self.H, self.T)
        grid, options = self._tiles(self.plan.mean)
        _local_linear_fwd_mean_kernel[grid](
            self.q, self.k, norm, mean, self.q if x is None else x, of_slope, self.common, self.seen,
            *strides(self.q, self.k), *self.along, self.scale, GIVEN=x is not None, **self.constants, **options,
        )  # fmt: skip
        return Means(norm, mean, of_slope)

    def solve(self, means: Means, right: Tensor | None = None) -> Slopes:
        """x with (Cov_p(k) + ridge I) x = right, which is q less the mean key if not given."""
        parts = self.q.new_empty(2 if self.constants["SPLIT"] else 1, self.B, self.H, self.T, self.K)
        of_mean = self._empty(self.B, self.H, self.T)
        grid, options = self._tiles(self.plan.solve)
        steps = tuned("steps", STEPS_PER_CHANNEL * self.K)
        _local_linear_solve_kernel[grid](
            self.q, self.k, means.norm, means.mean, means.mean if right is None else right, parts, of_mean,
            self.common, self.seen, *strides(self.q, self.k), *self.along, steps, self.scale, self.ridge,
            TOLERANCE[self.q.dtype], GIVEN=right is not None, **self.constants, **options,
        )  # fmt: skip
        if not self.constants["SPLIT"]:
            grid, options = self._tiles(self.plan.mean)
            told = {name: value for name, value in self.constants.items() if name != "SPLIT"}
            _local_linear_middle_kernel[grid](
                self.q, self.k, means.norm, parts, of_mean, self.common, self.seen,
                *strides(self.q, self.k), *self.along, self.scale, **told, **options,
            )  # fmt: skip
        return Slopes(parts, of_mean)

    def output(self, means: Means, x: Slopes) -> Tensor:
        out = torch.empty(self.B, self.H, self.T, self.V, dtype=self.v.dtype, device=self.v.device)
        grid, options = self._tiles(self.plan.output)
        _local_linear_fwd_output_kernel[grid](
            self.q, self.k, self.v, means.norm, x.parts, x.of_mean, out, self.common, self.seen,
            *strides(self.q, self.k, self.v), *self.along, self.scale,
            V=self.V, ROWS_V=block(self.V), PARTS=len(x.parts), **self.constants, **options,
        )  # fmt: skip
        return out

    def right(self, means: Means, d_out: Tensor) -> tuple[Tensor, Tensor]:
        """The right side of the adjoint solve, and room for two numbers of each query, of which the first are there."""
        right, middle = self._empty(self.B, self.H, self.T, self.K), self._empty(2, self.B, self.H, self.T)
        grid, options = self._tiles(self.plan.right)
        _local_linear_bwd_right_kernel[grid](
            self.q, self.k, self.v, d_out, means.norm, means.mean, right, middle, self.common, self.seen,
            *strides(self.q, self.k, self.v, d_out), *self.along, self.scale,
            V=self.V, ROWS_V=block(self.V), **self.constants, **options,
        )  # fmt: skip
        return right, middle

    def gradients(
        self, means: Means, d_out: Tensor, slopes: tuple[Slopes, Slopes | None], middle: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of q, k and v, and of a bias of the logits, [B, N, S]; `slopes` are x, and y if x was solved."""
        x, y = slopes[0], slopes[1] or slopes[0]
        dq, dk, dv = (
            torch.empty_like(one, memory_format=torch.contiguous_format) for one in (self.q, self.k, self.v)
        )
        d_seen = self._empty(self.B, self.N, self.S)
        sides, lines = (self.q, self.k, self.v, d_out), (x.parts, x.of_mean, y.parts, y.of_mean, middle)
        told = (self.common, self.seen, *strides(*sides), *self.along, self.scale)
        constants = {**self.constants, "V": self.V, "ROWS_V": block(self.V), "PARTS": len(x.parts)}
        constants["SOLVED"] = slopes[1] is not None
        grid, options = self._tiles(self.plan.queries)
        _local_linear_bwd_query_kernel[grid](
            *sides, means.norm, means.mean, *lines, dq, *told, **constants, **options
        )
        _, options = self._tiles(self.plan.keys)
        grid = (triton.cdiv(self.S, options["KEYS"]), self.B * self.N)
        _local_linear_bwd_key_kernel[grid](
            *sides, means.norm, *lines, dk, dv, d_seen, *told, **constants, **options
        )
        return dq, dk, dv, d_seen

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.q.device)

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
) -> tuple[Tensor, Slopes]:
    """The output, and the slopes; `numbers` are the factor of the logits, the ridge and the window."""
    call = Call((q, k, v), seen, numbers)
    means, x = _begin(call, slope)
    return call.output(means, x)[..., : v.shape[3]], x


def launch_backward(
    d_out: Tensor,
    sides: tuple[Tensor, Tensor, Tensor],
    slope: Tensor | None,
    seen: Tensor | None,
    numbers: tuple[float, float, int | None],
    kept: Slopes | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of q, k, v and the slope, if given, and of a bias of the logits of each key but a query's own, [B, S].

    `kept` is what the forward pass has solved, if that is there.
    """
    call = Call(sides, seen, numbers)
    size, values = sides[0].shape[3], sides[2].shape[3]
    d_out = aligned(_with_room(d_out.to(sides[2].dtype)))
    means, x = _begin(call, slope, kept)
    right, middle = call.right(means, d_out)
    y = call.solve(means, right) if slope is None else None
    dq, dk, dv, d_seen = call.gradients(means, d_out, (x, y), middle)
    d_slope = None if slope is None else -right[..., :size]
    return dq[..., :size], dk[..., :size], dv[..., :values], d_slope, d_seen.sum(1)


def _begin(call: Call, slope: Tensor | None, kept: Slopes | None = None) -> tuple[Means, Slopes]:
    """Means, and x of every query: solved, kept from before, or what is given, with its sign turned."""
    if slope is None:
        means = call.means()
        return means, kept or call.solve(means)
    x = -_with_room(slope).contiguous()[None]
    means = call.means(x)
    return means, Slopes(x, means.of_slope)
