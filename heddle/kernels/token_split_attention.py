"""Softmax attention over near tokens and over those that stay keys, beside a linear state of all others; and its reference.

The kernels hold a tile of queries of one head and walk over near keys and over a list of those that stay; products with the
state are torch's. In plain torch a chunk comes after the other. Nothing of T x T stands in memory. A decode step is a call with
one query, in plain torch. Necessary work for a query that sees E keys of size d: 4 d E FLOPs and 2 f (d + 1), and as many
once for its own token.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from heddle.errors import HeddleError
from heddle.kernels._token_split_attention_torch import Form, Given, forward
from heddle.kernels.common.varlen import check_packing, known_lengths
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
    from heddle.kernels._token_split_attention_op import attend

    HAS_KERNELS = True
except ImportError:
    HAS_KERNELS = False

# Of a key and of a value head, in the kernels.
MAX_HEAD_SIZE = 256


def token_split_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: Tensor,
    *,
    gate: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    chunk: int,
    keep: int,
    begin: int = 0,
    padding: Tensor | None = None,
    written: Tensor | None = None,
    far_k: Tensor | None = None,
    far_v: Tensor | None = None,
    far_written: Tensor | None = None,
    initial_state: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`token_split_attention` in float64 by masks of all queries by all keys; shares nothing with it."""
    if cu_seqlens is not None:
        ends: list[int] = cu_seqlens.tolist()
        shape = (len(ends) - 1, k.shape[1], phi_k.shape[-1], v.shape[-1] + 1)
        before = torch.zeros(shape, dtype=torch.float64) if initial_state is None else initial_state
        outputs, states = [], [before[i : i + 1].double() for i in range(len(ends) - 1)]
        for i, (a, b) in ((i, ab) for i, ab in enumerate(pairwise(ends)) if ab[1] > ab[0]):
            sides = (x[:, :, a:b] for x in (q, k, v, kept, gate, phi_q, phi_k))
            q_i, k_i, v_i, kept_i, gate_i, phi_q_i, phi_k_i = sides
            o, states[i] = token_split_attention_reference(
                q_i,
                k_i,
                v_i,
                kept_i,
                gate=gate_i,
                phi_q=phi_q_i,
                phi_k=phi_k_i,
                chunk=chunk,
                keep=keep,
                written=None if written is None else written[:, a:b],
                initial_state=states[i],
                scale=scale,
            )
            outputs.append(o)
        return torch.cat(outputs, dim=2), torch.cat(states)
    group, (T, S) = q.shape[1] // k.shape[1], (q.shape[2], k.shape[2])
    factor = q.shape[-1] ** -0.5 if scale is None else scale

    def heads(x: Tensor) -> Tensor:
        return x.double().repeat_interleave(group, dim=1)

    place = begin + torch.arange(S)[None] - (torch.zeros(1, 1) if padding is None else padding[:, None])
    here, number = place[:, S - T :, None], torch.div(place, chunk, rounding_mode="floor")
    # Chunks whose tokens the state or what is far has from before this call.
    first = number[:, S - T].clamp(min=0)[:, None] - 1
    marks = torch.ones(len(q), S, dtype=torch.float64) if written is None else written.double()
    there = (place >= 0) & (number >= first)
    seen = there & (marks > 0.5)
    earlier = (number[:, :, None] == number[:, None]) & torch.ones(S, S, dtype=torch.bool).tril()
    stays = kept.double() > 0.5
    stays = stays & ((earlier[:, None].double() @ stays.double()[..., None])[..., 0] <= keep)
    own, since = place[:, None] == here, number[:, S - T :, None] - number[:, None]
    # [B, N, T, S]: what is read exactly, and what by the state.
    left = ((since > 1) & there[:, None])[:, None]
    near = (since <= 1) & (place[:, None] <= here)
    exact = ((near[:, None] | (left & stays[:, :, None])) & seen[:, None, None]) | own[:, None]
    folded = left & ~stays[:, :, None]
    bias = (marks - marks.detach())[:, None, None].masked_fill(own[:, None], 0.0)
    logits = factor * q.double() @ heads(k).mT
    logits = (logits + bias).masked_fill(~exact.repeat_interleave(group, dim=1), -torch.inf)
    values = heads(v)
    if far_k is not None and far_v is not None:
        marks_far = heads(torch.ones(far_k.shape[:3]) if far_written is None else far_written)[:, :, None]
        to_far = factor * q.double() @ heads(far_k).mT + (marks_far - marks_far.detach())
        to_far = to_far.masked_fill(marks_far <= 0.5, -torch.inf)
        logits, values = torch.cat((to_far, logits), dim=-1), torch.cat((heads(far_v), values), dim=2)
    weight = torch.exp(logits - logits.amax(-1, keepdim=True))
    ones = v.new_ones(*v.shape[:3], 1, dtype=torch.float64)
    counted = torch.cat((v.double(), ones), dim=-1)
    shape = (*k.shape[:2], phi_k.shape[-1], v.shape[-1] + 1)
    state = torch.zeros(shape, dtype=torch.float64) if initial_state is None else initial_state.double()
    alike = phi_q.double() @ heads(phi_k).mT * (folded * marks[:, None, None]).repeat_interleave(group, dim=1)
    recalled = alike @ heads(counted) + phi_q.double() @ heads(state)
    out = weight @ values + gate.double() * recalled[..., :-1]
    out = out / (weight.sum(-1, keepdim=True) + recalled[..., -1:])
    out = out * (here >= 0)[:, None].double()
    left = (torch.div(place[:, -1:] + 1, chunk, rounding_mode="floor") - number > 1) & there
    share = (left[:, None] & ~stays) * marks[:, None]
    return out, state + (phi_k.double() * share[..., None]).mT @ counted


