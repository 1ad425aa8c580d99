"""block_attention: chosen blocks against the reference query by query, its limits, rounding, what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from heddle.errors import HeddleError
from heddle.kernels import _block_attention_torch as parts
from heddle.kernels.accuracy import EPSILON, worst_error
from heddle.kernels.block_attention import block_attention, block_attention_reference

B, H, N, D, V, BLOCK = 2, 4, 2, 5, 6, 3
FLOAT64 = EPSILON[torch.float64]


def drawn(queries: int = 7, keys: int = 11, *, d: int = D) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (H, queries, d), "k": (N, keys, d), "v": (N, keys, V)}
    made = {
        name: torch.randn(B, *shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }
    return made | {"start": torch.full((B,), keys - queries)}


def limits(queries: int = 7, keys: int = 11) -> dict[str, Tensor]:
    """One row with padding on both sides, of which the left is cut off by `start`; two tokens that are not written."""
    real, written = torch.ones(B, keys, dtype=torch.bool), torch.ones(B, keys, dtype=torch.float64)
    real[0, keys - 2 :] = False
    written[1, 3:5] = 0.0
    return {"real": real, "written": written, "start": torch.tensor([-2, keys - queries])}


def some_blocks(queries: int = 7, keys: int = 11) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(B, N, queries, -(-keys // BLOCK), generator=generator) > 0.5


def graded(function: Any, given: dict[str, Tensor], **rest: Any) -> dict[str, Tensor]:
    leaves = {
        name: x.detach().clone().requires_grad_() if x.is_floating_point() else x for name, x in given.items()
    }
    out = function(**leaves, **rest)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    (out * weight.to(out.dtype)).sum().backward()
    floating = {name: x for name, x in leaves.items() if x.is_floating_point()}
    # A gate that nothing is behind has no say at all.
    nothing = {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in floating.items()}
    return {"out": out.detach()} | nothing


@pytest.mark.parametrize("form", ["all", "chosen", "gates"])
@pytest.mark.parametrize("is_limited", [False, True])
@pytest.mark.parametrize("sizes", [(7, 11), (1, 9), (4, 4)], ids=str)
def test_results_and_gradients_are_those_of_the_reference(
    form: str, is_limited: bool, sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "QUERIES", 4)
    given = drawn(*sizes) | (limits(*sizes) if is_limited else {})
    given |= {"chosen": some_blocks(*sizes)} if form == "chosen" else {}
    if form == "gates":
        given["gates"] = some_blocks(*sizes)[:, :, 0].double()
    found, expected = (
        graded(one, given, block=BLOCK) for one in (block_attention, block_attention_reference)
    )
    assert found.keys() == expected.keys() >= {"out", "q", "k", "v"}
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() < FLOAT64 * max(1.0, tensor.abs().max()), name


def test_every_block_is_softmax_attention() -> None:
    given = drawn(11, 11)
    softmax = F.scaled_dot_product_attention(
        given["q"], given["k"], given["v"], is_causal=True, enable_gqa=True
    )
    everything = torch.ones(B, N, 11, 4, dtype=torch.bool)
    for rest in ({}, {"chosen": everything}):
        assert (block_attention(**given, **rest, block=BLOCK) - softmax).abs().max() < FLOAT64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rounding_costs_no_more_than_inputs_and_outputs(dtype: torch.dtype) -> None:
    given = {name: x.to(dtype) if x.is_floating_point() else x for name, x in drawn(70, 70, d=16).items()}
    exact = graded(
        block_attention,
        {n: x.double() if x.is_floating_point() else x for n, x in given.items()},
        block=BLOCK,
    )
    for name, found in graded(block_attention, given, block=BLOCK).items():
        error, worst = worst_error(found.transpose(1, 2), exact[name].transpose(1, 2), timed=True)
        rounded = exact[name].to(dtype).transpose(1, 2)
        baseline, _ = worst_error(rounded, exact[name].transpose(1, 2), timed=True)
        assert error <= 2 * baseline + EPSILON[dtype], f"{name}: {error:.2e}, {worst}"


def test_large_logits_leave_everything_finite() -> None:
    given = drawn(40, 40)
    for side in ("q", "k"):
        given[side] = given[side] * 100
    given = {name: x.float() if x.is_floating_point() else x for name, x in given.items()}
    assert all(x.isfinite().all() for x in graded(block_attention, given, block=BLOCK).values())


def refused(**change: Any) -> str:
    with pytest.raises(HeddleError) as error:
        block_attention(**{**drawn(), "block": BLOCK, **change})
    assert error.value.code == "bad-argument"
    return str(error.value)


def test_what_does_not_fit_is_told() -> None:
    assert "no more than keys" in refused(q=torch.ones(B, H, 12, D))
    assert "2 key heads do not divide 3 query heads" in refused(q=torch.ones(B, 3, 7, D))
    assert "block 0 must be positive" in refused(block=0)
    assert "k is float64, expected float32 as q" in refused(q=torch.ones(B, H, 7, D))
    assert "only one of listed, chosen and gates" in refused(
        chosen=some_blocks(), gates=some_blocks()[:, :, 0].double()
    )
