"""member_attention: short lists of keys against the reference query by query, rounding, what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from heddle.errors import HeddleError
from heddle.kernels import member_attention as lists
from heddle.kernels.accuracy import EPSILON, worst_error
from heddle.kernels.member_attention import member_attention, member_attention_reference

B, H, S, T, W, D, V = 2, 3, 11, 7, 4, 5, 6
FLOAT64 = EPSILON[torch.float64]


def drawn(queries: int = T, keys: int = S, width: int = W, d: int = D) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (H, queries, d), "k": (H, keys, d), "v": (H, keys, V), "own": (H, queries, V)}
    made = {
        name: torch.randn(B, *shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }
    # Entries may be none, keys may stand twice; the first query has none at all.
    index = torch.randint(-2, keys, (B, H, queries, width), generator=generator)
    index[:, :, 0] = -1
    return made | {"index": index, "weight": torch.ones(B, keys, dtype=torch.float64)}


def graded(function: Any, given: dict[str, Tensor], **rest: Any) -> dict[str, Tensor]:
    leaves = {
        name: x.detach().clone().requires_grad_() if x.is_floating_point() else x for name, x in given.items()
    }
    out = function(**leaves, **rest)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    (out * weight.to(out.dtype)).sum().backward()
    return {"out": out.detach()} | {name: x.grad for name, x in leaves.items() if x.grad is not None}


@pytest.mark.parametrize("gathered", [1, 10**6])
@pytest.mark.parametrize("has_weight", [False, True])
def test_results_and_gradients_are_those_of_the_reference(
    gathered: int, has_weight: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lists, "GATHERED", gathered)
    given = {name: x for name, x in drawn().items() if has_weight or name != "weight"}
    found, expected = (
        graded(one, given, scale=0.7) for one in (member_attention, member_attention_reference)
    )
    assert found.keys() == expected.keys() == {"out", *given} - {"index"}
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() < FLOAT64 * max(1.0, tensor.abs().max()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rounding_costs_no_more_than_inputs_and_outputs(dtype: torch.dtype) -> None:
    given = {name: x.to(dtype) if x.is_floating_point() else x for name, x in drawn(70, 70, 16, 16).items()}
    exact = graded(
        member_attention, {n: x.double() if x.is_floating_point() else x for n, x in given.items()}
    )
    for name, found in graded(member_attention, given).items():
        if name == "weight":
            continue
        error, worst = worst_error(found.transpose(1, 2), exact[name].transpose(1, 2), timed=True)
        rounded = exact[name].to(dtype).transpose(1, 2)
        baseline, _ = worst_error(rounded, exact[name].transpose(1, 2), timed=True)
        assert error <= 2 * baseline + EPSILON[dtype], f"{name}: {error:.2e}, {worst}"


def test_what_does_not_fit_is_told() -> None:
    for change, told in (
        ({"own": torch.ones(B, H, T, V)}, "own is float32, expected float64 as q"),
        ({"index": torch.zeros(B, H, T, dtype=torch.int64)}, "must be"),
        ({"index": drawn()["index"].double()}, "index is float64, expected int64, int32"),
        ({"weight": torch.ones(B, S + 1)}, "weight has shape"),
        ({"weight": torch.ones(B, S, device="meta")}, "weight is on meta, expected cpu as q"),
    ):
        with pytest.raises(HeddleError, match=told) as error:
            member_attention(**{**drawn(), **change})
        assert error.value.code == "bad-argument"
