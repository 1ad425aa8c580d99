"""Dynamic convolution, along a line and over images: taps of each token's own; the op, its reference and its path in plain torch.

Predicted cost of a token and head: 4 W d FLOP with taps of both sorts, and 2 d + 2 W elements moved, so the memory bounds it on
a GPU, where a kernel reads x once for all taps; plain torch makes some three passes over numbers of four bytes for each of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from heddle.errors import HeddleError
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
    from heddle.kernels._dynamic_conv_op import kernels

    HAS_KERNELS = True
except ImportError:
    HAS_KERNELS = False

# A program of the kernels holds whole rows of a head.
MAX_HEAD_SIZE = 1024


def dynamic_conv_reference(
    x: Tensor, weight: Tensor, *, static: Tensor | None = None, width: int | None = None
) -> Tensor:
    """`dynamic_conv` in float64, as products with a table of each token's neighbours; shares nothing with it."""
    x, weight = x.double(), weight.double()

    def neighbours(taps: int) -> Tensor:
        """Shapes:  out: [B, T, H, d, taps]"""
        if width is None:
            held = F.pad(x, (0, 0, 0, 0, taps - 1, 0)).unfold(1, taps, 1).flip(-1)
            return held[:, held.shape[1] - weight.shape[1] :]
        side, rows = math.isqrt(taps), -(-x.shape[1] // width)
        image = F.pad(x, (0, 0, 0, 0, 0, rows * width - x.shape[1])).flatten(2).mT
        # Each pixel's square as one column.
        found = F.unfold(image.reshape(len(x), -1, rows, width), side, padding=side // 2).mT
        return found.reshape(*found.shape[:2], *x.shape[2:], taps)[:, : x.shape[1]]

    y = torch.einsum("bthdj,bthj->bthd", neighbours(weight.shape[3]), weight)
    if static is None:
        return y
    return y + torch.einsum("bthdj,hdj->bthd", neighbours(static.shape[2]), static.double())


def _dispatch(x: Tensor, weight: Tensor, static: Tensor | None, width: int | None) -> Tensor:
    if dynamic_conv.choose(x.device, x.dtype, K=x.shape[3], W=weight.shape[3]) == "triton":
        return kernels(x, weight, static, width)  # type: ignore[no-any-return]
    wide, length = wide_dtype(x.dtype), weight.shape[1]
    made, fixed = weight.to(wide), None if static is None else static.to(wide)
    taps = (weight.shape[3], 0 if static is None else static.shape[2])
    if width is None:
        return _summed(_along(x.to(wide), length, taps), made, fixed).to(x.dtype)
    image, made = (_laid(side, width) for side in (x.to(wide), made))
    return _summed(_around(image, taps), made, fixed).flatten(1, 2)[:, :length].to(x.dtype)


# What each token reads by a tap, and the tap's number among those of tokens and among those of all, where there is such.
Row = tuple[Tensor, tuple[int | None, ...]]


def _summed(rows: Iterator[Row], made: Tensor, fixed: Tensor | None) -> Tensor:
    """The sum over taps.  Shapes:  rows: [..., H, d];  made: [..., H, taps];  fixed: [H, d, taps]"""
    y = None
    for row, (tap, fixed_tap) in rows:
        y = torch.zeros_like(row) if y is None else y
        if tap is not None:
            y = y + made[..., tap, None] * row
        if fixed is not None and fixed_tap is not None:
            y = y + fixed[..., fixed_tap] * row
    assert y is not None, "there is always a tap"
    return y


def _along(x: Tensor, length: int, taps: tuple[int, int]) -> Iterator[Row]:
    """Tokens before the last `length`, the own one first."""
    most = max(taps)
    held = F.pad(x, (0, 0, 0, 0, max(0, most - 1 - x.shape[1] + length), 0))
    for tap in range(most):
        end = held.shape[1] - tap
        yield held[:, end - length : end], tuple(tap if tap < count else None for count in taps)


def _laid(x: Tensor, width: int) -> Tensor:
    """Tokens as images, zeros behind the last.  Shapes:  x: [B, T, H, *];  out: [B, rows, width, H, *]"""
    rows = -(-x.shape[1] // width)
    padded = F.pad(x, (0, 0, 0, 0, 0, rows * width - x.shape[1]))
    return padded.unflatten(1, (rows, width))  # type: ignore[no-any-return, no-untyped-call]


def _around(image: Tensor, taps: tuple[int, int]) -> Iterator[Row]:
    """The squares around pixels, row by row, as views: copies of all would stand in memory until the backward pass."""
    (rows, width), sides = image.shape[1:3], [math.isqrt(count) for count in taps]
    reach = max(sides) // 2
    held = F.pad(image, (0, 0, 0, 0, reach, reach, reach, reach))
    for down, right in product(range(max(sides)), repeat=2):
        places = [(down - reach + side // 2, right - reach + side // 2, side) for side in sides]
        yield (
            held[:, down : down + rows, right : right + width],
            tuple(i * side + j if 0 <= i < side and 0 <= j < side else None for i, j, side in places),
        )


_op = register_composite(
    "dynamic_conv",
    "(Tensor x, Tensor weight, Tensor? static, int? width) -> Tensor",
    _dispatch,
    under_vmap=heads_together("dynamic_conv", (2, 2, 0, None), (2,)),
)


def _draw(shape: Shape, generator: torch.Generator) -> Inputs:
    B, T, H, K, W = (shape[letter] for letter in "BTHKW")
    return {
        "x": normal(generator, B, T, H, K),
        "weight": torch.softmax(normal(generator, B, T, H, W), dim=-1),
        "static": normal(generator, H, K, W) * W**-0.5,
    }


def _work(shape: Shape, phase: Phase, element: int) -> Work:
    """A product with the taps of both sorts; back one for x, and one for each sort. Taps of tokens are float32."""
    B, T, H, K, W = (shape[letter] for letter in "BTHKW")
    passes, sides, taps = (3, 5, 3) if phase == "fwdbwd" else (1, 2, 1)
    return Work(passes * 4 * W * B * T * H * K, B * T * H * (sides * K * element + taps * W * 4))


_CASES = Traits(
    inputs=_draw,
    initial_state=lambda shape, generator: normal(generator, shape["B"], 0),
    sequence=("x", "weight"),
    rounded=("x",),
    differentiable=("x", "weight", "static"),
    output_like="x",
    test_shapes=({"B": 2, "T": 37, "H": 3, "K": 12, "W": 5},),
    bench_shapes=(
        {"B": 8, "T": 4096, "H": 16, "K": 128, "W": 16},
        {"B": 1, "T": 32768, "H": 16, "K": 128, "W": 16},
        # Half of a head's channels, as contmix has it.
        {"B": 8, "T": 4096, "H": 16, "K": 64, "W": 49, "width": 64},
    ),
    work=_work,
    numbers=lambda shape: {"width": shape["width"]} if "width" in shape else {},
)


def _fits(shape: Shape) -> bool:
    return HAS_KERNELS and shape["K"] <= MAX_HEAD_SIZE


@op(dynamic_conv_reference, _CASES, kernel=_fits, limits=f"K up to {MAX_HEAD_SIZE}")
def dynamic_conv(
    x: Tensor, weight: Tensor, *, static: Tensor | None = None, width: int | None = None
) -> Tensor:
    """Depthwise convolution whose taps each token brings for each head, beside taps that are the same for all tokens.

        y_t = Σ_j (weight_tj + static_j) * x_(t-j),   0 before the first token        (arXiv 1901.10430)

    The T outputs are those of the last T of S tokens: what comes before them is read alone. With `width` the tokens are an image,
    row by row, and tap j is of the square around each token, row by row, of an odd side; x is 0 beyond the edges and behind the
    last token, and S = T (arXiv 2502.20087). `static` may have more or fewer taps. Taps may have any floating dtype; sums are
    float32.

    Shapes:  x: [B, S, H, d];  weight: [B, T, H, taps];  static: [H, d, taps of its own];  y: [B, T, H, d], of the dtype of x

    Raises:
        HeddleError: "bad-argument" for shapes, dtypes or numbers that do not fit.
    """
    name = "dynamic_conv"
    if x.dim() != 4 or weight.dim() != 4 or not 1 <= weight.shape[1] <= x.shape[1]:
        what = "x must be [B, S, H, d] and weight [B, T, H, taps], at least one token and T no more than S"
        raise HeddleError("bad-argument", f"{name}: {what}")
    check_tensors(name, {"x": x}, floats={"weight": weight, "static": static})
    (B, S, H, d), T = x.shape, weight.shape[1]
    counts = {
        "weight": weight.shape[3],
        "static": 1 if static is None or static.dim() < 1 else static.shape[-1],
    }
    check_shapes(
        name, {"weight": (weight, (B, T, H, counts["weight"])), "static": (static, (H, d, counts["static"]))}
    )
    for argument, taps in counts.items():
        if taps < 1:
            raise HeddleError("bad-argument", f"{name}: {argument} has no taps, expected at least one")
        if width is not None and (taps % 2 == 0 or math.isqrt(taps) ** 2 != taps):
            what = f"{argument} has {taps} taps, expected the square of an odd number"
            raise HeddleError("bad-argument", f"{name}: {what}", hint="1, 9, 25, 49, …")
    if width is not None and (width < 1 or S != T):
        what = f"an image of width {width} must have a positive one, and as many outputs as tokens, not {T} of {S}"
        raise HeddleError("bad-argument", f"{name}: {what}")
    return _op(x, weight, static, width)  # type: ignore[no-any-return]
