"""What ops with calls of their own keep where those of `OPS` keep it: short and odd lengths, a single head, empty sequences,
repeatability, fresh memory.

On a CPU the torch paths run; with TRITON_INTERPRET=1 (see tests/kernels/test_interpreter.py) the Triton paths, interpreted;
on a GPU the real ones. Forms and tiles of each are in tests/kernels, views of tensors in test_op_arguments.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from held import assert_held, fill_fresh_memory_with_nan, over_settings
from torch import Tensor

from heddle.kernels import Op
from heddle.kernels.accuracy import EPSILON
from heddle.kernels.dynamic_conv import dynamic_conv
from heddle.kernels.gated_delta_layer import gated_delta_layer_step
from heddle.kernels.grid_window_attention import grid_window_attention
from heddle.kernels.local_linear_attention import local_linear_attention
from heddle.kernels.op import wide_dtype
from heddle.kernels.rat_attention import rat_attention
from heddle.kernels.rat_scan import rat_scan
from heddle.kernels.rms_norm import rms_norm
from heddle.kernels.token_split_attention import token_split_attention

pytestmark = pytest.mark.usefixtures("kernels_on_gpu")

AnyOp = Op[..., Any]
Given = dict[str, Any]
# What each gives: `*` where heads stand before tokens, as in the arguments below, `.` where there is no axis of tokens.
RESULTS: dict[AnyOp, tuple[str, ...]] = {
    rat_scan: ("turned", "key", "value", "*keys", "*values", ".past"),
    rat_attention: ("out",),
    local_linear_attention: ("*out",),
    rms_norm: ("out",),
    dynamic_conv: ("out",),
    gated_delta_layer_step: ("out", ".state", ".conv_state"),
    token_split_attention: ("*out", ".state"),
    grid_window_attention: ("*out",),
}
HEADS_FIRST = {
    rat_attention: ("keys", "values"),
    local_linear_attention: ("q", "k", "v"),
    grid_window_attention: ("q", "k", "v"),
    token_split_attention: ("q", "k", "v", "gate", "phi_q", "phi_k"),
}
SINGLE = dict.fromkeys(("B", "H", "HV", "N", "G"), 1)
OVER_TIME = tuple(op for op in RESULTS if op is not gated_delta_layer_step)
PACKED = tuple(op for op in OVER_TIME if "cu_seqlens" in inspect.signature(op.fast).parameters)
LENGTHS = (1, 63, 64, 65)
# Nothing at the beginning, at the end and twice between; one token, less than a chunk, more than a tile.
ENDS = (0, 0, 1, 4, 4, 4, 80, 80)

name_of = {"ids": lambda op: op.name}
over_ops = pytest.mark.parametrize("op", list(RESULTS), **name_of)


def drawn(
    op: AnyOp, dtype: torch.dtype, ends: Sequence[int] | None = None, seed: int = 0, **sizes: int
) -> Given:
    """Arguments, rounded; of as many queries as keys."""
    shape: dict[str, int] = {
        **op.cases.test_shapes[0],
        **({} if ends is None else {"B": 1, "T": ends[-1]}),
        **sizes,
    }
    shape |= {"S": shape["T"]} if "S" in shape else {}
    generator = torch.Generator().manual_seed(seed)
    given = op.cases.inputs(shape, generator)
    if "state" in inspect.signature(op.fast).parameters:
        given |= {"state": op.cases.initial_state(shape, generator)}
    rounded = {
        name: x.to(dtype if name in op.cases.rounded else wide_dtype(dtype)) for name, x in given.items()
    }
    packed = {} if ends is None else {"cu_seqlens": torch.tensor(ends)}
    return {**rounded, **packed, **op.cases.numbers(shape)}


def results(op: AnyOp, function: Callable[..., Any], given: Given) -> dict[str, Tensor]:
    """What it gives where no gradient is asked for, and every gradient: [B, T, H, *] what has tokens, else at most three axes."""
    found = function(**given)
    wanted = [name for name in op.cases.differentiable if name in given]
    leaves = {name: given[name].detach().requires_grad_() for name in wanted}
    outputs = function(**{**given, **leaves})
    found, outputs = (one if isinstance(one, tuple) else (one,) for one in (found, outputs))
    generator = torch.Generator().manual_seed(7)
    # The same numbers in every dtype.
    upstream = [torch.randn(x.shape, generator=generator).bfloat16().to(x) for x in outputs]
    graded = [(x, one) for x, one in zip(outputs, upstream, strict=True) if x.requires_grad]
    gradients = torch.autograd.grad(
        [x for x, _ in graded],
        [leaves[name] for name in wanted],
        [one for _, one in graded],
        materialize_grads=True,
    )
    named = dict(zip(RESULTS[op], found, strict=True))
    first = HEADS_FIRST.get(op, ())
    named |= {f"{'*' * (name in first)}d_{name}": x for name, x in zip(wanted, gradients, strict=True)}
    return {name: _as_compared(name, x) for name, x in named.items() if x.numel()}


def _as_compared(name: str, x: Tensor) -> Tensor:
    if name.startswith("*"):
        return x.transpose(1, 2)
    return x.flatten(0, 1) if name.startswith(".") and x.dim() == 4 else x


def on(device: str, given: Given) -> Given:
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in given.items()}


def wide(given: Given) -> Given:
    return {
        name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in given.items()
    }


def of_all(told: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The results of several draws, one behind the other."""
    return {name: torch.cat([one[name] for one in told]) for name in told[0]}


