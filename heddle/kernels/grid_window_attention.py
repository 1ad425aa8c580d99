"""Softmax attention over a window along each axis of an image or a video, and its reference.

The kernels hold a box of queries and walk over the box of keys that their windows fill, with addresses that are computed, so
that each key is read once for the box and nothing is listed. Plain torch gathers the keys of each query (`member_attention`).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from heddle.errors import HeddleError
from heddle.kernels.member_attention import member_attention
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
)

try:
    from heddle.kernels._grid_window_attention_op import kernels

    HAS_KERNELS = True
except ImportError:
    HAS_KERNELS = False

# Of a key and of a value head, in the kernels.
MAX_HEAD_SIZE = 256
BOUNDARIES = ("clip", "inward")


def grid_window_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    width: int,
    height: int | None = None,
    column_window: int | None = None,
    row_window: int | None = None,
    frame_window: int | None = None,
    boundary: Literal["clip", "inward"] = "clip",
    real: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """`grid_window_attention` in float64 with a mask of all pairs; shares nothing with it."""
    (B, _, T, d), group = q.shape, q.shape[1] // k.shape[1]
    there = torch.ones(B, T, dtype=torch.bool, device=q.device) if real is None else (real > 0).expand(B, T)
    place, count = there.long().cumsum(1) - 1, there.sum(1)
    of_frame = width * (height or 1)
    axes = [(place % width, torch.full_like(count, width), column_window)]
    if height is None:
        axes.append((place // width, (count + width - 1) // width, row_window))
    else:
        axes.append((place % of_frame // width, torch.full_like(count, height), row_window))
        axes.append((place // of_frame, (count + of_frame - 1) // of_frame, frame_window))
    seen = there[:, None, :].expand(B, T, T)
    for at, size, window in axes:
        if window is None:
            continue
        query, key, reach = at[:, :, None], at[:, None, :], window - 1
        # What is missing on one side is added on the other, as the paper has it.
        below = (query + reach - size[:, None, None] + 1).clamp(min=0) if boundary == "inward" else 0
        above = (reach - query).clamp(min=0) if boundary == "inward" else 0
        seen = seen & (key >= query - reach - below) & (key <= query + reach + above)
    keys, values = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
    logits = q.double() @ keys.mT * (d**-0.5 if scale is None else scale)
    # Of padding anything, and then nothing.
    p = torch.softmax(logits.masked_fill(~(seen | ~there[:, :, None])[:, None], -torch.inf), dim=-1)
    return p @ values * there[:, None, :, None]


def real_run(real: Tensor) -> tuple[Tensor, Tensor]:
    """The first token of each row that is no padding, and how many there are.  Shapes:  real: [B, T];  out: twice [B]"""
    marks = (real > 0).to(torch.int32)
    return marks.argmax(dim=-1).to(torch.int32), marks.sum(dim=-1, dtype=torch.int32)


def window_keys(
    tokens: int,
    windows: tuple[int, int, int, int, int],
    *,
    slides: bool,
    begin: Tensor,
    count: Tensor,
) -> Tensor:
    """The keys that each token sees, as places in the whole row, -1 for none; padding sees none.

    `windows`: height, width and the windows of frames, rows and columns, 0 for no frames and for whole axes.

    Shapes:  begin, count: [1 or B] integers;  out: [1 or B, T, keys] int64
    """
    begin, count = (x.long()[:, None] for x in (begin, count))
    place = torch.arange(tokens, device=begin.device)[None] - begin
    index = torch.zeros_like(place)[..., None]
    is_seen = ((place >= 0) & (place < count))[..., None]
    for step, size, window in _axes(windows):
        # The longest that the axis may be, and how long it is in each row.
        most, extent = (-(-tokens // step), -(-count // step)) if size is None else (size, size)
        here = place // step if size is None else place // step % size
        reach = (window or most) - 1
        listed = min(2 * reach + 1, most)
        last = extent - listed if isinstance(extent, int) else (extent - listed).clamp(min=0)
        first = torch.minimum((here - reach).clamp(min=0), torch.as_tensor(last, device=place.device))
        key = first[..., None] + torch.arange(listed, device=place.device)
        inside = key < (extent if isinstance(extent, int) else extent[..., None])
        if window and not slides:
            inside = inside & ((key - here[..., None]).abs() <= reach)
        index = (index[..., None] + step * key[..., None, :]).flatten(2)
        is_seen = (is_seen[..., None] & inside[..., None, :]).flatten(2)
    is_seen = is_seen & (index < count[..., None])
    return torch.where(is_seen, index + begin[..., None], -1)


def _axes(windows: tuple[int, int, int, int, int]) -> list[tuple[int, int | None, int]]:
    """Of each axis the tokens from one place to the next, its size (None: as the tokens make it) and its window (0: all)."""
    height, width, frames, rows, columns = windows
    if not height:
        return [(width, None, rows), (1, width, columns)]
    return [(width * height, None, frames), (width, height, rows), (1, width, columns)]


def _dispatch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    real: Tensor | None,
    height: int,
    width: int,
    frame_window: int,
    row_window: int,
    column_window: int,
    slides: bool,
    scale: float,
) -> Tensor:
    windows = (height, width, frame_window, row_window, column_window)
    (B, H, T, _), group = q.shape, q.shape[1] // k.shape[1]
    run = None if real is None else real_run(real)
    if grid_window_attention.choose(q.device, q.dtype, K=q.shape[3], V=v.shape[3]) == "triton":
        begin, count = (None, None) if run is None else (x.expand(B).contiguous() for x in run)
        trains = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        return kernels(q, k, v, begin, count, *windows, slides, scale, trains)[0]  # type: ignore[no-any-return]
    if run is None:
        run = (torch.zeros(1, dtype=torch.int64, device=q.device), torch.full((1,), T, device=q.device))
    index = window_keys(T, windows, slides=slides, begin=run[0], count=run[1])[:, None].expand(B, H, -1, -1)
    k, v = (side.repeat_interleave(group, dim=1) for side in (k, v))
    own = torch.zeros_like(v)
    return member_attention(q, k, v, index, own=own, scale=scale)


_op = register_composite(
    "grid_window_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? real, int height, int width, int frame_window, int row_window, "
    "int column_window, bool slides, float scale) -> Tensor",
    _dispatch,
)


def _draw(shape: Shape, generator: torch.Generator) -> Inputs:
    B, H, N, T, K, V = (shape[name] for name in ("B", "H", "N", "T", "K", "V"))
    return {
        "q": normal(generator, B, H, T, K),
        "k": normal(generator, B, N, T, K),
        "v": normal(generator, B, N, T, V),
    }


_NUMBERS = ("width", "height", "column_window", "row_window", "frame_window")


def _work(shape: Shape, phase: Phase, element: int) -> Work:
    """Two products of a query with each key that it sees, clipped or not about as many; seven in both directions."""
    T, width, height = shape["T"], shape["width"], shape.get("height", 0)
    step = width * (height or 1)
    sizes = {"column_window": width, "row_window": height or -(-T // width), "frame_window": -(-T // step)}
    seen = math.prod(min(size, 2 * shape[name] - 1) for name, size in sizes.items() if name in shape)
    flops = 2 * shape["B"] * shape["H"] * T * seen * (shape["K"] + shape["V"])
    size = shape["B"] * T * (shape["H"] + shape["N"]) * (shape["K"] + shape["V"])
    if phase == "fwdbwd":
        return Work(flops * 7 // 2, 3 * size * element)
    return Work(flops, size * element)


_WIDE = {"H": 16, "N": 16, "K": 128, "V": 128}
_CASES = Traits(
    inputs=_draw,
    # Attention has no state.
    initial_state=lambda shape, generator: normal(generator, 0),  # noqa: ARG005
    sequence=("q", "k", "v"),
    rounded=("q", "k", "v"),
    differentiable=("q", "k", "v"),
    output_like="q",
    test_shapes=(
        {"B": 2, "H": 4, "N": 2, "T": 37, "K": 16, "V": 24, "width": 7, "row_window": 3, "column_window": 2},
    ),
    bench_shapes=(
        *(
            {"B": 8, "T": 4096, **_WIDE, "width": 64, "row_window": window, "column_window": window}
            for window in (16, 8)
        ),
        {"B": 1, "T": 32768, **_WIDE, "width": 64, "height": 32,
         "column_window": 8, "row_window": 8, "frame_window": 8},
    ),
    work=_work,
    numbers=lambda shape: {name: shape[name] for name in _NUMBERS if name in shape},
)  # fmt: skip


def _fits(shape: Shape) -> bool:
    return HAS_KERNELS and max(shape["K"], shape["V"]) <= MAX_HEAD_SIZE


_LIMITS = f"K and V up to {MAX_HEAD_SIZE}"


@op(grid_window_attention_reference, _CASES, kernel=_fits, limits=_LIMITS)
def grid_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    width: int,
    height: int | None = None,
    column_window: int | None = None,
    row_window: int | None = None,
    frame_window: int | None = None,
    boundary: Literal["clip", "inward"] = "clip",
    real: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention of each token of an image or a video over those in its window on every axis.    (arXiv 2511.14712)

        o_i = sum_j softmax_j(scale · q_i · k_j) v_j,   |j_a - i_a| < window_a on each axis a

    Token p stands at (p // width, p % width), with a `height` at (p // (height width), p // width % height, p % width); the first
    axis is as long as the tokens make it, and its last row or frame may be short. With `boundary` "inward" windows slide at the
    ends: the 2 window_a - 1 places from clamp(i_a - window_a + 1, 0, n_a - 2 window_a + 1) on, as many for every query. A window
    of None is the whole axis. A line is one row: a `width` of T.

    The tokens of a row that are `real` stand side by side, and places count from the first of them; others see nothing, are
    not seen, and get 0. Query head h reads key head h // (H / N). `scale` defaults to d^-0.5. The kernels leave output and
    gradients in memory with time before heads, and gradients are the same to the bit every time. Nothing waits for the device.

    Shapes:  q: [B, H, T, d];  k: [B, N, T, d];  v: [B, N, T, V];  out: [B, H, T, V];  of one dtype;  real: [1 or B, T] bool

    Raises:
        HeddleError: "bad-argument" for shapes, dtypes or numbers that do not fit.
    """
    name = "grid_window_attention"
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise HeddleError("bad-argument", f"{name}: q, k, v must be [B, heads, tokens, *]")
    check_tensors(name, {"q": q, "k": k, "v": v}, masks={"real": real})
    (B, H, T, d), N, V = q.shape, k.shape[1], v.shape[-1]
    if N < 1 or H % N:
        raise HeddleError("bad-argument", f"{name}: {N} key heads do not divide {H} query heads")
    rows = B if real is None or real.shape[0] > 1 else 1
    check_shapes(name, {"k": (k, (B, N, T, d)), "v": (v, (B, N, T, V)), "real": (real, (rows, T))})
    windows = {"frame_window": frame_window, "row_window": row_window, "column_window": column_window}
    for what, number in {"width": width, "height": height, **windows, "scale": scale}.items():
        if number is not None and number <= 0:
            raise HeddleError("bad-argument", f"{name}: {what} {number} must be positive")
    if frame_window is not None and height is None:
        raise HeddleError("bad-argument", f"{name}: frame_window {frame_window} without a height")
    if boundary not in BOUNDARIES:
        raise HeddleError("bad-argument", f"{name}: boundary {boundary!r} is none of {', '.join(BOUNDARIES)}")
    numbers = (height or 0, width, *(window or 0 for window in windows.values()))
    return _op(q, k, v, real, *numbers, boundary == "inward", d**-0.5 if scale is None else scale)  # type: ignore[no-any-return]
