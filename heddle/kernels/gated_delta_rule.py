"""The gated delta rule: the op, its reference and its path in plain torch, which autograd and CUDA graphs see through.

Predicted cost for a token and value head (K = V = 128, chunks of 64): 172 kFLOP forward. A Triton kernel is to come; until
then `path` says "torch".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from heddle.errors import HeddleError
from heddle.kernels.common.varlen import Packing, check_packing, in_chunks, pack
from heddle.kernels.op import (
    Inputs,
    Phase,
    Shape,
    Traits,
    Work,
    check_shapes,
    normal,
    op,
    register_composite,
    wide_dtype,
)

CHUNK = 64
# Triangles up to this size are inverted by doubling inside one masked product.
BASE = 16


def gated_delta_rule_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence of `gated_delta_rule`, token by token in float64; shares nothing with the fast path."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group = v.shape[2] // q.shape[2]
    q, k = (x.double().repeat_interleave(group, dim=2) for x in (q, k))
    v, decay, beta = v.double(), log_decay.double().exp(), beta.double()
    ends = [q.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()[1:]
    rows = q.shape[0] if cu_seqlens is None else 1
    outputs, states, begin = [], [], 0
    for index, end in enumerate(ends):
        if initial_state is None:
            state = q.new_zeros(rows, v.shape[2], q.shape[3], v.shape[3])
        else:
            state = initial_state.double()[index * rows : (index + 1) * rows]
        for t in range(begin, end):
            state = decay[:, t, :, None, None] * state
            wrong = v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], state)
            state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * wrong)
            outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], state))
        states.append(state)
        begin = end
    return torch.stack(outputs, dim=1), torch.cat(states)


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


def _chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    initial_state: Tensor | None,
    packing: Packing | None,
) -> tuple[Tensor, Tensor]:
    """All chunks at once up to the states, then chunk by chunk; gates, products and states in one wide dtype.

    Letters as in the chunk form of arXiv 2412.06464: T = (I + A)^-1, U = T beta V, W = T beta e^G K.

    Shapes:  q, k, v, log_decay, beta: [B, HV, M, C, K, V or 1];  out: [B, HV, M, C, V]
    """
    size, wide = q.shape[3], q.dtype
    # A sum of strong decays would swallow a weak one in float32, and differences of sums are what counts.
    total = log_decay.double().cumsum(-2)
    row = torch.arange(size, device=q.device)
    # Masked before exp: above the diagonal the difference is positive and could overflow.
    within = torch.exp((total - total.mT).to(wide).masked_fill(row[:, None] < row, -torch.inf))
    seen = torch.exp(total.to(wide))
    left = torch.exp((total[..., -1:, :] - total).to(wide))
    strict = (beta * (k @ k.mT) * within).tril(-1)
    solved: Tensor = _UnitLowerInverse.apply(strict) @ torch.cat((beta * v, beta * seen * k), dim=-1)  # type: ignore[no-untyped-call]
    u, w = solved[..., : v.shape[-1]], solved[..., v.shape[-1] :]
    reads = torch.cat((w, q * seen), dim=-2)
    attention = (q @ k.mT) * within
    writes = (k * left).mT
    over = seen[..., -1:, :]
    state = torch.zeros_like(writes[:, :, 0] @ u[:, :, 0]) if initial_state is None else initial_state
    outputs, states = [], []
    # The state to begin each chunk with that begins a sequence: [M, HV, K, V].
    begins = state if packing is None else state.expand(packing.last.shape[0], -1, -1, -1)[packing.sequence]
    for n in range(u.shape[2]):
        if packing is not None:
            state = torch.where(packing.first[n], begins[n : n + 1], state[:1])
        read = reads[:, :, n] @ state
        new = u[:, :, n] - read[:, :, :size]
        outputs.append(read[:, :, size:] + attention[:, :, n] @ new)
        state = over[:, :, n] * state + writes[:, :, n] @ new
        states.append(state)
    out = torch.stack(outputs, dim=2)
    return out, state if packing is None else torch.cat(states)[packing.last]


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    gated_delta_rule.choose(q.device, q.dtype, K=q.shape[-1], V=v.shape[-1])
    length, group, wide = q.shape[1], v.shape[2] // q.shape[2], wide_dtype(v.dtype)
    size = CHUNK if length > BASE else BASE
    packing = None if cu_seqlens is None else pack(cu_seqlens, length, size)
    q, k = (x.repeat_interleave(group, dim=2) if group > 1 else x for x in (q.to(wide) * scale, k))
    sides = [x.to(wide) for x in (q, k, v, log_decay[..., None], beta[..., None])]
    sides = [in_chunks(x, size) if packing is None else packing.chunks(x) for x in sides]
    before = None if initial_state is None else initial_state.to(wide)
    out, state = _chunked(*sides, initial_state=before, packing=packing)
    out = packing.unpack(out) if packing else out.flatten(2, 3)[:, :, :length].transpose(1, 2)
    return out.to(v.dtype), state


def _step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    gated_delta_rule.choose(q.device, q.dtype, K=q.shape[-1], V=v.shape[-1])
    wide, group = state.dtype, v.shape[2] // q.shape[2]
    key = k[:, 0, :, None, :].to(wide).repeat_interleave(group, dim=1)
    query = q[:, 0, :, None, :].to(wide).repeat_interleave(group, dim=1) * scale
    faded = torch.exp(log_decay[:, 0, :, None, None].to(wide)) * state
    write = beta[:, 0, :, None, None].to(wide) * (v[:, 0, :, None, :].to(wide) - key @ faded)
    new_state = faded + key.mT * write
    return (query @ new_state).transpose(1, 2).to(v.dtype), new_state


_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor beta"
_forward_op = register_composite(
    "gated_delta_rule",
    f"({_INPUTS}, float scale, Tensor? initial_state, Tensor? cu_seqlens) -> (Tensor, Tensor)",
    _forward,
)
_step_op = register_composite(
    "gated_delta_rule_step", f"({_INPUTS}, Tensor state, float scale) -> (Tensor, Tensor)", _step
)


def _check(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, *, state: Tensor | None, count: int
) -> None:
    name = "gated_delta_rule"
    if q.dim() != 4 or v.dim() != 4 or q.shape[1] < 1:
        raise HeddleError("bad-argument", f"{name}: q, k, v must be [B, T, heads, *] with at least one token")
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    if HV % H:
        raise HeddleError("bad-argument", f"{name}: {H} key heads do not divide {HV} value heads")
    gate, expected_state = (B, T, HV), (count, HV, K, V)
    expected = {
        "k": (k, (B, T, H, K)),
        "v": (v, (B, T, HV, V)),
        "log_decay": (log_decay, gate),
        "beta": (beta, gate),
    }
    check_shapes(name, {**expected, "state": (state, expected_state)})


def gated_delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    state: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """One token of `gated_delta_rule`: its output, and the state after it.

    Shapes:  q, k: [B, 1, H, K];  v, out: [B, 1, HV, V];  log_decay, beta: [B, 1, HV];  state: [B, HV, K, V], float32

    Raises:
        HeddleError: "bad-argument" for shapes that do not fit, or more than one token.
    """
    if q.dim() == 4 and q.shape[1] != 1:
        raise HeddleError("bad-argument", f"gated_delta_rule_step takes one token, got {q.shape[1]}")
    _check(q, k, v, log_decay, beta, state=state, count=q.shape[0])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _step_op(q, k, v, log_decay, beta, state.to(wide_dtype(v.dtype)), scale)  # type: ignore[no-any-return]


def _draw(shape: Shape, generator: torch.Generator) -> Inputs:
    B, T, H, K, V = (shape[letter] for letter in "BTHKV")
    HV = shape.get("HV", H)

    return {
        "q": F.normalize(normal(generator, B, T, H, K), dim=-1),
        "k": F.normalize(normal(generator, B, T, H, K), dim=-1),
        "v": normal(generator, B, T, HV, V),
        "log_decay": -F.softplus(2.0 * normal(generator, B, T, HV) - 2.0),
        "beta": torch.sigmoid(normal(generator, B, T, HV)),
    }


def _draw_state(shape: Shape, generator: torch.Generator) -> Tensor:
    B, H, K, V = (shape[letter] for letter in "BHKV")
    return normal(generator, B, shape.get("HV", H), K, V)


def _work(shape: Shape, phase: Phase, element: int) -> Work:
    B, T, H, K, V = (shape[letter] for letter in "BTHKV")
    HV = shape.get("HV", H)
    if phase == "decode":
        return Work(7 * B * HV * K * V, B * HV * 2 * 4 * K * V)
    # Backward costs 2.7 times as much.
    flops = B * T * HV * (2 * CHUNK * (3 * K + 2 * V) + 6 * K * V)
    rows = B * T * (2 * H * K + 2 * HV * V) * element
    if phase == "fwd":
        return Work(flops, rows + B * T * HV * 8)
    return Work(round(3.7 * flops), rows + B * T * (4 * H * K + 3 * HV * V) * element + B * T * HV * 24)


_CASES = Traits(
    inputs=_draw,
    initial_state=_draw_state,
    sequence=("q", "k", "v", "log_decay", "beta"),
    rounded=("q", "k", "v"),
    differentiable=("q", "k", "v", "log_decay", "beta"),
    output_like="v",
    test_shapes=({"B": 2, "H": 2, "HV": 4, "K": 16, "V": 16}, {"B": 1, "H": 2, "HV": 2, "K": 24, "V": 40}),
    bench_shapes=({"B": 1, "T": 4096, "H": 16, "HV": 16, "K": 128, "V": 128},),
    decode_shapes=tuple({"B": B, "T": 1, "H": 16, "HV": 16, "K": 128, "V": 128} for B in (1, 64)),
    work=_work,
)


@op(gated_delta_rule_reference, _CASES, step=gated_delta_rule_step)
def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Linear attention that fades by a gate and corrects what it has stored, and its state at the end.

        S'_t = exp(log_decay_t) S_(t-1),   S_t = S'_t + beta_t k_t (v_t - S'_tᵀ k_t)ᵀ,   o_t = scale * S_tᵀ q_t
                                                                                           (arXiv 2412.06464)

    q and k have length 1. Value head j reads key head j // (HV / H). `scale` defaults to K^-0.5. With `cu_seqlens`
    (B = 1) the time axis holds N packed sequences, each on its own.

    Shapes:  q, k: [B, T, H, K];  v, o: [B, T, HV, V];  log_decay (at most 0), beta: [B, T, HV]
             states: [B, HV, K, V] or [N, HV, K, V], float32 (float64 for float64);  cu_seqlens: [N + 1]

    Raises:
        HeddleError: "bad-argument" for shapes that do not fit.
    """
    check_packing("gated_delta_rule", q.shape[0], q.shape[1], cu_seqlens)
    count = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    _check(q, k, v, log_decay, beta, state=initial_state, count=count)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _forward_op(q, k, v, log_decay, beta, scale, initial_state, cu_seqlens)  # type: ignore[no-any-return]
