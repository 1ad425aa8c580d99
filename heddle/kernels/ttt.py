"""A memory that learns while it reads: fast weights, written by gradient descent a chunk at a time; the op and its reference.

With a linear memory in Triton on CUDA, in plain torch elsewhere; with an MLP in plain torch on every device. Necessary work for
a token and head of size D: 4 D² FLOPs with a linear memory, 18 D M with an MLP of M features, and once a chunk as many bytes as
its weights have.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from heddle.errors import HeddleError
from heddle.kernels._ttt_torch import Rule, chunked, state_size
from heddle.kernels.common.varlen import check_packing
from heddle.kernels.op import (
    Inputs,
    Phase,
    Shape,
    Traits,
    Work,
    check_shapes,
    check_tensors,
    normal,
    op,
    register_composite,
    wide_dtype,
)

try:
    from heddle.kernels._ttt_launch import WIDEST
    from heddle.kernels._ttt_op import forward_kernels

    HAS_KERNELS = True
except ImportError:
    HAS_KERNELS, WIDEST = False, 0

CHUNK = 64
LOSSES = ("dot", "l2")
NORMALISE = ("after", "before", "none")


def ttt_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rates: Tensor,
    momentum: Tensor | None,
    weight: Tensor,
    *,
    chunk: int = CHUNK,
    loss: str = "dot",
    normalise: str = "after",
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`ttt` sequence by sequence and chunk by chunk in float64, its inner gradients by torch.func; shares nothing with the
    fast path."""
    q, k, v, rates, weight = (x.double() for x in (q, k, v, rates, weight))
    gates = None if momentum is None else momentum.double()
    ends = [q.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()[1:]
    outputs, states = [], []
    for row in range(q.shape[0] if cu_seqlens is None else 1):
        begin = 0
        for index, end in enumerate(ends):
            held = None if initial_state is None else initial_state.double()[row + index]
            sides = [None if x is None else x[row, begin:end] for x in (q, k, v, rates, gates)]
            out, state = _one_sequence(sides, weight, held, (chunk, loss, normalise))
            outputs.append(out)
            states.append(state)
            begin = end
    out = torch.stack(outputs) if cu_seqlens is None else torch.cat(outputs)[None]
    return out, torch.stack(states)


def _memory(z: Tensor, weight: Tensor) -> Tensor:
    """Shapes:  z, out: [T, H, D];  weight: [H, N, M, D]"""
    hidden = z
    if weight.shape[1] == 3:
        gate, up = (torch.einsum("thd,hmd->thm", z, weight[:, n]) for n in (0, 1))
        hidden = gate / (1 + torch.exp(-gate)) * up
    return z + torch.einsum("thm,hmd->thd", hidden, weight[:, -1])


def _one_sequence(
    sides: list[Tensor | None], weight: Tensor, state: Tensor | None, rule: tuple[int, str, str]
) -> tuple[Tensor, Tensor]:
    """Shapes:  sides: [T, H, *];  weight: [H, N, M, D];  state: [H, F];  out: [T, H, D] and [H, F]"""
    q, k, v, rates, gates = sides
    assert q is not None
    assert k is not None
    assert v is not None
    assert rates is not None
    (chunk, loss, normalise), (heads, count) = rule, weight.shape[:2]
    size, parts = weight[0].numel(), 2 if gates is None else 3
    state = weight.new_zeros(heads, parts * size + 2) if state is None else state
    learned, *moving, gradient = (
        state[:, n * size : (n + 1) * size].reshape(weight.shape) for n in range(parts)
    )
    mean, place = state[:, -2], round(float(state[0, -1].detach()) * chunk)

    def objective(now: Tensor, token: slice, matrix: int) -> Tensor:
        read = _memory(k[token], now)
        each = -(read * v[token]).sum(-1) if loss == "dot" else (read - v[token]).square().sum(-1) / 2
        return (rates[token, :, matrix] * each).sum()

    def scaled(now: Tensor) -> Tensor:
        def norms(x: Tensor) -> Tensor:
            row, column = x.square().sum(-1, keepdim=True), x.square().sum(-2, keepdim=True)
            last = torch.arange(count)[:, None, None] == count - 1
            return torch.where(last, column.sqrt(), row.sqrt())

        return now * norms(weight) / (norms(now) + 1e-5)

    outputs, begin = [q[:0]], 0
    while begin < q.shape[0]:
        token = slice(begin, min(begin + chunk - place, q.shape[0]))
        now, read = weight + learned, token.stop - begin
        outputs.append(_memory(q[token], now))
        each = [torch.func.grad(objective)(now, token, n)[:, n] for n in range(count)]
        gradient = gradient + torch.stack(each, dim=1)
        mean = mean if gates is None else mean + gates[token].sum(0) / chunk
        begin, place = token.stop, place + read
        if place < chunk:
            break
        step = gradient + mean[:, None, None, None] * moving[0] if moving else gradient
        now = (scaled(now) if normalise == "before" else now) - step
        now = scaled(now) if normalise == "after" else now
        learned, moving, gradient = now - weight, [step] if moving else [], torch.zeros_like(gradient)
        mean, place = torch.zeros_like(mean), 0
    share = torch.full_like(mean, place / chunk)
    matrices = [x.flatten(1) for x in (learned, *moving, gradient)]
    return torch.cat(outputs), torch.cat((*matrices, mean[:, None], share[:, None]), dim=1)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rates: Tensor,
    momentum: Tensor | None,
    weight: Tensor,
    chunk: int,
    loss: str,
    normalise: str,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    real: Tensor | None,
) -> tuple[Tensor, Tensor]:
    sides = (q, k, v, rates, momentum)
    if ttt.choose(q.device, q.dtype, **shape_of(weight)) == "triton":
        rule = (chunk, loss, normalise)
        if real is not None:
            return _real_alone(sides, weight, rule, initial_state, real)
        return forward_kernels(*sides, weight, *rule, initial_state, cu_seqlens)  # type: ignore[no-any-return]
    return chunked(
        sides,
        weight,
        Rule(chunk, loss, normalise, v.dtype),
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        real=real,
    )