def assert_right(op: AnyOp, given: Given, dtype: torch.dtype, device: str, *others: Given) -> None:
    draws, found = (given, *others), []
    exact = of_all([results(op, op.reference, wide(one)) for one in draws])

    def run() -> Mapping[str, Tensor]:
        found.append(of_all([results(op, op, on(device, one)) for one in draws]))
        return found[-1]

    # What does not depend on an argument has no gradient there, and rounding has no size to be measured by.
    nothing = {name for name, x in exact.items() if x.abs().max() < 1e-13}
    held = {name: x for name, x in exact.items() if name not in nothing}
    assert_held(held, run, dtype, device, has_kernels=op.kernel is not None)
    assert all(found[0][name].abs().max() <= EPSILON[dtype] for name in nothing)


@over_settings
@pytest.mark.parametrize("length", [*LENGTHS, pytest.param(1000, marks=pytest.mark.long)])
@pytest.mark.parametrize("op", OVER_TIME, **name_of)
def test_results_and_gradients_are_those_of_the_reference(
    op: AnyOp, length: int, device: str, dtype: torch.dtype
) -> None:
    # The references take all pairs of tokens, or one token after the other.
    sizes = SINGLE if length > 65 else {}
    assert_right(op, drawn(op, dtype, T=length, **sizes), dtype, device)


@over_settings
@over_ops
def test_a_single_head_of_a_single_row_is_right(op: AnyOp, device: str, dtype: torch.dtype) -> None:
    # Gates of a step are single numbers: how far one is off is luck of rounding.
    seeds = range(8 if op is gated_delta_layer_step else 1)
    given, *others = (drawn(op, dtype, seed=seed, **SINGLE, T=70) for seed in seeds)
    assert_right(op, given, dtype, device, *others)


@over_settings
@pytest.mark.parametrize("op", PACKED, **name_of)
def test_empty_sequences_are_right_at_every_place(op: AnyOp, device: str, dtype: torch.dtype) -> None:
    assert_right(op, drawn(op, dtype, ENDS), dtype, device)


@over_settings
@over_ops
def test_two_runs_are_equal_to_the_bit_whatever_is_in_fresh_memory(
    op: AnyOp, device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = [drawn(op, dtype, T=70), *([drawn(op, dtype, ENDS)] if op in PACKED else [])]

    def run() -> list[Mapping[str, Tensor]]:
        return [results(op, op, on(device, given)) for given in cases]

    first, second = run(), run()
    fill_fresh_memory_with_nan(monkeypatch)
    for before, *others in zip(first, second, run(), strict=True):
        assert all(torch.equal(before[name], after[name]) for after in others for name in before)
