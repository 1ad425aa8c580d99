"""simple_gla in plain torch: chunks by matrix products, states by one product over the chunks before; with its gradients.

Products take operands rounded to the dtype of the inputs; states, gates and sums are float32 (float64 for float64).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from heddle.kernels._decay_attention_torch import CHUNK, CHUNKS_AT_ONCE, _product
from heddle.kernels.common.varlen import each_sequence, in_chunks
from heddle.kernels.op import wide_dtype


@dataclass(frozen=True, slots=True)
class _Gates:
    """What is left of a token at a later one, of the state before a chunk at each token, of a token after the chunk.

    Shapes:  within: [B, HV, N, C, C];  seen, left: [B, HV, N, C, 1];  total: [B, HV, N], log, float64
    """

    within: Tensor
    seen: Tensor
    left: Tensor
    total: Tensor


def _gates(log_decay: Tensor, size: int, wide: torch.dtype) -> _Gates:
    # A sum of strong decays would swallow a weak one in float32, and differences of sums are what counts.
    summed = in_chunks(log_decay.double()[..., None], size).cumsum(-2)
    # Masked before exp: above the diagonal the difference is positive and could overflow.
    row = torch.arange(size, device=summed.device)
    age = (summed - summed.mT).masked_fill(row[:, None] < row, -torch.inf)
    within, seen, left = (x.to(wide).exp() for x in (age, summed, summed[..., -1:, :] - summed))
    return _Gates(within, seen, left, summed[..., -1, 0])


def _carry(local: Tensor, total: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """The state before each chunk and after the last, from what each chunk adds to it.

        S_(n+1) = exp(total_n) S_n + local_n

    Shapes:  local, before: [B, H, N, K, V];  total: [B, H, N];  state: [B, H, K, V]
    """
    state = torch.zeros_like(local[:, :, 0]) if state is None else state.to(local.dtype)
    before = []
    for first in range(0, local.shape[2], CHUNKS_AT_ONCE):
        group, log = local[:, :, first : first + CHUNKS_AT_ONCE], total[:, :, first : first + CHUNKS_AT_ONCE]
        ends = log.cumsum(-1)
        aged = (ends - log).to(local.dtype).exp()[..., None, None]
        chunk = torch.arange(group.shape[2], device=local.device)
        later = ((ends - log)[..., :, None] - ends[..., None, :]).masked_fill(
            chunk[:, None] <= chunk, -torch.inf
        )
        added = (later.to(local.dtype).exp() @ group.flatten(3)).view(group.shape)
        before.append(added + aged * state[:, :, None])
        over = log[..., -1].to(local.dtype).exp()[..., None, None]
        state = over * before[-1][:, :, -1] + group[:, :, -1]
    return torch.cat(before, dim=2), state


def _spread(x: Tensor, heads: int) -> Tensor:
    """Key heads, each as often as value heads read it."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)


def _back(chunks: Tensor, length: int) -> Tensor:
    """[B, H, N, C, *] to [B, T, H, *]"""
    return chunks.flatten(2, 3)[:, :, :length].transpose(1, 2)