_SIDES = "Tensor q, Tensor k, Tensor v, Tensor kept, Tensor gate, Tensor phi_q, Tensor phi_k"
_LIMITS = "Tensor? padding, Tensor? written, Tensor? far_k, Tensor? far_v, Tensor? far_written"


def _dispatch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: Tensor,
    gate: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    padding: Tensor | None,
    written: Tensor | None,
    far_k: Tensor | None,
    far_v: Tensor | None,
    far_written: Tensor | None,
    state: Tensor,
    chunk: int,
    keep: int,
    begin: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    far = (far_k, far_v, far_written)
    given = Given(q, k, v, kept, gate, phi_q, phi_k, padding, written, *far)
    form = Form(chunk, keep, begin, scale)
    # A step has one query, for which tiles of them are no use.
    is_step = q.shape[2] == 1 and not torch.is_grad_enabled()
    if (
        not is_step
        and token_split_attention.choose(q.device, q.dtype, K=q.shape[3], V=v.shape[3]) == "triton"
    ):
        return attend(given, form, state)
    return forward(given, form, state)


_op = register_composite(
    "token_split_attention",
    f"({_SIDES}, {_LIMITS}, Tensor state, int chunk, int keep, int begin, float scale) -> (Tensor, Tensor)",
    _dispatch,
)


