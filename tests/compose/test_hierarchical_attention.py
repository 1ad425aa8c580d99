"""Hierarchical self-attention: its weights by recursion over sets, none of the tree's nearer to softmax; limits, costs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from toys import EXACT, call_at, mixer_of, noise, padded_call

from heddle.compose.modules.hierarchy import hierarchical_attention
from heddle.specs import Site as SpecSite
from heddle.specs.mixers import HierarchicalAttention

Tree = list[Any] | int
DIM = 5


def tree_of(nodes: list[Tree], branching: int) -> Tree:
    """Siblings in groups of `branching`, until one node is left."""
    while True:
        nodes = [nodes[first : first + branching] for first in range(0, len(nodes), branching)]
        if len(nodes) == 1:
            return nodes[0]


def leaves(node: Tree) -> list[int]:
    return [node] if isinstance(node, int) else [leaf for child in node for leaf in leaves(child)]


def collapsed(node: Tree) -> Tree:
    """The tree without nodes of one child."""
    if isinstance(node, int):
        return node
    children = [collapsed(child) for child in node]
    return children[0] if len(children) == 1 else children


def free(node: Tree, s: Tensor, own: bool) -> Tensor:
    """-phi of a node: the log of what its tokens keep among themselves."""
    if isinstance(node, int):
        return s[node, node] if own else s.new_tensor(-math.inf)
    size = len(leaves(node))
    return sum(len(leaves(child)) / size * normaliser(child, node, s, own) for child in node)  # type: ignore[return-value]


def tied(one: Tree, other: Tree, s: Tensor) -> Tensor:
    """The mean logit of all pairs."""
    return s[leaves(one)][:, leaves(other)].mean()


def normaliser(child: Tree, node: list[Any], s: Tensor, own: bool) -> Tensor:
    terms = [tied(child, other, s) + math.log(len(leaves(other))) for other in node if other is not child]
    return torch.stack([free(child, s, own), *terms]).logsumexp(0)


def weights_of(node: Tree, s: Tensor, own: bool, mass: Tensor, into: Tensor) -> Tensor:
    """Fills in the weights [T, T] of all tokens below `node`, whose mass it is."""
    if isinstance(node, int):
        into[node, node] = mass if own else 0.0
        return into
    for child in node:
        total = normaliser(child, node, s, own)
        for other in node:
            if other is not child:
                pairs = torch.meshgrid(*(torch.tensor(leaves(one)) for one in (child, other)), indexing="ij")
                into[pairs] = mass * torch.exp(tied(child, other, s) - total)
        weights_of(child, s, own, mass * torch.exp(free(child, s, own) - total), into)
    return into


def reference(s: Tensor, branching: int, own: bool) -> Tensor:
    tree = collapsed(tree_of(list(range(len(s))), branching))
    return weights_of(tree, s, own, s.new_tensor(1.0), torch.zeros_like(s))


def drawn(length: int) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(noise(1, 1, length, DIM, seed=seed) for seed in range(3))  # type: ignore[return-value]


def weights(q: Tensor, k: Tensor, branching: int, own: bool) -> Tensor:
    """The weights themselves: values that tell tokens apart."""
    identity = torch.eye(q.shape[2], dtype=q.dtype)[None, None]
    return hierarchical_attention(q, k, identity, branching=branching, own=own, real=None)[0, 0]


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize(("length", "branching"), [(2, 2), (3, 2), (7, 2), (9, 2), (13, 3), (16, 4), (6, 9)])
def test_weights_are_those_of_a_recursion_over_sets(length: int, branching: int, own: bool) -> None:
    q, k, _ = drawn(length)
    expected = reference((q @ k.mT)[0, 0] / DIM**0.5, branching, own)
    found = weights(q, k, branching, own)
    assert (found - expected).abs().max() < EXACT
    assert (found.sum(-1) - 1).abs().max() < EXACT


def test_the_example_of_three_tokens() -> None:
    # s01 = 1, s10 = 0, s02 = 1/2, s12 = -1/2, s20 = 2, s21 = 0: the tree ((0, 1), 2).
    s = torch.tensor([[0.0, 1.0, 0.5], [0.0, 0.0, -0.5], [2.0, 0.0, 0.0]], dtype=torch.float64)
    found = weights(s[None, None] * 3**0.5, torch.eye(3, dtype=torch.float64)[None, None], 2, own=False)
    outside = 1 / (math.exp(0.5) + 1)
    assert found.tolist() == [
        pytest.approx([0.0, 1 - outside, outside]),
        pytest.approx([1 - outside, 0.0, outside]),
        pytest.approx([0.5, 0.5, 0.0]),
    ]


def test_no_other_weights_of_the_tree_are_nearer_to_softmax() -> None:
    q, k, _ = drawn(9)
    flat = torch.softmax((q @ k.mT)[0, 0] / DIM**0.5, dim=-1)

    def distance(p: Tensor) -> Tensor:
        return (p * (p.log() - flat.log())).sum()

    nearest = distance(weights(q, k, 3, own=True))
    for seed in range(20):
        # The optimum of other logits is another matrix of the tree.
        other = weights(q + 0.05 * noise(*q.shape, seed=100 + seed), k, 3, own=True)
        assert distance(other) > nearest
    # A finer choice of weights cannot be farther: one family of all is softmax itself.
    assert distance(weights(q, k, 9, own=True)).abs() < EXACT


def test_equal_queries_and_keys_in_a_block_lose_nothing() -> None:
    q, k = (noise(1, 1, 3, DIM, seed=seed).repeat_interleave(3, dim=2) for seed in range(2))
    flat = torch.softmax((q @ k.mT)[0, 0] / DIM**0.5, dim=-1)
    assert (weights(q, k, 3, own=True) - flat).abs().max() < EXACT


@pytest.mark.parametrize("own", [True, False])
def test_padding_leaves_no_trace(own: bool) -> None:
    mixer = mixer_of(24, "hierarchical_attention", heads=2, branching=3, own=own)
    x, real = noise(2, 17, 24), torch.ones(2, 17, dtype=torch.bool)
    real[0, :4] = real[1, 9:] = False
    y = mixer(x, padded_call(real))
    assert y.isfinite().all()
    for row in range(2):
        alone = x[row : row + 1, real[row]]
        expected = mixer(alone, call_at(0, alone.shape[1], rows=1))
        assert (y[row, real[row]] - expected[0]).abs().max() < EXACT


def test_a_token_alone_sees_itself_or_nothing() -> None:
    q, k, v = drawn(1)
    assert torch.equal(hierarchical_attention(q, k, v, branching=4, own=True, real=None), v)
    q.requires_grad_()
    alone = hierarchical_attention(q, k, v, branching=4, own=False, real=None)
    assert (alone == 0).all()
    alone.sum().backward()
    assert q.grad is not None
    assert q.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_great_logits_stay_finite(dtype: torch.dtype) -> None:
    q, k, v = ((100 * side).to(dtype).requires_grad_() for side in drawn(50))
    out = hierarchical_attention(q, k, v, branching=4, own=False, real=None)
    out.float().square().sum().backward()
    assert out.isfinite().all()
    assert all(side.grad is not None and side.grad.isfinite().all() for side in (q, k, v))


@torch.no_grad()
@pytest.mark.parametrize("branching", [2, 4, 7])
def test_flops_are_those_that_torch_counts(branching: int) -> None:
    spec, site = HierarchicalAttention(heads=2, branching=branching), SpecSite(hidden_size=24)
    mixer = mixer_of(24, "hierarchical_attention", heads=2, branching=branching)
    for length in (1, 17, 64):
        with FlopCounterMode(display=False) as counter:
            mixer(noise(2, length, 24), call_at(0, length))
        assert counter.get_total_flops() == pytest.approx(2 * length * spec.prefill_flops(site, length))
    assert spec.params(site) == sum(one.numel() for one in mixer.parameters())
    assert spec.states(site) == ()
