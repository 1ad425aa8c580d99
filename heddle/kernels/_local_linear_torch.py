"""local_linear_attention in plain torch: blocks of queries over all keys that they can see, tiles of keys for their moments.

All of it is float32 (float64 for float64): no kernel has it for its baseline, so nothing is rounded but inputs and output.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from heddle.kernels.op import wide_dtype

# Queries that are worked on together: each has a matrix of its own.
QUERIES = 64
# Keys whose outer products stand in memory at once.
KEYS = 64


@dataclass(frozen=True, slots=True)
class Form:
    """What is fixed: factor of the logits, ridge of the regression, and how many keys back a query sees (None: all)."""

    scale: float
    ridge: float
    window: int | None


@dataclass(frozen=True, slots=True)
class Given:
    """The inputs in the wide dtype, query heads beside the key head that they share.

    Shapes:  q: [B, N, G, T, d];  k: [B, N, S, d];  v: [B, N, S, V];  slope: as q, or None;  real: [1 or B, S] bool, or None;
             written: [B, S] of 0 and 1, or None
    """

    q: Tensor
    k: Tensor
    v: Tensor
    slope: Tensor | None
    real: Tensor | None
    written: Tensor | None

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slope: Tensor | None,
        real: Tensor | None,
        written: Tensor | None,
    ) -> Given:
        wide, split = wide_dtype(q.dtype), (k.shape[1], q.shape[1] // k.shape[1])
        queries = q.to(wide).unflatten(1, split)  # type: ignore[no-untyped-call]
        slopes = None if slope is None else slope.to(wide).unflatten(1, split)  # type: ignore[no-untyped-call]
        return cls(queries, k.to(wide), v.to(wide), slopes, real, written)


@dataclass(frozen=True, slots=True)
class Block:
    """One block of queries and the keys from `lo` to `hi` that they can see; R = G times its queries.

    `k` is less the first of these keys, which changes no covariance: what all keys have in common would only be rounded.

    Shapes:  q, x: [B, N, R, d];  k: [B, N, S, d];  v: [B, N, S, V];  own: [R, S] bool;  p, a: [B, N, R, S];
             factor: [B, N, R, d, d], of Cholesky, or None where the slope is given
    """

    first: int
    last: int
    lo: int
    hi: int
    q: Tensor
    k: Tensor
    v: Tensor
    own: Tensor
    p: Tensor
    x: Tensor
    a: Tensor
    factor: Tensor | None


def forward(given: Given, form: Form) -> Tensor:
    """Shapes:  out: [B, N, G, T, V]"""
    groups = given.q.shape[2]
    found = [
        ((one.p * (1 + one.a)) @ one.v).view(*one.q.shape[:2], groups, one.last - one.first, -1)
        for one in _blocks(given, form)
    ]
    return torch.cat(found, dim=3)


def backward(d_out: Tensor, given: Given, form: Form) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, slope and written, those of what is None empty.        (by implicit differentiation of the solve)

    With g = d_out, c_j = v_j · g, cb = E_p[c], y = C⁻¹ E_p[(c - cb) k] (0 for a given slope), b_j = (k_j - kb) · y:
        delta_j = c_j (1 + a_j) - cb a_j - a_j b_j - b_j,   ds_j = p_j (delta_j - E_p[delta])
        dq = y + scale ds k,   dv_j = p_j (1 + a_j) g,   dk_j = scale ds_j q + p_j ((c_j - cb - b_j) x - (1 + a_j) y)
    """
    dq, dk, dv = (torch.zeros_like(x) for x in (given.q, given.k, given.v))
    d_slope = given.q.new_zeros(0) if given.slope is None else torch.zeros_like(given.slope)
    d_written = given.q.new_zeros(0) if given.written is None else dk.new_zeros(given.written.shape)
    for one in _blocks(given, form):
        rows, keys = slice(one.first, one.last), slice(one.lo, one.hi)
        g, shape = d_out[:, :, :, rows].flatten(2, 3), given.q[:, :, :, rows].shape
        c = g @ one.v.mT
        c_mean = (one.p * c).sum(-1, keepdim=True)
        right = (one.p * (c - c_mean)) @ one.k
        delta, left, dq_block = c * (1 + one.a) - c_mean * one.a, c - c_mean, torch.zeros_like(one.q)
        if one.factor is not None:
            y = _solved(one.factor, right)
            b = _centred(one.p, y @ one.k.mT)
            delta, left, dq_block = delta - b * (1 + one.a), left - b, y
            dk[:, :, keys] -= (one.p * (1 + one.a)).mT @ y
        else:
            d_slope[:, :, :, rows] = -right.view(shape)
        ds = one.p * _centred(one.p, delta)
        dq[:, :, :, rows] = (dq_block + form.scale * ds @ one.k).view(shape)
        dk[:, :, keys] += form.scale * ds.mT @ one.q + (one.p * left).mT @ one.x
        dv[:, :, keys] += (one.p * (1 + one.a)).mT @ g
        if given.written is not None:
            d_written[:, keys] += ds.masked_fill(one.own, 0.0).sum((1, 2))
    return dq, dk, dv, d_slope, d_written


