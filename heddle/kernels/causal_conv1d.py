"""A short causal convolution over time, one filter a channel: the op, its reference and its path in plain torch.

Predicted cost for a token and channel: 2 W FLOP and two elements moved, so it is bound by memory everywhere. On a GPU one kernel
goes each way; plain torch makes some 2 W passes over numbers of four bytes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from heddle.errors import HeddleError
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
    from heddle.kernels._causal_conv1d_op import kernels

    HAS_KERNELS = True
except ImportError:
    HAS_KERNELS = False

# The kernels hold the rows of a window in registers.
MAX_TAPS = 8


def causal_conv1d_reference(
    x: Tensor,
    weight: Tensor,
    *,
    initial_state: Tensor | None = None,
    activation: str | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The sum of `causal_conv1d`, token by token in float64; shares nothing with the fast path."""
    x, weight, taps = x.double(), weight.double(), weight.shape[1]
    ends = [x.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()[1:]
    rows = x.shape[0] if cu_seqlens is None else 1
    # Cut up at once: of each part autograd makes a gradient as long as what it was cut from.
    tokens = x.unbind(1)
    outputs, states, begin = [], [], 0
    for index, end in enumerate(ends):
        if initial_state is None:
            window = x.new_zeros(rows, x.shape[2], taps - 1)
        else:
            window = initial_state.double()[index * rows : (index + 1) * rows]
        for token in tokens[begin:end]:
            window = torch.cat((window, token[..., None]), dim=2)
            y = (window * weight).sum(2)
            outputs.append(y / (1.0 + torch.exp(-y)) if activation == "silu" else y)
            window = window[:, :, 1:]
        states.append(window)
        begin = end
    return torch.stack(outputs, dim=1), torch.cat(states)


def _forward(
    x: Tensor, weight: Tensor, initial_state: Tensor | None, activation: str | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    if causal_conv1d.choose(x.device, x.dtype, C=x.shape[2], W=weight.shape[1]) == "triton":
        count = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        # With and without one the kernels are the same, and so the bits.
        state = (
            x.new_zeros(count, x.shape[2], weight.shape[1] - 1)
            if initial_state is None
            else initial_state.to(x.dtype)
        )
        y = kernels(x, weight, state, activation == "silu", cu_seqlens)
        return y, _last_inputs(x, state, weight.shape[1] - 1, cu_seqlens)
    length, taps, wide = x.shape[1], weight.shape[1], wide_dtype(x.dtype)
    count = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    blank = x.new_zeros(count, taps - 1, x.shape[2])
    before = blank if initial_state is None else initial_state.to(x.dtype).mT
    if cu_seqlens is None:
        padded = torch.cat((before, x), dim=1)
        windows = [padded[:, tap : tap + length] for tap in range(taps)]
        state = padded[:, length:]
    else:
        padded, first, after = _interleave(x, before, cu_seqlens)
        windows = [padded[None, first + tap] for tap in range(taps)]
        state = padded[after]
    filters = weight.to(wide)
    # Shifted sums beat conv1d on a CPU, most of all backward, and give the same bits in every run on a GPU.
    y = windows[0].to(wide) * filters[:, 0]
    for tap in range(1, taps):
        y = torch.addcmul(y, windows[tap].to(wide), filters[:, tap])
    if activation == "silu":
        y = F.silu(y)
    return y.to(x.dtype), state.mT.clone(memory_format=torch.contiguous_format)


def _last_inputs(x: Tensor, before: Tensor, held: int, cu_seqlens: Tensor | None) -> Tensor:
    """The last `held` inputs of each sequence, of its state where it has fewer.  Shapes:  before, out: [N, C, held]"""
    length = x.shape[1]
    if cu_seqlens is None and length >= held:
        return x[:, length - held :].mT.clone(memory_format=torch.contiguous_format)
    if cu_seqlens is None:
        return torch.cat((before[..., length:], x.mT), dim=2)
    place = cu_seqlens.diff()[:, None] + torch.arange(held, device=x.device)
    token = (cu_seqlens[:-1, None] + place - held).clamp(0, length - 1)
    old = before.gather(2, place.clamp(max=max(held - 1, 0))[:, None].expand(-1, x.shape[2], -1))
    return torch.where((place < held)[:, None], old, x[0][token].mT)


def _interleave(x: Tensor, before: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Packed sequences with the state of each put before it, where each token's window begins, and the states after.

    Shapes:  x: [1, T, C];  before: [N, W-1, C];  out: [T + N (W-1), C];  first: [T];  after: [N, W-1]
    """
    count, held = before.shape[:2]
    ends, tap = cu_seqlens[1:].long(), torch.arange(held, device=x.device)
    number = torch.arange(count, device=x.device)
    at = torch.arange(x.shape[1], device=x.device)
    first = at + torch.searchsorted(ends, at, right=True) * held
    states = (cu_seqlens[:-1].long() + number * held)[:, None] + tap
    joined = x.new_empty(x.shape[1] + count * held, x.shape[2])
    joined = joined.index_copy(0, first + held, x[0]).index_copy(0, states.flatten(), before.flatten(0, 1))
    return joined, first, (ends + number * held)[:, None] + tap


def _under_vmap(info: Any, in_dims: tuple[int | None, ...], *given: Any) -> tuple[Any, Any]:
    """Many calls as one over all their channels."""
    x, weight, state, activation, cu_seqlens = given
    if in_dims[4] is not None:
        raise HeddleError("bad-argument", "causal_conv1d: vmap takes one packing (cu_seqlens) for all calls")
    count = info.batch_size

    def channels(argument: Tensor, dim: int | None, axis: int) -> Tensor:
        many = argument.expand(count, *argument.shape) if dim is None else argument.movedim(dim, 0)
        return many.movedim(0, axis).flatten(axis, axis + 1)

    before = None if state is None else channels(state, in_dims[2], 1)
    y, after = _forward_op(
        channels(x, in_dims[0], 2), channels(weight, in_dims[1], 0), before, activation, cu_seqlens
    )
    return (y.unflatten(2, (count, -1)), after.unflatten(1, (count, -1))), (2, 1)


_forward_op = register_composite(
    "causal_conv1d",
    "(Tensor x, Tensor weight, Tensor? initial_state, str? activation, Tensor? cu_seqlens) -> (Tensor, Tensor)",
    _forward,
    under_vmap=_under_vmap,
)


def _draw(shape: Shape, generator: torch.Generator) -> Inputs:
    B, T, C, W = (shape[letter] for letter in "BTCW")
    return {
        "x": normal(generator, B, T, C),
        "weight": normal(generator, C, W),
    }


def _draw_state(shape: Shape, generator: torch.Generator) -> Tensor:
    return normal(generator, shape["B"], shape["C"], shape["W"] - 1)


def _work(shape: Shape, phase: Phase, element: int) -> Work:
    B, T, C, W = (shape[letter] for letter in "BTCW")
    passes = 1 if phase == "fwd" else 3
    return Work(passes * 2 * W * B * T * C, (2 if phase == "fwd" else 5) * B * T * C * element)


_CASES = Traits(
    inputs=_draw,
    initial_state=_draw_state,
    sequence=("x",),
    rounded=("x", "weight"),
    differentiable=("x", "weight"),
    output_like="x",
    test_shapes=({"B": 2, "C": 12, "W": 4}, {"B": 1, "C": 7, "W": 2}),
    rounded_state=True,
    bench_shapes=({"B": 1, "T": 16384, "C": 6144, "W": 4},),
    work=_work,
)


def _fits(shape: Shape) -> bool:
    return HAS_KERNELS and shape["W"] <= MAX_TAPS


@op(causal_conv1d_reference, _CASES, kernel=_fits, limits=f"W up to {MAX_TAPS}")
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    *,
    initial_state: Tensor | None = None,
    activation: str | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution over time, and the last W - 1 inputs. The last tap multiplies the current token.

        y_t = activation(Σ_i weight_i x_(t-W+1+i)),   activation silu or none

    With `cu_seqlens` (B = 1) the time axis holds N packed sequences, each on its own.

    Shapes:  x, y: [B, T, C];  weight: [C, W];  states: [B, C, W-1] or [N, C, W-1], of the dtype of x, oldest first

    Raises:
        HeddleError: "bad-argument" for shapes that do not fit, or an unknown activation.
    """
    if x.dim() != 3 or weight.dim() != 2 or x.shape[1] < 1:
        raise HeddleError(
            "bad-argument", "causal_conv1d: x must be [B, T, C] with at least one token, weight [C, W]"
        )
    if activation not in (None, "silu"):
        raise HeddleError(
            "bad-argument", f"causal_conv1d: no activation {activation!r}", hint='"silu" or None'
        )
    floats = {"weight": weight, "initial_state": initial_state}
    check_tensors("causal_conv1d", {"x": x}, floats=floats, integers={"cu_seqlens": cu_seqlens})
    check_packing("causal_conv1d", x.shape[0], x.shape[1], cu_seqlens)
    count, taps = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, weight.shape[1]
    expected = {
        "weight": (weight, (x.shape[2], taps)),
        "state": (initial_state, (count, x.shape[2], taps - 1)),
    }
    check_shapes("causal_conv1d", expected)
    return _forward_op(x, weight, initial_state, activation, cu_seqlens)  # type: ignore[no-any-return]
