"""A feed-forward network in the place of a mixer: each token alone, as many parameters as attention."""

from __future__ import annotations

import pytest
import torch
from toys import EXACT, call_at, mixer_of, noise

from heddle.specs import Site
from heddle.specs.mixers import Attention, TokenMlp

HIDDEN, LENGTH = 24, 30


@torch.no_grad()
def test_it_equals_its_formula() -> None:
    mixer, x = mixer_of(HIDDEN, "token_mlp", width=20), noise(2, LENGTH, HIDDEN)
    gate, up, down = (getattr(mixer, f"{name}_proj").weight for name in ("gate", "up", "down"))
    inner = x @ gate.T
    expected = (inner / (1 + torch.exp(-inner)) * (x @ up.T)) @ down.T
    assert (mixer(x, call_at(0, LENGTH)) - expected).abs().max() < EXACT


def test_no_output_has_a_gradient_at_another_token() -> None:
    mixer, x = mixer_of(HIDDEN, "token_mlp"), noise(1, 6, HIDDEN)
    slopes = torch.autograd.functional.jacobian(lambda x: mixer(x, call_at(0, 6, rows=1)).sum(-1), x)[0, :, 0]
    assert ((slopes.abs().sum(-1) > 0) == torch.eye(6, dtype=torch.bool)).all()


@torch.no_grad()
def test_tokens_may_come_in_any_order_and_are_answered_written_or_not() -> None:
    mixer, x = mixer_of(HIDDEN, "token_mlp"), noise(2, LENGTH, HIDDEN)
    order = torch.randperm(LENGTH, generator=torch.Generator().manual_seed(4))
    whole, cache = mixer(x, call_at(0, LENGTH)), mixer.new_cache()
    assert (mixer(x[:, order], call_at(0, LENGTH)) - whole[:, order]).abs().max() < EXACT
    unwritten = call_at(0, LENGTH, cache, written=torch.zeros(2, LENGTH, dtype=torch.float64))
    assert torch.equal(mixer(x, unwritten), whole)
    assert cache.tensors() == {}


@pytest.mark.parametrize("size", [256, 1024, 2048])
def test_it_has_the_parameters_of_attention(size: int) -> None:
    site, attention = Site(hidden_size=size), Attention(heads=8)
    # The authors' bound.
    assert TokenMlp().params(site) == pytest.approx(attention.params(site), rel=1e-3)