def _blocks(given: Given, form: Form) -> Iterator[Block]:
    length, keys = given.q.shape[3], given.k.shape[2]
    for first in range(0, length, QUERIES):
        last = min(first + QUERIES, length)
        hi = keys - length + last
        lo = 0 if form.window is None else max(0, keys - length + first + 1 - form.window)
        k, v = given.k[:, :, lo:hi], given.v[:, :, lo:hi]
        q = given.q[:, :, :, first:last].flatten(2, 3)
        slope = None if given.slope is None else given.slope[:, :, :, first:last].flatten(2, 3)
        own, seen = _sight(given, form, last - first, lo, hi)
        logits = (q @ k.mT) * form.scale
        p = torch.softmax(logits.masked_fill(~seen, -torch.inf), dim=-1)
        common = k[:, :, :1]
        k = k - common
        factor = None
        if slope is None:
            mean = p @ k
            factor = _factor(p, k, mean, form.ridge)
            x = _solved(factor, q - common - mean)
        else:
            x = -slope
        yield Block(first, last, lo, hi, q, k, v, own, p, x, _centred(p, x @ k.mT), factor)


def _sight(given: Given, form: Form, queries: int, lo: int, hi: int) -> tuple[Tensor, Tensor]:
    """Which key is the query's own, which it sees: its own whatever is said of it.

    Shapes:  out: [R, S] bool and [1 or B, 1, R, S] bool
    """
    device, groups = given.q.device, given.q.shape[2]
    distance = torch.arange(hi - queries, hi, device=device)[:, None] - torch.arange(lo, hi, device=device)
    distance = distance.repeat(groups, 1)
    own, seen = distance == 0, distance >= 0
    if form.window is not None:
        seen = seen & (distance < form.window)
    seen = seen[None, None]
    for limit in (given.real, None if given.written is None else given.written > 0.5):
        seen = seen if limit is None else seen & limit[:, None, None, lo:hi]
    return own, seen | own


def _factor(p: Tensor, k: Tensor, mean: Tensor, ridge: float) -> Tensor:
    """Cholesky's factor of Cov_p(k) + ridge I; of a larger ridge where a smaller would be lost in rounding the moments.

    Shapes:  p: [B, N, R, S];  k: [B, N, S, d];  mean: [B, N, R, d];  out: [B, N, R, d, d]
    """
    size = k.shape[-1]
    moment = k.new_zeros(*mean.shape[:-1], size * size)
    for first in range(0, k.shape[2], KEYS):
        tile = k[:, :, first : first + KEYS]
        outer = (tile[..., :, None] * tile[..., None, :]).flatten(-2)
        moment = moment + p[..., first : first + KEYS] @ outer
    covariance = moment.view(*mean.shape, size) - mean[..., :, None] * mean[..., None, :]
    trace = moment[..., :: size + 1].sum(-1)
    least = (4 * size * torch.finfo(k.dtype).eps * trace).clamp_min(ridge)
    covariance.diagonal(dim1=-2, dim2=-1).add_(least[..., None])
    # The one that does not wait for a GPU to say that all went well.
    factor: Tensor = torch.linalg.cholesky_ex(covariance).L
    return factor


def _solved(factor: Tensor, right: Tensor) -> Tensor:
    """Shapes:  factor: [B, N, R, d, d];  right, out: [B, N, R, d]"""
    return torch.cholesky_solve(right[..., None], factor)[..., 0]


def _centred(p: Tensor, x: Tensor) -> Tensor:
    """x - E_p[x].  Shapes:  p, x, out: [B, N, R, S]"""
    return x - (p * x).sum(-1, keepdim=True)
