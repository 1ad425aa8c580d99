"""Products of one input as one product: the same numbers and gradients, and what a graph is made of."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import vmap
from torch.fx import symbolic_trace
from torch.nn import functional as F

from heddle.compose import joined_products
from heddle.compose.joined_products import join_products, products

MODELS, ROWS, WIDTH, SIZES = 3, 32, 16, (8, 5, 2)


def drawn(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def separately(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    return tuple(F.linear(x, weight) for weight in weights)


@pytest.mark.parametrize("part", [8, ROWS, 5], ids=["in parts", "as a whole", "parts that do not fit"])
@pytest.mark.parametrize("count", [1, 3])
def test_products_as_one_are_those_alone(part: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joined_products, "PART_ROWS", part)
    given = (drawn(MODELS, 4, ROWS // 4, WIDTH), *(drawn(MODELS, size, WIDTH) for size in SIZES[:count]))
    found, expected = vmap(products)(*given), vmap(separately)(*given)
    assert [one.shape for one in found] == [one.shape for one in expected]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    sums = [sum((one.sin().sum() for one in each), torch.zeros(())) for each in (found, expected)]
    for one, other in zip(*(torch.autograd.grad(each, given) for each in sums), strict=True):
        torch.testing.assert_close(one, other)


def test_a_graph_has_one_product_for_each_input() -> None:
    def layer(x: Tensor, first: Tensor, second: Tensor, third: Tensor, bias: Tensor) -> Tensor:
        both = F.linear(x, first) * F.linear(x, second)
        # Of another input, with a bias, and with a weight that is not there yet.
        return F.linear(both, third) + F.linear(x, first, bias) + F.linear(x, first + both.mean())

    given = tuple(drawn(*shape) for shape in ((ROWS, WIDTH), *[(WIDTH, WIDTH)] * 3, (WIDTH,)))
    module = join_products(symbolic_trace(layer))
    torch.testing.assert_close(module(*given), layer(*given))
    calls = [node for node in module.graph.nodes if node.op == "call_function"]
    assert [len(node.args) for node in calls if node.target is products] == [3, 2]
    assert sum(node.target is F.linear for node in calls) == 2


def test_products_of_products_are_joined_as_well() -> None:
    def layer(x: Tensor, first: Tensor, second: Tensor, third: Tensor) -> Tensor:
        narrow = F.linear(x, first)
        return F.linear(narrow, second) + F.linear(narrow, third)

    given = tuple(drawn(*shape) for shape in ((ROWS, WIDTH), (4, WIDTH), (WIDTH, 4), (WIDTH, 4)))
    module = join_products(symbolic_trace(layer))
    torch.testing.assert_close(module(*given), layer(*given))
    assert sum(node.target is products for node in module.graph.nodes) == 2
