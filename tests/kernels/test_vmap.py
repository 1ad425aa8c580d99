"""Ops under vmap: what many calls give one after the other, with gradients, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from heddle.errors import HeddleError
from heddle.kernels.causal_conv1d import causal_conv1d
from heddle.kernels.dense_attention import dense_attention
from heddle.kernels.dynamic_conv import dynamic_conv
from heddle.kernels.gated_delta_rule import gated_delta_rule
from heddle.kernels.op import Op
from heddle.kernels.rat_attention import rat_attention
from heddle.kernels.rat_scan import rat_scan

MANY = 3


def _drawn(op: Op[..., Any], index: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(index)
    return op.cases.inputs({"T": 37, **op.cases.test_shapes[0]}, generator)


def _causal(**given: Tensor) -> Tensor:
    return dense_attention(**given, is_causal=True)


def _keys_and_summaries(**given: Tensor) -> Tensor:
    turned, *rest = rat_scan(**given, chunk=5)
    return torch.cat([turned.flatten(), *(x.flatten() for x in rest)])


def _masked(**given: Tensor) -> Tensor:
    return dense_attention(**given, mask=torch.ones(1, 1, 37, 37, dtype=torch.bool).tril())


def _rows_masked(**given: Tensor) -> Tensor:
    return dense_attention(**given, mask=torch.ones(2, 1, 37, 37, dtype=torch.bool).tril())


@pytest.mark.parametrize(
    ("op", "call"),
    [
        pytest.param(gated_delta_rule, lambda **given: gated_delta_rule(**given)[0], id="gated_delta_rule"),
        pytest.param(
            causal_conv1d, lambda **given: causal_conv1d(**given, activation="silu")[0], id="causal_conv1d"
        ),
        pytest.param(dynamic_conv, dynamic_conv, id="dynamic_conv"),
        pytest.param(rat_scan, _keys_and_summaries, id="rat_scan"),
        pytest.param(rat_attention, lambda **given: rat_attention(**given, chunk=5), id="rat_attention"),
        pytest.param(dense_attention, _causal, id="dense_attention"),
        pytest.param(dense_attention, _masked, id="one mask"),
        pytest.param(dense_attention, _rows_masked, id="a mask for each row"),
    ],
)
def test_many_calls_at_once_are_those_one_by_one(op: Op[..., Any], call: Callable[..., Tensor]) -> None:
    each = [_drawn(op, index) for index in range(MANY)]
    stacked = {name: torch.stack([one[name] for one in each]).requires_grad_() for name in each[0]}
    together = torch.vmap(lambda given: call(**given))(stacked)
    gradients = torch.autograd.grad(together.square().sum(), list(stacked.values()))
    for index, one in enumerate(each):
        alone = {name: x.requires_grad_() for name, x in one.items()}
        out = call(**alone)
        torch.testing.assert_close(together[index], out)
        expected = torch.autograd.grad(out.square().sum(), list(alone.values()))
        for found, wanted in zip(gradients, expected, strict=True):
            torch.testing.assert_close(found[index], wanted)


def test_what_all_calls_share_is_not_stacked() -> None:
    given = _drawn(causal_conv1d, 0)
    weights = torch.stack([given["weight"], 2 * given["weight"]])
    found = torch.vmap(lambda weight: causal_conv1d(given["x"], weight)[0])(weights)
    torch.testing.assert_close(found[1], causal_conv1d(given["x"], weights[1])[0])


def test_packed_sequences_are_refused() -> None:
    each = {name: x[:1] for name, x in _drawn(gated_delta_rule, 0).items()}
    bounds = torch.tensor([0, 20, 37], dtype=torch.int32)
    with pytest.raises(HeddleError, match="packed"):
        torch.vmap(lambda q: gated_delta_rule(**{**each, "q": q}, cu_seqlens=bounds)[0])(each["q"][None])
