"""gated_delta_rule, routed_delta_rule, delta_rule and kda in plain torch, which autograd and compilers see through.

Products, those of gradients too, take operands rounded to the dtype of the inputs; states, gates, sums and the triangular
inverse are float32 (float64 for float64).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from heddle.kernels.common.products import decayed_scores, product, until_end
from heddle.kernels.common.varlen import Packing, in_chunks, pack
from heddle.kernels.op import wide_dtype

CHUNK = 64
# Triangles up to this size are inverted by doubling inside one masked product.
BASE = 16


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output and final state of whole sequences; arguments as those of `kda`, or with one decay for all channels.

    Shapes:  log_decay: [B, T, HV, K or 1]
    """
    length, group, dtype = q.shape[1], v.shape[2] // q.shape[2], v.dtype
    wide = wide_dtype(dtype)
    size = CHUNK if length > BASE else BASE
    packing = None if cu_seqlens is None else pack(cu_seqlens, length, size)
    q, k = (x.repeat_interleave(group, dim=2) if group > 1 else x for x in (q.to(wide) * scale, k))
    sides = [x.to(wide) for x in (q, k, v, log_decay, beta[..., None])]
    sides = [in_chunks(x, size) if packing is None else packing.chunks(x) for x in sides]
    before = None if initial_state is None else initial_state.to(wide)
    out, state = _chunked(*sides, dtype=dtype, initial_state=before, packing=packing)
    out = packing.unpack(out) if packing else out.flatten(2, 3)[:, :, :length].transpose(1, 2)
    return out.to(dtype), state


def routed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    routes: Tensor,
    *,
    chunk: int,
    scale: float,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output and final state; arguments as those of `routed_delta_rule`."""
    group, dtype = v.shape[2] // q.shape[2], v.dtype
    wide = wide_dtype(dtype)
    q, k = (x.repeat_interleave(group, dim=2) if group > 1 else x for x in (q.to(wide) * scale, k))
    sides = [x.to(wide) for x in (q, k, v, log_decay[..., None], beta[..., None])]
    # Triangles are inverted by halves.
    size = 1 << (chunk - 1).bit_length()
    sides = [in_chunks(padded_chunks(x, chunk, size), size) for x in sides]
    before = None if initial_state is None else initial_state.to(wide)
    out, state = _chunked(
        *sides, dtype=dtype, initial_state=before, packing=None, routes=routes.transpose(1, 2)
    )
    return out[..., :chunk, :].flatten(2, 3).transpose(1, 2).to(dtype), state


def padded_chunks(x: Tensor, chunk: int, size: int) -> Tensor:
    """Chunks of `size`, zeros behind each: no decay, nothing written.  Shapes:  x: [B, T, ...];  out: [B, T size / chunk, ...]"""
    if size == chunk:
        return x
    parts = x.unflatten(1, (-1, chunk))  # type: ignore[no-untyped-call]
    behind = parts.new_zeros(*parts.shape[:2], size - chunk, *parts.shape[3:])
    return torch.cat((parts, behind), dim=2).flatten(1, 2)


def step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """One token.

    Shapes:  q, k: [B, 1, H, K];  v, out: [B, 1, HV, V];  log_decay: [B, 1, HV, K or 1];  beta: [B, 1, HV]
             state: [B, HV, K, V]
    """
    wide, group = state.dtype, v.shape[2] // q.shape[2]
    key = k[:, 0, :, None, :].to(wide).repeat_interleave(group, dim=1)
    query = q[:, 0, :, None, :].to(wide).repeat_interleave(group, dim=1) * scale
    faded = torch.exp(log_decay[:, 0, ..., None].to(wide)) * state
    write = beta[:, 0, :, None, None].to(wide) * (v[:, 0, :, None, :].to(wide) - key @ faded)
    new_state = faded + key.mT * write
    return (query @ new_state).transpose(1, 2).to(v.dtype), new_state


def _chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    dtype: torch.dtype,
    initial_state: Tensor | None,
    packing: Packing | None,
    routes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """All chunks at once up to the states, then chunk by chunk; everything given is in the wide dtype.

    Letters as in the chunk form of arXiv 2412.06464: T = (I + A)^-1, U = T beta V, W = T beta e^G K.

    Shapes:  q, k, v, beta: [B, HV, M, C, K, V or 1];  log_decay: [B, HV, M, C, 1 or K];  out: [B, HV, M, C, V]
             routes: [B, HV, M], factors of what a chunk writes, or None for 1
    """
    size, wide = q.shape[3], q.dtype
    # A sum of strong decays would swallow a weak one in float32, and differences of sums are what counts.
    total = log_decay.double().cumsum(-2)
    seen = torch.exp(total.to(wide))
    left = torch.exp(until_end(log_decay).to(wide))
    keys, attention = decayed_scores((k, q), k, total, dtype)
    strict = (beta * keys).tril(-1)
    inverse: Tensor = _UnitLowerInverse.apply(strict)  # type: ignore[no-untyped-call]
    solved = product(inverse, torch.cat((beta * v, beta * seen * k), dim=-1), dtype)
    u, w = solved[..., : v.shape[-1]], solved[..., v.shape[-1] :]
    reads = torch.cat((w, q * seen), dim=-2)
    writes = (k * left).mT
    over = seen[..., -1:, :].mT
    state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1]) if initial_state is None else initial_state
    outputs, states = [], []
    # The state to begin each chunk with that begins a sequence: [M, HV, K, V].
    begins = state if packing is None else state.expand(packing.last.shape[0], -1, -1, -1)[packing.sequence]
    for n in range(u.shape[2]):
        if packing is not None:
            state = torch.where(packing.first[n], begins[n : n + 1], state[:1])
        read = product(reads[:, :, n], state, dtype)
        new = u[:, :, n] - read[:, :, :size]
        outputs.append(read[:, :, size:] + product(attention[:, :, n], new, dtype))
        written = product(writes[:, :, n], new, dtype)
        written = written if routes is None else routes[:, :, n, None, None] * written
        state = over[:, :, n] * state + written
        states.append(state)
    out = torch.stack(outputs, dim=2)
    return out, state if packing is None else torch.cat(states)[packing.last]


class _UnitLowerInverse(torch.autograd.Function):
    """(I + A)^-1 for strictly lower triangular A, by halves; its gradient costs two products.

    Shapes:  A, out: [..., C, C], C a power of two
    """

    @staticmethod
    def forward(ctx: Any, strict: Tensor) -> Tensor:
        inverse = _unit_lower_inverse(strict)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        full: Tensor = inverse.mT @ gradient @ inverse.mT
        return -full.tril(-1)


def _unit_lower_inverse(strict: Tensor) -> Tensor:
    size = strict.shape[-1]
    if size <= BASE:
        return _small_inverse(strict)
    half = size // 2
    first, second = _unit_lower_inverse(
        torch.stack((strict[..., :half, :half], strict[..., half:, half:]))
    ).unbind()
    corner = -second @ strict[..., half:, :half] @ first
    return torch.cat((F.pad(first, (0, half)), torch.cat((corner, second), dim=-1)), dim=-2)


def _small_inverse(strict: Tensor) -> Tensor:
    """Doubles the blocks on the diagonal that are already inverted, all at once."""
    size = strict.shape[-1]
    row = torch.arange(size, device=strict.device)
    inverse = torch.eye(size, dtype=strict.dtype, device=strict.device).expand_as(strict)
    width = 1
    while width < size:
        pair = row // (2 * width)
        below = (pair[:, None] == pair) & (row[:, None] // width != row // width)
        inverse = inverse - inverse @ (strict * below) @ inverse
        width *= 2
    return inverse