def _real_alone(
    sides: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None],
    weight: Tensor,
    rule: tuple[int, str, str],
    state: Tensor | None,
    real: Tensor,
) -> tuple[Tensor, Tensor]:
    """Rows without their padding as packed sequences, for the kernels; where a token is not real the output is 0."""
    # Real tokens first, in their order.
    order = (~real).flatten().long().sort(stable=True).indices
    counts = real.sum(-1)
    ends = F.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    there = torch.arange(order.shape[0], device=real.device) < ends[-1]

    def packed(x: Tensor) -> Tensor:
        taken = x.flatten(0, 1)[order]
        # Nobody writes gradients of the others.
        return torch.where(there.view(-1, *(1,) * (taken.dim() - 1)), taken, 0.0)[None]

    given = [None if x is None else packed(x) for x in sides]
    out, state = forward_kernels(*given, weight, *rule, state, ends)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=real.device))
    found = torch.where(there[:, None, None], out[0], 0.0)[place]
    return found.view(*real.shape, *found.shape[1:]), state


def shape_of(weight: Tensor) -> dict[str, int]:
    """The sizes that a path is chosen by.  Shapes:  weight: [H, N, M, D]"""
    sizes = {"K": weight.shape[3]}
    return sizes if weight.shape[1] == 1 else {**sizes, "M": weight.shape[2]}


def _fits(shape: Shape) -> bool | None:
    """There are kernels of a linear memory alone."""
    return None if "M" in shape else HAS_KERNELS and shape["K"] <= WIDEST


_forward_op = register_composite(
    "ttt",
    "(Tensor q, Tensor k, Tensor v, Tensor rates, Tensor? momentum, Tensor weight, int chunk, str loss, str normalise, "
    "Tensor? initial_state, Tensor? cu_seqlens, Tensor? real) -> (Tensor, Tensor)",
    _forward,
)


def _sizes(shape: Shape) -> tuple[int, int, int]:
    """Size of a head, features of its memory, and its matrices: linear where the shape names no features."""
    D = shape["K"]
    return D, shape.get("M", D), 3 if "M" in shape else 1


def _draw(shape: Shape, generator: torch.Generator) -> Inputs:
    (B, T, H), (D, M, N) = (shape[letter] for letter in "BTH"), _sizes(shape)
    return {
        "q": F.normalize(normal(generator, B, T, H, D), dim=-1),
        "k": F.normalize(normal(generator, B, T, H, D), dim=-1),
        "v": normal(generator, B, T, H, D),
        # What a chunk writes is a part of the weights: steps that throw them over would have no stable gradient.
        "rates": F.softplus(normal(generator, B, T, H, N) - 5.0),
        "momentum": torch.sigmoid(normal(generator, B, T, H)),
        "weight": normal(generator, H, N, M, D) * D**-0.5,
    }


def _draw_state(shape: Shape, generator: torch.Generator) -> Tensor:
    """A state in the middle of a chunk, near its end in the first row."""
    B, H = shape["B"], shape["H"]
    D, M, N = _sizes(shape)
    state = 0.2 * normal(generator, B, H, 3 * N * M * D + 2)
    place = (CHUNK - 3 - 20 * torch.arange(B, device=state.device)) % CHUNK
    state[..., -1] = (place / CHUNK)[:, None]
    return state


def _work(shape: Shape, phase: Phase, element: int) -> Work:
    (B, T, H), (D, M, N) = (shape[letter] for letter in "BTH"), _sizes(shape)
    # A read takes a product with each matrix, the gradient of a linear memory one more, that of an MLP two of each.
    sweeps = 1 if phase == "fwd" else 3
    flops = sweeps * 2 * B * T * H * M * D * (2 if N == 1 else 9)
    tensors = 4 if phase == "fwd" else 12
    scalars = (N + 1) * (1 if phase == "fwd" else 3)
    return Work(flops, B * T * H * (tensors * D * element + scalars * 4) + H * N * M * D * 4)


