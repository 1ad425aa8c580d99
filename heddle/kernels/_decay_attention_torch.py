"""decay_attention in plain torch: chunks by matrix products, states by one product over the chunks before.

Products take operands rounded to the dtype of the inputs; states, decays and sums are float32 (float64 for float64).
"""

from __future__ import annotations

import torch
from torch import Tensor

from heddle.kernels.common.products import narrowed, scaled
from heddle.kernels.common.varlen import each_sequence, in_chunks
from heddle.kernels.op import wide_dtype

# Tokens treated by matrix products, and chunks whose states are combined in one product.
CHUNK = 64
CHUNKS_AT_ONCE = 32


def sweep(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    log_decay: Tensor,
    *,
    scale: float,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """One sweep over time, and its state at the end; a reversed one begins at the last token.

    Shapes:  a, b: [B, T, H, K];  c, out: [B, T, H, V];  state: [B, H, K, V]
    """
    weights = _Weights(log_decay.to(wide_dtype(a.dtype)), scale, reverse)
    if cu_seqlens is None:
        return _sweep_sequence(a, b, c, weights, state)

    def run(sides: list[Tensor], before: Tensor | None) -> tuple[Tensor, Tensor]:
        return _sweep_sequence(sides[0], sides[1], sides[2], weights, before)

    return each_sequence(run, [a, b, c], state, cu_seqlens)


class _Weights:
    """How much of a token and of the state is left at each distance.

    Forward, a token sees the state one step older than itself, and `scale` is applied on the way out. Reversed, the state
    is a gradient: the token sees it undecayed, and `scale` was applied on the way in.

    Shapes:  within: [H, 1, C, C];  seen: [H, 1, C, 1];  left: [H, N, C, 1];  over: [H, N, 1, 1]
    """

    def __init__(self, log_decay: Tensor, scale: float, reverse: bool) -> None:
        self.rate = log_decay[:, None, None, None]
        self.scale, self.reverse = scale, reverse
        self.lag = 0 if reverse else 1

    def within(self, size: int) -> Tensor:
        row = torch.arange(size, device=self.rate.device)
        return torch.exp(self.rate * (row[:, None] - row).clamp_min(0)).tril() * self.scale

    def seen(self, size: int) -> Tensor:
        row = torch.arange(size, device=self.rate.device)[:, None]
        return torch.exp(self.rate * (row + self.lag)) * (1.0 if self.reverse else self.scale)

    def left(self, lengths: Tensor, size: int) -> Tensor:
        row = torch.arange(size, device=self.rate.device)[:, None]
        # Rows past the end hold zeros; without the bound their weight could be infinite.
        age = (lengths[:, None, None] - row - self.lag).clamp_min(0)
        return torch.exp(self.rate * age) * (self.scale if self.reverse else 1.0)

    def over(self, lengths: Tensor) -> Tensor:
        return torch.exp(self.rate * lengths[:, None, None])


def _sweep_sequence(
    a: Tensor, b: Tensor, c: Tensor, weights: _Weights, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    dtype, length = a.dtype, a.shape[1]
    size = min(CHUNK, max(length, 1))
    a, b, c = (in_chunks(x.flip(1) if weights.reverse else x, size) for x in (a, b, c))
    lengths = torch.full((a.shape[2],), size, device=a.device)
    lengths[-1:] -= a.shape[2] * size - length
    local = _product(b.mT, c * weights.left(lengths, size), dtype)
    before, final = _carry(local, weights.over(lengths), state)
    out = _product(_product(a, b.mT, dtype) * weights.within(size), c, dtype)
    out = out + _product(a, before, dtype) * weights.seen(size)
    out = out.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :length].to(dtype)
    return (out.flip(1) if weights.reverse else out.contiguous()), final


def _product(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """Matrix product of operands rounded to `dtype`, summed in float32 (float64 for float64)."""
    (x, of_x), (y, of_y) = narrowed(x, dtype), narrowed(y, dtype)
    if dtype in (torch.float32, torch.float64):
        return x @ y
    if x.device.type == "cuda":
        flat = torch.bmm(x.flatten(0, -3), y.flatten(0, -3), out_dtype=torch.float32)
        return scaled(flat.view(*x.shape[:-1], y.shape[-1]), of_x, of_y)
    return scaled(x.float() @ y.float(), of_x, of_y)


def _carry(local: Tensor, over: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """The state before each chunk and after the last, from what each chunk adds to it.

        S_(n+1) = over_n S_n + local_n

    Shapes:  local, before: [B, H, N, K, V];  over: [H, N, 1, 1], equal for all but the last;  state: [B, H, K, V]
    """
    state = torch.zeros_like(local[:, :, 0]) if state is None else state.to(local.dtype)
    if local.shape[2] == 1:
        return state[:, :, None], over[:, 0] * state + local[:, :, 0]
    before = []
    for first in range(0, local.shape[2], CHUNKS_AT_ONCE):
        group, shrink = local[:, :, first : first + CHUNKS_AT_ONCE], over[:, first : first + CHUNKS_AT_ONCE]
        before.append(_carry_group(group, shrink, state))
        state = shrink[:, -1] * before[-1][:, :, -1] + group[:, :, -1]
    return torch.cat(before, dim=2), state


def _carry_group(local: Tensor, over: Tensor, state: Tensor) -> Tensor:
    """`before` of `_carry`, for few chunks, as one product."""
    count = local.shape[2]
    chunk = torch.arange(count, device=local.device)
    steps = (chunk[:, None] - 1 - chunk).clamp_min(0)
    powers = over[:, :1, 0] ** steps
    weights = powers.tril(-1)
    added = torch.einsum("hnm,bhmx->bhnx", weights, local.flatten(3)).view(local.shape)
    return added + (over[:, :1, 0] ** chunk[:, None])[..., None] * state[:, :, None]


def step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """One token.  Shapes:  q, k: [B, 1, H, K];  v, out: [B, 1, H, V];  state: [B, H, K, V]"""
    wide = state.dtype
    decay = log_decay.to(wide).exp()[:, None, None]
    new_state = decay * state + k[:, 0, :, :, None].to(wide) * v[:, 0, :, None, :].to(wide)
    out = scale * (q[:, 0, :, None, :].to(wide) @ new_state)
    return out.transpose(1, 2).to(v.dtype), new_state