def run_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output and final state; arguments as those of the registered op."""

    def run(sides: list[Tensor], before: Tensor | None) -> tuple[Tensor, Tensor]:
        q, k, v, log_decay = sides
        return _forward_sequence(q, k, v, log_decay, scale=scale, state=before)

    sides = [_spread(q, v.shape[2]), _spread(k, v.shape[2]), v, log_decay]
    if cu_seqlens is None:
        return run(sides, initial_state)
    return each_sequence(run, sides, initial_state, cu_seqlens)


def _forward_sequence(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, scale: float, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    dtype, length = v.dtype, v.shape[1]
    size = min(CHUNK, max(length, 1))
    gates = _gates(log_decay, size, wide_dtype(dtype))
    q, k, v = (in_chunks(x, size) for x in (q, k, v))
    before, final = _carry(_product(k.mT, v * gates.left, dtype), gates.total, state)
    out = _product(_product(q, k.mT, dtype) * gates.within, v, dtype)
    out = out + _product(q, before, dtype) * gates.seen
    return _back(out * scale, length).to(dtype).contiguous(), final


def run_backward(
    d_out: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_decay and of the initial state; arguments as those of the registered op."""
    heads, wide = v.shape[2], wide_dtype(v.dtype)
    sides = [d_out.to(v.dtype), _spread(q, heads), _spread(k, heads), v, log_decay]
    places = [0, v.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    rows = v.shape[0] if cu_seqlens is None else 1
    found = []
    for index, (begin, end) in enumerate(pairwise(places)):
        own = slice(index * rows, (index + 1) * rows)
        before, after = (None if x is None else x[own].to(wide) for x in (initial_state, d_final))
        found.append(_backward_sequence([x[:, begin:end] for x in sides], scale, before, after))
    dq, dk, dv, d_gate = (torch.cat([one[index] for one in found], dim=1) for index in range(4))
    dq, dk = (x.reshape(*q.shape[:3], -1, q.shape[3]).sum(3) for x in (dq, dk))
    d_initial = torch.cat([one[4] for one in found])
    dq, dk, dv = (x.to(v.dtype).contiguous() for x in (dq, dk, dv))
    return dq, dk, dv, d_gate.to(log_decay.dtype).contiguous(), d_initial


def _backward_sequence(
    sides: list[Tensor], scale: float, before: Tensor | None, after: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of one sequence, in a wide dtype, of q and k for each value head.

    The log-decay of token t multiplies what tokens before t have written and t or later ones read. So its gradient is
    the sum over pairs (reader u ≥ t, writer s < t): both in the chunk, either, or none.
    """
    d_out, q, k, v, log_decay = sides
    dtype, length = v.dtype, v.shape[1]
    size = min(CHUNK, max(length, 1))
    gates = _gates(log_decay, size, wide_dtype(dtype))
    d_out, q, k, v = (in_chunks(x, size) for x in (d_out, q, k, v))
    state, _ = _carry(_product(k.mT, v * gates.left, dtype), gates.total, before)
    local = _product(q.mT, d_out * (gates.seen * scale), dtype)
    d_state, d_initial = _carry(local.flip(2), gates.total.flip(2), after)
    d_state = d_state.flip(2)

    scores = _product(q, k.mT, dtype)
    d_scores = _product(d_out, v.mT, dtype) * gates.within * scale
    read = _product(d_out, state.mT, dtype) * (gates.seen * scale)
    written = _product(v, d_state.mT, dtype) * gates.left
    dq = _product(d_scores, k, dtype) + read
    dk = _product(d_scores.mT, q, dtype) + written
    dv = _product((scores * gates.within * scale).mT, d_out, dtype) + _product(k, d_state, dtype) * gates.left

    later = torch.ones(size, size, device=v.device, dtype=scores.dtype).triu()
    # What a token reads of itself passes no decay, and is large beside what has passed a strong one.
    both = _product(later.expand_as(scores), (scores * d_scores).tril(-1), dtype).tril(-1).sum(-1)
    reads, writes = (q * read).sum(-1), (k * written).sum(-1)
    earlier = F.pad(writes[..., :-1], (1, 0)).cumsum(-1)
    neither = (state * d_state).sum((-2, -1)) * gates.total.to(state.dtype).exp()
    d_gate = both + reads.flip(-1).cumsum(-1).flip(-1) + earlier + neither[..., None]
    found = (_back(x, length) for x in (dq, dk, dv, d_gate[..., None]))
    first, second, third, fourth = found
    return first, second, third, fourth[..., 0], d_initial


def step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """One token; arguments as those of the registered op."""
    wide, heads = state.dtype, v.shape[2]
    key, query = (_spread(x, heads).transpose(1, 2).to(wide) for x in (k, q))
    decay = log_decay[:, 0, :, None, None].to(wide).exp()
    new_state = decay * state + key.mT * v.transpose(1, 2).to(wide)
    return (scale * (query @ new_state)).transpose(1, 2).to(v.dtype), new_state