_CASES = Traits(
    inputs=_draw,
    initial_state=_draw_state,
    sequence=("q", "k", "v", "rates", "momentum"),
    rounded=("q", "k", "v"),
    differentiable=("q", "k", "v", "rates", "momentum", "weight"),
    output_like="v",
    test_shapes=({"B": 2, "H": 2, "K": 6, "M": 10}, {"B": 1, "H": 2, "K": 8}),
    bench_shapes=(
        {"B": 1, "T": 32768, "H": 16, "K": 128},
        {"B": 1, "T": 32768, "H": 4, "K": 256, "M": 256},
    ),
    work=_work,
)


@op(ttt_reference, _CASES, kernel=_fits, limits=f"a linear memory, K up to {WIDEST}")
def ttt(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rates: Tensor,
    momentum: Tensor | None,
    weight: Tensor,
    *,
    chunk: int = CHUNK,
    loss: str = "dot",
    normalise: str = "after",
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    real: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Reads a memory whose weights learn k -> v while they are read, and its state at the end.

        o_t = f_W(q_t),   f_W(z) = z + m_W(z),   m_W(z) = W_1 z, or W_1 (silu(W_0 z) * W_2 z)
        after every `chunk` tokens:  M = theta M + sum_t rate_t dL(f_W(k_t), v_t) / dW,   W = W - M        (arXiv 2602.13680)

    All tokens of a chunk read the weights from before it, and their gradients are taken there. L is -<f, v> ("dot") or
    |f - v|² / 2 ("l2"); theta is the chunk's mean of `momentum`, None for no M. `normalise`: rows of the matrices have the norm
    that they began with: after each write, or before it, so that what was written is read once as it is ("before"), or "none".
    `weight` holds N = 1 matrix, or 3 in the order W_0, W_2, W_1, W_1 transposed. An open chunk is read, and written when later
    calls have filled it. Tokens that are not `real` leave no trace and take no place. With `cu_seqlens` (B = 1) the time
    axis holds n packed sequences, each on its own.

    Shapes:  q, k, v, o: [B, T, H, D], of one dtype;  rates: [B, T, H, N];  momentum: [B, T, H];  weight: [H, N, M, D];
             real: [B, T] bool, without cu_seqlens;  cu_seqlens: [n + 1]
             states: [B or n, H, F], float32 (float64 for float64), F = 3 N M D + 2 (2 N M D + 2 without momentum): what W has
             learned, M, the open chunk's gradient; the mean of its gates so far, and the share of it that is read

    Raises:
        HeddleError: "bad-argument" for shapes or dtypes that do not fit, or an unknown loss or way to normalise.
    """
    _check(q, k, v, rates, momentum, weight)
    _check_rule(chunk, loss, normalise)
    floats = {"rates": rates, "momentum": momentum, "weight": weight, "initial_state": initial_state}
    limits = {"cu_seqlens": cu_seqlens}
    check_tensors("ttt", {"q": q, "k": k, "v": v}, floats=floats, integers=limits, masks={"real": real})
    check_packing("ttt", q.shape[0], q.shape[1], cu_seqlens)
    if real is not None and cu_seqlens is not None:
        raise HeddleError("bad-argument", "ttt: packed sequences hold no padding, so real must be None")
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    size = state_size(weight, has_momentum=momentum is not None)
    check_shapes(
        "ttt",
        {"initial_state": (initial_state, (rows, q.shape[2], size)), "real": (real, q.shape[:2])},
    )
    initial_state = None if initial_state is None else initial_state.to(wide_dtype(v.dtype))
    sides = (q, k, v, rates, momentum, weight)
    return _forward_op(*sides, chunk, loss, normalise, initial_state, cu_seqlens, real)  # type: ignore[no-any-return]


def _check(q: Tensor, k: Tensor, v: Tensor, rates: Tensor, momentum: Tensor | None, weight: Tensor) -> None:
    if q.dim() != 4 or q.shape[1] < 1:
        raise HeddleError("bad-argument", "ttt: q must be [B, T, H, D] with at least one token")
    (B, T, H, D), N = q.shape, weight.shape[1] if weight.dim() == 4 else 0
    if N not in (1, 3) or (N == 1 and weight.shape[2] != D):
        what = f"ttt: weight must be [{H}, 1, {D}, {D}] or [{H}, 3, M, {D}], not {list(weight.shape)}"
        raise HeddleError("bad-argument", what)
    expected = {
        "k": (k, q.shape),
        "v": (v, q.shape),
        "rates": (rates, (B, T, H, N)),
        "momentum": (momentum, (B, T, H)),
        "weight": (weight, (H, N, weight.shape[2], D)),
    }
    check_shapes("ttt", expected)


def _check_rule(chunk: int, loss: str, normalise: str) -> None:
    if chunk < 1:
        raise HeddleError("bad-argument", f"ttt: a chunk of {chunk} tokens, at least 1 is needed")
    for name, found, known in (("loss", loss, LOSSES), ("normalise", normalise, NORMALISE)):
        if found not in known:
            raise HeddleError("bad-argument", f"ttt: no {name} {found!r}", hint=" or ".join(map(repr, known)))