def _packed(
    sides: Sequence[Tensor],
    written: Tensor | None,
    state: Tensor,
    numbers: Sequence[Any],
    lengths: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Every packed sequence alone."""
    # Of slices each gradient would be as long as the whole.
    parts = zip(*(x.split_with_sizes(list(lengths), 2) for x in sides), strict=True)
    marks = [None] * len(lengths) if written is None else written.split_with_sizes(list(lengths), 1)
    outputs, states = [], list(torch.split(state, 1))
    for i, (one, mark, length) in enumerate(zip(parts, marks, lengths, strict=True)):
        if length > 0:
            o, states[i] = _op(*one, None, mark, None, None, None, states[i], *numbers)
            outputs.append(o)
    return torch.cat(outputs, dim=2), torch.cat(states)


def _draw(shape: Shape, generator: torch.Generator) -> Inputs:
    """Features as of softmax, and `keep` tokens at random that stay of each chunk."""
    B, H, N, T, S, K, V, F = (shape[name] for name in ("B", "H", "N", "T", "S", "K", "V", "F"))
    chunks = -(-S // shape["chunk"])
    worth = normal(generator, B, N, chunks, shape["chunk"])
    kept = torch.zeros_like(worth).scatter(-1, worth.argsort(dim=-1)[..., : shape["keep"]], 1.0)
    return {
        "q": normal(generator, B, H, T, K),
        "k": normal(generator, B, N, S, K),
        "v": normal(generator, B, N, S, V),
        "kept": kept.flatten(2)[:, :, :S].contiguous(),
        "gate": torch.sigmoid(normal(generator, B, H, T, V)),
        "phi_q": torch.softmax(normal(generator, B, H, T, F), dim=-1),
        "phi_k": torch.softmax(normal(generator, B, N, S, F), dim=-1),
    }


def _draw_state(shape: Shape, generator: torch.Generator) -> Tensor:
    B, N, V, F = (shape[name] for name in ("B", "N", "V", "F"))
    # Sums of features are positive, as what they are divided by must be.
    return torch.rand(B, N, F, V + 1, generator=generator, device=generator.device, dtype=torch.float64)


def _work(shape: Shape, phase: Phase, element: int) -> Work:
    """Both products with keys in view, and the features' with the state, in both directions three and a half and three times."""
    B, H, N, T, K, V, F = (shape[name] for name in ("B", "H", "N", "T", "K", "V", "F"))
    chunk, chunks = shape["chunk"], -(-T // shape["chunk"])
    # Half of the own chunk and all of the one before, and what is kept of those before that.
    seen = T * (chunk + 1) // 2 + max(0, T - chunk) * chunk
    seen += shape["keep"] * chunk * sum(range(max(0, chunks - 1)))
    softmax, linear = 2 * B * H * seen * (K + V), 2 * B * (H + N) * T * F * (V + 1)
    rows = B * ((H * T * (K + 2 * V) + N * T * (K + V)) * element + (H + N) * T * F * 4)
    if phase == "fwdbwd":
        return Work(int(3.5 * softmax + 3 * linear), 3 * rows)
    return Work(softmax + linear, rows)


# Heads of Llama 3 8B, where those of a group choose together.
_WIDE = {"H": 32, "N": 8, "K": 128, "V": 128, "F": 256, "chunk": 64, "keep": 4}
_CASES = Traits(
    inputs=_draw,
    initial_state=_draw_state,
    sequence=("q", "k", "v", "kept", "gate", "phi_q", "phi_k"),
    rounded=("q", "k", "v"),
    differentiable=("q", "k", "v", "gate", "phi_q", "phi_k"),
    output_like="q",
    test_shapes=(
        {"B": 2, "H": 4, "N": 2, "T": 37, "S": 37, "K": 16, "V": 16, "F": 6, "chunk": 8, "keep": 2},
    ),
    bench_shapes=({"B": 8, "T": 4096, "S": 4096, **_WIDE}, {"B": 1, "T": 32768, "S": 32768, **_WIDE}),
    work=_work,
    numbers=lambda shape: {"chunk": shape["chunk"], "keep": shape["keep"]},
)


def _fits(shape: Shape) -> bool:
    return HAS_KERNELS and max(shape["K"], shape["V"]) <= MAX_HEAD_SIZE


@op(
    token_split_attention_reference,
    _CASES,
    kernel=_fits,
    limits=f"K and V up to {MAX_HEAD_SIZE}",
)
def token_split_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: Tensor,
    *,
    gate: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    chunk: int,
    keep: int,
    begin: int = 0,
    padding: Tensor | None = None,
    written: Tensor | None = None,
    far_k: Tensor | None = None,
    far_v: Tensor | None = None,
    far_written: Tensor | None = None,
    initial_state: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax over the keys that are near or stay, and a linear state of all others, merged exactly.    (arXiv 2602.02180)

        o = (sum_E e^(s_j - m) v_j + gate * φ(q) S) / (sum_E e^(s_j - m) + φ(q) z),   [S, z] = sum_F φ(k_j)ᵀ [v_j, 1]
        s_j = scale q · k_j,   m = max_E s_j

    E: the query's own chunk up to itself, the chunk before that, and of all chunks before that the tokens that are `kept`, `keep`
    of each at most (of more the first). F: all others up to the query, so that each token counts once. E holds the query's own
    key, so its sum is at least 1; features are to be positive, or the sums may cancel. Features and gate come as they are,
    whatever made them. All but `kept` have gradients, m too: from the kernels that of the first key whose logit is m, and all the
    same to the bit every time.

    The T queries are the last of the S tokens. The first token stands at the place `begin`, less a row's `padding`; at negative
    places there is none: no query sees it, and a query gives 0 there. A call goes on where another has ended with its state, with
    the last tokens from the chunk before the next query's on (of earlier chunks nothing is read), and as `far` the kept tokens of
    all earlier chunks, which all of its queries see. `written` and `far_written` say which tokens are seen, the own always: they
    have the gradient of a bias of the logits, and `written` is a factor of what the state takes. Query head h reads key head
    h // (H / N). `scale` defaults to d^-0.5.
    With `cu_seqlens`, S = T tokens hold several sequences one behind the other, each with a state; they are worked on one by
    one, for which the host waits for the device, and cannot be compiled.

    Shapes:  q: [B, H, T, d];  k: [B, N, S, d];  v: [B, N, S, V];  out: [B, H, T, V];  far_k, far_v: [B, N, M, *];  of one dtype
             gate: [B, H, T, V];  phi_q: [B, H, T, f];  phi_k: [B, N, S, f];  kept: [B, N, S];  written: [B, S], far_written:
             [B, N, M], of 0 and 1 or bool;  padding: [B] integers;  state: [B, N, f, V + 1], wide, the sums of φ in its last
             column;  cu_seqlens: [sequences + 1] integers, B = 1, and the states' B is their number

    Raises:
        HeddleError: "bad-argument" for shapes, dtypes or numbers that do not fit.
    """
    name = "token_split_attention"
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4 or not 1 <= q.shape[2] <= k.shape[2]:
        what = "q, k, v must be [B, heads, tokens, *], with at least one query and no more than keys"
        raise HeddleError("bad-argument", f"{name}: {what}")
    (B, H, T, d), (N, S), V = q.shape, k.shape[1:3], v.shape[-1]
    if H % N:
        raise HeddleError("bad-argument", f"{name}: {N} key heads do not divide {H} query heads")
    if not 0 <= keep <= chunk or chunk < 1 or begin < 0:
        what = f"chunk {chunk} must be positive, keep {keep} between 0 and that, begin {begin} not negative"
        raise HeddleError("bad-argument", f"{name}: {what}")
    if (far_k is None) != (far_v is None) or (far_k is None and far_written is not None):
        raise HeddleError("bad-argument", f"{name}: far_k and far_v come together, far_written with both")
    sides = {"q": q, "k": k, "v": v, "far_k": far_k, "far_v": far_v}
    floats = {"gate": gate, "phi_q": phi_q, "phi_k": phi_k, "initial_state": initial_state}
    masks = {"kept": kept, "written": written, "far_written": far_written}
    check_tensors(
        name, sides, floats=floats, integers={"padding": padding, "cu_seqlens": cu_seqlens}, masks=masks
    )
    check_packing(name, B, T, cu_seqlens, keys=S)
    if cu_seqlens is not None and (begin or padding is not None or far_k is not None):
        raise HeddleError("bad-argument", f"{name}: packed sequences have no begin, padding or far_k")
    f, far = phi_q.shape[-1], 0 if far_k is None or far_k.dim() != 4 else far_k.shape[2]
    rows = B if cu_seqlens is None else len(cu_seqlens) - 1
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]]
    expected = {"k": (k, (B, N, S, d)), "v": (v, (B, N, S, V)), "kept": (kept, (B, N, S))}
    expected |= {"gate": (gate, (B, H, T, V)), "phi_q": (phi_q, (B, H, T, f)), "phi_k": (phi_k, (B, N, S, f))}
    expected |= {"far_k": (far_k, (B, N, far, d)), "far_v": (far_v, (B, N, far, V))}
    limits = {
        "padding": (padding, (B,)),
        "written": (written, (B, S)),
        "far_written": (far_written, (B, N, far)),
    }
    check_shapes(name, {**expected, **limits, "initial_state": (initial_state, (rows, N, f, V + 1))})
    wide = wide_dtype(q.dtype)
    state = q.new_zeros(rows, N, f, V + 1, dtype=wide) if initial_state is None else initial_state.to(wide)
    numbers = (chunk, keep, begin, d**-0.5 if scale is None else scale)
    if cu_seqlens is not None:
        lengths = known_lengths(name, cu_seqlens, T)
        return _packed((q, k, v, kept, gate, phi_q, phi_k), written, state, numbers, lengths)
    limited = (padding, written, far_k, far_v, far_written)
    return _op(q, k, v, kept, gate, phi_q, phi_k, *limited, state, *numbers)  # type: ignore[no-any-return]
