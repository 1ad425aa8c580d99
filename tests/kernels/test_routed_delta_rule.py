"""routed_delta_rule: against its reference token by token, in torch and in Triton; what it refuses."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from held import Results, assert_held, over_settings
from torch import Tensor

from heddle.errors import HeddleError
from heddle.kernels import gated_delta_rule
from heddle.kernels._gated_delta_rule_op import _backward, _forward
from heddle.kernels.common.layout import LEAST_HEAD
from heddle.kernels.common.tuning import tuning
from heddle.kernels.op import INTERPRETED
from heddle.kernels.routed_delta_rule import routed_delta_rule, routed_delta_rule_reference

pytestmark = pytest.mark.usefixtures("kernels_on_gpu")
SIDES = ("q", "k", "v", "log_decay", "beta", "routes")
# A tile of its own, a part of one, heads of groups; ragged heads.
SHAPES = {
    "whole": {"B": 2, "T": 48, "H": 2, "HV": 2, "K": 16, "V": 32, "chunk": 16},
    "part": {"B": 1, "T": 35, "H": 1, "HV": 2, "K": 16, "V": 16, "chunk": 7},
    "ragged": {"B": 1, "T": 26, "H": 2, "HV": 2, "K": 6, "V": 9, "chunk": 13},
}


def drawn(shape: dict[str, int], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    given = routed_delta_rule.cases.inputs(shape, generator)
    return {**given, "initial_state": routed_delta_rule.cases.initial_state(shape, generator)}


def forward(function: Any, given: dict[str, Tensor], chunk: int, dtype: torch.dtype, device: str) -> Any:
    there = {
        name: x.to(device, dtype if name in "qkv" or dtype == torch.float64 else torch.float32)
        for name, x in given.items()
    }
    out, state = function(**there, chunk=chunk)
    return {"out": out, "state": state}


def both_directions(
    function: Any, given: dict[str, Tensor], chunk: int, dtype: torch.dtype, device: str
) -> Any:
    """`forward`, with the gradients of everything given."""
    leaves = {name: x.clone().requires_grad_() for name, x in given.items()}
    found = forward(function, leaves, chunk, dtype, device)
    upstream = [torch.linspace(-1, 1, x.numel()).view_as(x).to(x) for x in found.values()]
    gradients = torch.autograd.grad(list(found.values()), list(leaves.values()), upstream)
    named = {f"d_{name}": x for name, x in zip(leaves, gradients, strict=True)}
    return {name: x.detach() for name, x in (found | named).items()}


def soft(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """One route of four is 0, one 1, the others something between."""
    hard = given["routes"].flatten()
    between = torch.linspace(0.1, 1.3, hard.numel()).double()
    odd = torch.arange(hard.numel()) % 2 == 1
    return {**given, "routes": torch.where(odd, between, hard).view_as(given["routes"])}


@over_settings
@pytest.mark.parametrize("name", SHAPES)
def test_results_are_those_of_the_reference(name: str, device: str, dtype: torch.dtype) -> None:
    shape = SHAPES[name]
    given = drawn(shape)
    given |= {side: given[side].to(dtype).double() for side in "qkv"}
    exact = forward(routed_delta_rule_reference, given, shape["chunk"], torch.float64, "cpu")
    run = partial(forward, routed_delta_rule, given, shape["chunk"], dtype, device)
    assert_held(exact, run, dtype, device, **({"segment": 64} if name == "whole" else {}))


@over_settings
@pytest.mark.parametrize("split", [0, 1])
@pytest.mark.parametrize("name", SHAPES)
def test_gradients_of_the_kernels_are_those_of_the_reference_for_routes_between_0_and_1_too(
    name: str, split: int, device: str, dtype: torch.dtype
) -> None:
    shape = SHAPES[name]
    given = soft(drawn(shape))
    given |= {side: given[side].to(dtype).double() for side in "qkv"}
    exact = both_directions(routed_delta_rule_reference, given, shape["chunk"], torch.float64, "cpu")
    run = partial(both_directions, routed_delta_rule, given, shape["chunk"], dtype, device)
    assert_held(exact, run, dtype, device, split=split, **({"segment": 64} if name == "whole" else {}))


# Tokens, and a chunk that they are whole ones of: other lengths are refused. A chunk of 64 fills a tile.
LENGTHS = [(1, 1), (63, 9), (64, 16), (64, 64), (65, 13), pytest.param((1000, 10), marks=pytest.mark.long)]


@over_settings
@pytest.mark.parametrize("sizes", LENGTHS, ids=str)
def test_every_length_of_whole_chunks_is_right_in_both_directions(
    sizes: tuple[int, int], device: str, dtype: torch.dtype
) -> None:
    exact, run = _whole_chunks(*sizes, dtype, device)
    tile = 16 if device == "cuda" and dtype == torch.float32 else 64
    assert_held(exact, run, dtype, device, has_kernels=sizes[1] <= tile)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_chunk_that_is_longer_than_a_tile_is_right_in_torch(device: str) -> None:
    # In half precision what plain torch gives is what others are held to.
    exact, run = _whole_chunks(65, 65, torch.float32, device)
    assert_held(exact, run, torch.float32, device, has_kernels=False)


def _whole_chunks(
    T: int, chunk: int, dtype: torch.dtype, device: str
) -> tuple[Results, Callable[[], Results]]:
    # The gradient of a route is one number of a chunk and head, and how far one is off is luck of rounding.
    heads = 8 if chunk == T else 2
    given = soft(drawn({"B": 1, "T": T, "H": heads, "HV": heads, "K": 16, "V": 16, "chunk": chunk}))
    given |= {side: given[side].to(dtype).double() for side in "qkv"}
    exact = both_directions(routed_delta_rule_reference, given, chunk, torch.float64, "cpu")
    return exact, partial(both_directions, routed_delta_rule, given, chunk, dtype, device)


# All of one number, or strong decays beside weak ones, which their sums hide.
HARD = {
    "kept": ("log_decay", (-1e-6,)),
    "faded": ("log_decay", (-10.0,)),
    "strong": ("log_decay", (-20.0,)),
    "mixed": ("log_decay", (0.0, -1e-6, -1e-4, -1.0, -20.0)),
    "nothing written": ("beta", (0.0,)),
    "replaced": ("beta", (1.0,)),
    "reflected": ("beta", (2.0,)),
}


@over_settings
@pytest.mark.parametrize("hard", HARD)
def test_strong_decays_and_betas_to_two_are_right_in_both_directions(
    hard: str, device: str, dtype: torch.dtype
) -> None:
    exact, run = _hard(hard, device, dtype)
    assert_held(exact, run, dtype, device)


def _hard(hard: str, device: str, dtype: torch.dtype) -> tuple[Results, Callable[[], Results]]:
    """The exact results, and what gives those to be held."""
    name, choices = HARD[hard]
    given = soft(drawn(SHAPES["whole"]))
    picked = torch.randint(len(choices), given[name].shape, generator=torch.Generator().manual_seed(1))
    # Gates come in float32.
    given[name] = torch.tensor(choices).double()[picked]
    given |= {side: given[side].to(dtype).double() for side in "qkv"}
    exact = both_directions(routed_delta_rule_reference, given, 16, torch.float64, "cpu")
    # The reference takes what had been there off again, and of nothing written rounding is left.
    exact = {side: x.where(x.abs() > 1e-15, 0.0) for side, x in exact.items()}
    return exact, partial(both_directions, routed_delta_rule, given, 16, dtype, device)


@pytest.mark.parametrize(
    "device", [*(["cpu"] if INTERPRETED else []), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def test_a_repeated_launch_reads_the_routes_of_its_own_call(device: str) -> None:
    plans = [inspect.getclosurevars(one).nonlocals["plans"] for one in (_forward, _backward)]
    for one in plans:
        one.clear()
    run = partial(both_directions, routed_delta_rule, chunk=16, dtype=torch.float32, device=device)
    # Smaller heads are copied on a GPU, and such launches are not repeated.
    calls = [soft(drawn(SHAPES["whole"] | dict.fromkeys("KV", LEAST_HEAD), seed)) for seed in range(3)]
    calls[2]["routes"] = 1.0 - calls[2]["routes"]
    repeated = [run(given) for given in calls]
    assert [plan is not None for one in plans for plan in one.values()] == [True, True]
    for given, found in zip(calls, repeated, strict=True):
        with tuning(split=0):
            anew = run(given)
        assert all(torch.equal(found[name], anew[name]) for name in anew)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("segment", [1024, 128])
def test_a_layer_of_the_paper_is_right_in_segments_too(dtype: torch.dtype, segment: int) -> None:
    given = drawn({"B": 1, "T": 1024, "H": 2, "K": 128, "V": 256, "chunk": 64})
    given |= {side: given[side].to(dtype).double() for side in "qkv"}
    exact = both_directions(routed_delta_rule_reference, given, 64, torch.float64, "cpu")
    run = partial(both_directions, routed_delta_rule, given, 64, dtype, "cuda")
    assert_held(exact, run, dtype, "cuda", segment=segment)


def test_gradients_are_those_of_the_reference() -> None:
    found = []
    for function in (routed_delta_rule, routed_delta_rule_reference):
        leaves = {name: x.clone().requires_grad_() for name, x in drawn(SHAPES["ragged"]).items()}
        out, state = function(**leaves, chunk=13)
        loss = (out * torch.linspace(-1, 1, out.numel()).double().view_as(out)).sum() + state.square().sum()
        found.append(torch.autograd.grad(loss, list(leaves.values())))
    for one, other in zip(*found, strict=True):
        assert (one - other).abs().max() < 1e-10 * max(1.0, float(other.abs().max()))


def test_routes_of_one_are_the_gated_delta_rule_and_of_zero_leave_the_decay() -> None:
    given = drawn(SHAPES["whole"])
    plain = {name: x for name, x in given.items() if name != "routes"}
    for route, expected in ((1.0, gated_delta_rule(**plain)[1]), (0.0, None)):
        given["routes"] = torch.full_like(given["routes"], route)
        _, state = routed_delta_rule(**given, chunk=16)
        faded = given["log_decay"].sum(1).exp()[..., None, None] * given["initial_state"]
        assert (state - (faded if expected is None else expected)).abs().max() < 1e-12


def test_what_does_not_fit_is_told() -> None:
    given = drawn(SHAPES["whole"])
    for chunk in (0, 5):
        with pytest.raises(HeddleError, match=f"whole number of chunks of {chunk}"):
            routed_delta_rule(**given, chunk=chunk)
    with pytest.raises(HeddleError, match="routes has shape") as error:
        routed_delta_rule(**given, chunk=8)
    assert error.value.code == "bad-argument"
