"""gla in plain torch, which autograd and compilers see through.

Products, those of gradients too, take operands rounded to the dtype of the inputs; states, gates and sums are float32
(float64 for float64).
"""

from __future__ import annotations

import torch
from torch import Tensor

from heddle.kernels.common.products import decayed_scores, product, until_end
from heddle.kernels.common.varlen import Packing, in_chunks, pack
from heddle.kernels.op import wide_dtype

CHUNK = 64
# A sequence of no more tokens is one chunk of so many.
BASE = 16


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output and final state of whole sequences; arguments as those of `gla`."""
    length, group, dtype = q.shape[1], v.shape[2] // q.shape[2], v.dtype
    wide = wide_dtype(dtype)
    size = CHUNK if length > BASE else BASE
    packing = None if cu_seqlens is None else pack(cu_seqlens, length, size)
    shared = (
        x.repeat_interleave(group, dim=2) if group > 1 else x for x in (q.to(wide) * scale, k, log_decay)
    )
    q, k, log_decay = shared
    sides = [x.to(wide) for x in (q, k, v, log_decay)]
    sides = [in_chunks(x, size) if packing is None else packing.chunks(x) for x in sides]
    before = None if initial_state is None else initial_state.to(wide)
    found, state = _chunked(*sides, dtype=dtype, initial_state=before, packing=packing)
    out = packing.unpack(found) if packing else found.flatten(2, 3)[:, :, :length].transpose(1, 2)
    return out.to(dtype), state


def step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """One token.  Shapes:  q, k, log_decay: [B, 1, H, K];  v, out: [B, 1, HV, V];  state: [B, HV, K, V]"""
    wide, group = state.dtype, v.shape[2] // q.shape[2]
    query, key, gate = (x[:, 0].to(wide).repeat_interleave(group, dim=1) for x in (q, k, log_decay))
    new_state = torch.exp(gate)[..., None] * state + key[..., None] * v[:, 0, :, None, :].to(wide)
    return ((query * scale)[:, :, None] @ new_state).transpose(1, 2).to(v.dtype), new_state


def _chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    dtype: torch.dtype,
    initial_state: Tensor | None,
    packing: Packing | None,
) -> tuple[Tensor, Tensor]:
    """All chunks at once but for the chain of states; everything given is in the wide dtype.

    Shapes:  q, k, log_decay: [B, HV, M, C, K];  v, out: [B, HV, M, C, V]
    """
    wide = q.dtype
    # A sum of strong decays would swallow a weak one in float32, and differences of sums are what counts.
    total = log_decay.double().cumsum(-2)
    seen = torch.exp(total.to(wide))
    left = torch.exp(until_end(log_decay).to(wide))
    over = seen[..., -1:, :].mT
    written = product((k * left).mT, v, dtype)
    state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1]) if initial_state is None else initial_state
    before, after = [], []
    # The state to begin each chunk with that begins a sequence: [M, HV, K, V].
    begins = state if packing is None else state.expand(packing.last.shape[0], -1, -1, -1)[packing.sequence]
    for n in range(q.shape[2]):
        if packing is not None:
            state = torch.where(packing.first[n], begins[n : n + 1], state[:1])
        before.append(state)
        state = over[:, :, n] * state + written[:, :, n]
        after.append(state)
    (scores,) = decayed_scores((q,), k, total, dtype)
    out = product(scores, v, dtype) + product(q * seen, torch.stack(before, dim=2), dtype)
    return out, state if packing is None else torch.cat(after)[packing.last]
