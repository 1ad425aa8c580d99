"""The gated recurrences of RAT, which begin again in every chunk of tokens, and the summaries that chunks leave; its reference.

On a GPU one kernel reads the projections once and writes what `rat_attention` attends over; elsewhere plain torch doubles.
Predicted cost of a channel and token: 10 bytes in bfloat16 and some 20 FLOP, so the memory bounds it.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from heddle.errors import HeddleError
from heddle.kernels._rat_torch import scan
from heddle.kernels.common.varlen import check_packing
from heddle.kernels.op import (
    Inputs,
    Phase,
    Shape,
    Traits,
    Work,
    check_shapes,
    check_tensors,
    heads_together,
    normal,
    op,
    register_composite,
    wide_dtype,
)

try:
    from heddle.kernels._rat_scan_op import RESULTS, kernels

    HAS_KERNELS = True
except ImportError:
    HAS_KERNELS = False

# Of a head, in the kernels.
MAX_HEAD_SIZE = 256
Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def rat_scan_reference(
    q: Tensor,
    k: Tensor,
    x: Tensor,
    gate: Tensor,
    *,
    gate_bias: Tensor,
    chunk: int,
    rotation: tuple[Tensor, Tensor] | None = None,
    start: int = 0,
    past: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Results:
    """`rat_scan` in float64, token by token; shares nothing with it."""
    (B, T, H, d), G = x.shape, q.shape[2]
    bounds: list[int] = [0, T] if cu_seqlens is None else cu_seqlens.tolist()
    sums = -(-T // chunk) if cu_seqlens is not None else (start + T) // chunk - start // chunk

    def turned(rows: Tensor, number: int) -> Tensor:
        if rotation is None:
            return rows
        cos, sin = (side[number - start // chunk].double() for side in rotation)
        size = cos.shape[0]
        pairs = torch.complex(rows[..., : size // 2], rows[..., size // 2 : size])
        pairs = pairs * torch.complex(cos, sin)[: size // 2]
        return torch.cat((pairs.real, pairs.imag, rows[..., size:]), dim=-1)

    group = torch.arange(H) % G
    queries, pairs, ends, lasts = [], [], {}, []
    # Cut up at once: of each part autograd makes a gradient as long as what it was cut from.
    tokens = [list(zip(*(one[b].double() for one in (q, k, x, gate)), strict=True)) for b in range(B)]
    for b, (begin, end) in ((b, one) for b in range(B) for one in pairwise(bounds)):
        state = x.new_zeros(2, H, d, dtype=torch.float64)
        if past is not None and start % chunk:
            state = past[b].double()
        for t in range(begin, end):
            number, place = divmod(start + t - begin, chunk)
            if place == 0:
                state = torch.zeros_like(state)
            q_t, k_t, x_t, gate_t = tokens[b][t]
            g = 1 / (1 + torch.exp(-(gate_t + gate_bias.double())))
            state = g * state + (1 - g) * torch.stack((x_t, k_t[group]))
            queries.append(turned(q_t, number))
            pairs.append(torch.stack((turned(state[1], number), state[0])))
            if place == chunk - 1:
                ends[b, t // chunk if cu_seqlens is not None else number - start // chunk] = pairs[-1]
        lasts.append(state)
    nothing = torch.zeros(2, H, d, dtype=torch.float64, device=x.device)
    rows = [ends.get((b, c), nothing) for b in range(B) for c in range(sums)]
    keys, values = torch.stack([*rows, nothing])[:-1].view(B, sums, 2, H, d).permute(2, 0, 3, 1, 4)
    key, value = torch.stack(pairs).view(B, T, 2, H, d).unbind(2)
    return torch.stack(queries).view(B, T, G, d), key, value, keys, values, torch.stack(lasts)


def _dispatch(
    q: Tensor,
    k: Tensor,
    x: Tensor,
    gate: Tensor,
    gate_bias: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    past: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk: int,
    start: int,
) -> tuple[Tensor, ...]:
    given = (q, k, x, gate, gate_bias, cos, sin, past, cu_seqlens, chunk, start)
    if rat_scan.choose(x.device, x.dtype, K=x.shape[3]) == "triton":
        return kernels(*given)[:RESULTS]  # type: ignore[no-any-return]
    return scan(*given)


_op = register_composite(
    "rat_scan",
    "(Tensor q, Tensor k, Tensor x, Tensor gate, Tensor gate_bias, Tensor? cos, Tensor? sin, Tensor? past, "
    f"Tensor? cu_seqlens, SymInt chunk, SymInt start) -> ({', '.join(['Tensor'] * 6)})",
    _dispatch,
    under_vmap=heads_together(
        "rat_scan", (2, 2, 2, 2, 0, None, None, 2, None, None, None), (2, 2, 2, 1, 1, 2)
    ),
)


def _draw(shape: Shape, generator: torch.Generator) -> Inputs:
    B, T, H, G, K = (shape[name] for name in ("B", "T", "H", "G", "K"))
    return {
        "q": normal(generator, B, T, G, K),
        "k": normal(generator, B, T, G, K),
        "x": normal(generator, B, T, H, K),
        "gate": normal(generator, B, T, H, K),
        "gate_bias": normal(generator, H, K),
    }


def _work(shape: Shape, phase: Phase, element: int) -> Work:
    """A recurrence takes three operations a channel and token, its gradients some three times as many."""
    tokens, width = shape["B"] * shape["T"], shape["H"] * shape["K"]
    shared = 2 * shape["G"] * shape["K"]
    # x and gate, k~ and x~; back x, gate and two gradients, and two of them written.
    numbers = 4 * width + 3 * shared / 2 + 2 * width // shape["chunk"]
    times, more = (3, 6 * width + 3 * shared / 2) if phase == "fwdbwd" else (1, 0)
    return Work(times * tokens * 6 * width, int(tokens * (numbers + more) * element))


_CASES = Traits(
    inputs=_draw,
    initial_state=lambda shape, generator: normal(generator, shape["B"], 2, shape["H"], shape["K"]),
    sequence=("q", "k", "x", "gate"),
    rounded=("q", "k", "x", "gate"),
    differentiable=("q", "k", "x", "gate", "gate_bias"),
    output_like="x",
    test_shapes=({"B": 2, "T": 37, "H": 4, "G": 2, "K": 16, "chunk": 5},),
    bench_shapes=tuple(
        {"B": B, "T": T, "H": 16, "G": 2, "K": 128, "chunk": 16} for B, T in ((8, 4096), (1, 102400))
    ),
    decode_shapes=tuple({"B": B, "T": 1, "H": 16, "G": 2, "K": 128, "chunk": 16} for B in (1, 32, 256)),
    work=_work,
    numbers=lambda shape: {"chunk": shape["chunk"]},
    read=(1, 2),
)


def _fits(shape: Shape) -> bool:
    return HAS_KERNELS and shape["K"] <= MAX_HEAD_SIZE


@op(rat_scan_reference, _CASES, kernel=_fits, limits=f"K up to {MAX_HEAD_SIZE}")
def rat_scan(
    q: Tensor,
    k: Tensor,
    x: Tensor,
    gate: Tensor,
    *,
    gate_bias: Tensor,
    chunk: int,
    rotation: tuple[Tensor, Tensor] | None = None,
    start: int = 0,
    past: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Results:
    """Keys and values that each channel averages by its own gate, from nothing in every chunk.

        k~_t = g_t * k~_{t-1} + (1 - g_t) * k_t,   x~ likewise of x,   g = sigmoid(gate + gate_bias)        (arXiv 2507.04416)

    Gives q, and k~ of all heads, both turned by the number of their chunk; x~; k~ and x~ at the last tokens of chunks, the
    summaries; and k~ (not turned) and x~ after the last token. The first token has `start` others before it, and `past` holds
    what their call gave last, which is needed if a chunk goes on. Head h has its k from group h mod G. `rotation` holds cosines
    and sines of the chunks from that of the first token on, halves equal; channels from R on do not turn. With `cu_seqlens` the
    tokens are several sequences one behind the other, and the summary that ends with token t is row t // chunk, zeros where none
    does. Gates and recurrences are float32.

    Shapes:  q, k, turned q: [B, T, G, d];  x, gate, key, value: [B, T, H, d];  gate_bias: [H, d];  rotation: two of [chunks, R]
             keys, values: [B, H, S, d], S chunks that end in the call (packed: T / chunk, rounded up)
             past, last states: [B or sequences, 2, H, d], x~ first, float32 (float64 for float64);  cu_seqlens: [sequences + 1]

    Raises:
        HeddleError: "bad-argument" for shapes, dtypes or numbers that do not fit.
    """
    name = "rat_scan"
    if q.dim() != 4 or x.dim() != 4 or x.shape[1] < 1:
        raise HeddleError(
            "bad-argument", f"{name}: q, k, x, gate must be [B, T, heads, d], at least one token"
        )
    (B, T, H, d), G = x.shape, q.shape[2]
    if H % G:
        raise HeddleError("bad-argument", f"{name}: {G} groups do not divide {H} heads")
    if chunk < 1 or start < 0:
        raise HeddleError(
            "bad-argument", f"{name}: chunk {chunk} must be positive, start {start} not negative"
        )
    if cu_seqlens is not None and (start or past is not None):
        raise HeddleError(
            "bad-argument", f"{name}: packed sequences begin with their first token: no start, no past"
        )
    if start % chunk and past is None:
        raise HeddleError("bad-argument", f"{name}: a call that begins inside a chunk needs past")
    cos, sin = (None, None) if rotation is None else rotation
    floats = {"gate_bias": gate_bias, "rotation[0]": cos, "rotation[1]": sin, "past": past}
    sides = {"q": q, "k": k, "x": x, "gate": gate}
    check_tensors(name, sides, floats=floats, integers={"cu_seqlens": cu_seqlens})
    check_packing(name, B, T, cu_seqlens)
    numbers = -(-(start % chunk + T) // chunk)
    turned = 0 if cos is None else cos.shape[-1]
    shared, own, table = (
        (B, T, G, d),
        (B, T, H, d),
        (numbers if cu_seqlens is None else -(-T // chunk), turned),
    )
    shapes = {
        "q": (q, shared), "k": (k, shared), "x": (x, own), "gate": (gate, own), "gate_bias": (gate_bias, (H, d)),
        "rotation[0]": (cos, table), "rotation[1]": (sin, table), "past": (past, (B, 2, H, d)),
    }  # fmt: skip
    check_shapes(name, shapes)
    if turned % 2 or turned > d:
        raise HeddleError(
            "bad-argument", f"{name}: {turned} channels turn, and it must be an even number up to {d}"
        )
    wide = wide_dtype(x.dtype)
    cos, sin, past = (None if side is None else side.to(wide) for side in (cos, sin, past))
    return _op(q, k, x, gate, gate_bias.to(wide), cos, sin, past, cu_seqlens, chunk, start)  # type: ignore[no-any-return]
