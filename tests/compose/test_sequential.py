"""Mixers one after the other: against their equation, and how far a token sees through all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import EXACT, EXAMPLES, call_at, mixer_of, model_with, noise

from heddle.compose.cache import Call
from heddle.errors import HeddleErrors
from heddle.specs import MIXERS, loads
from heddle.specs.layer import Site as SpecSite
from heddle.specs.pattern import layers_of
from heddle.specs.sight import Sight, reach

HIDDEN, LENGTH = 24, 33
SOFTMAX: dict[str, Any] = {"kind": "attention", "heads": 2}
GDN: dict[str, Any] = {"kind": "gated_deltanet", "heads": 2}
DECAY: dict[str, Any] = {"kind": "decay_attention", "heads": 2}
forms = pytest.mark.parametrize("residual", [True, False])
chains = pytest.mark.parametrize(
    "mixers",
    [[SOFTMAX, GDN], [DECAY, SOFTMAX | {"window": 4}, GDN]],
    ids=lambda chain: "+".join(one["kind"] for one in chain),
)


def windowed(window: int) -> dict[str, Any]:
    return SOFTMAX | {"window": window}


def chain_of(mixers: list[dict[str, Any]], **fields: Any) -> Any:
    return mixer_of(HIDDEN, "sequential", mixers=mixers, **fields)


def whole() -> Call:
    return call_at(0, LENGTH)


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def oracle(chain: Any, x: Tensor, *, residual: bool) -> Tensor:
    """The stream goes through all mixers, and what they added to it is told by a subtraction."""
    weights = [None, *(norm.weight for norm in chain.norms)]
    u = x
    for weight, mixer in zip(weights, chain.mixers, strict=True):
        output = mixer(u if weight is None else normed(u, weight), whole())
        u = u + output if residual else output
    return u - x if residual else u


@forms
@chains
def test_a_chain_computes_its_equation(mixers: list[dict[str, Any]], residual: bool) -> None:
    chain, x = chain_of(mixers, residual=residual), noise(2, LENGTH, HIDDEN)
    assert len(chain.norms) == len(mixers) - 1
    assert (chain(x, whole()) - oracle(chain, x, residual=residual)).abs().max() < EXACT


@forms
@chains
def test_the_gradient_of_a_chain_is_that_of_its_equation(
    mixers: list[dict[str, Any]], residual: bool
) -> None:
    chain, x, aim = (
        chain_of(mixers, residual=residual),
        noise(2, LENGTH, HIDDEN),
        noise(2, LENGTH, HIDDEN, seed=7),
    )
    x.requires_grad_()
    tensors = [x, *chain.parameters()]
    found = torch.autograd.grad((chain(x, whole()) * aim).sum(), tensors)
    expected = torch.autograd.grad((oracle(chain, x, residual=residual) * aim).sum(), tensors)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() < EXACT
        assert one.abs().max() > 0


def test_a_layer_adds_its_stream_once() -> None:
    # With output projections of 0 every mixer gives 0, and so must the chain.
    chain, x = chain_of([SOFTMAX, GDN]), noise(2, LENGTH, HIDDEN)
    for mixer in chain.mixers:
        nn.init.zeros_(mixer.o_proj.weight)
    assert chain(x, whole()).abs().max() == 0


@forms
def test_what_no_mixer_remembers_has_no_say_in_later_outputs(residual: bool) -> None:
    chain, x = chain_of([DECAY, DECAY, DECAY], residual=residual), noise(2, LENGTH, HIDDEN)
    written, other = torch.ones(2, LENGTH), x.clone()
    written[:, 9] = 0.0
    other[:, 9] += 1.0
    before, after = (chain(one, call_at(0, LENGTH, written=written)) for one in (x, other))
    assert (before - after).abs().amax((0, 2)).nonzero().flatten().tolist() == [9]


@forms
@pytest.mark.parametrize("windows", [(3, 5), (4, 2, 6), (1, 7)])
def test_windows_of_a_chain_add_up(windows: tuple[int, ...], residual: bool) -> None:
    chain = chain_of([windowed(one) for one in windows], residual=residual)
    x = noise(2, LENGTH, HIDDEN).requires_grad_()
    (gradient,) = torch.autograd.grad(chain(x, whole())[:, -1].sum(), x)
    heard = gradient.abs().sum((0, 2)).nonzero().flatten().tolist()
    assert heard == list(range(heard[0], LENGTH))
    mixer = {"kind": "sequential", "mixers": [windowed(one) for one in windows], "residual": residual}
    assert reach(layers_of(model_with(mixer, HIDDEN)), SpecSite(HIDDEN)) == LENGTH - 1 - heard[0]


def test_the_sight_through_a_chain_is_that_of_its_slowest_part() -> None:
    def sights(mixers: list[dict[str, Any]], **fields: Any) -> list[Sight]:
        spec = MIXERS["sequential"].model_validate({"mixers": mixers, **fields})
        return list(spec.sights(SpecSite(HIDDEN)))

    gated = MIXERS["gated_deltanet"].model_validate(GDN).sights(SpecSite(HIDDEN))[0]
    assert sights([windowed(4), GDN], residual=False) == [Sight(log_decay=gated.log_decay)]
    assert sights([SOFTMAX, GDN], residual=False) == [Sight()]
    assert sights([windowed(4), GDN]) == [Sight(window=4), gated, Sight(log_decay=gated.log_decay)]
    # What a router may hide is not carried on for certain.
    routed = {"kind": "token_router", "mixers": [windowed(3), SOFTMAX]}
    assert sights([windowed(4), routed], residual=False) == [Sight(window=6)]


def test_costs_are_those_of_the_parts_and_of_the_norms_between() -> None:
    site = SpecSite(HIDDEN)
    spec = MIXERS["sequential"].model_validate({"mixers": [SOFTMAX, GDN, DECAY]})
    parts = [MIXERS[one["kind"]].model_validate(one) for one in (SOFTMAX, GDN, DECAY)]
    assert spec.params(site) == sum(one.params(site) for one in parts) + 2 * HIDDEN
    assert spec.flops(site, 50) == sum(one.flops(site, 50) for one in parts)
    assert spec.prefill_flops(site, 50) == sum(one.prefill_flops(site, 50) for one in parts)
    assert [state.name for state in spec.states(site)][:3] == [
        "mixers.0.keys",
        "mixers.0.values",
        "mixers.1.memory",
    ]


def test_one_mixer_is_no_chain_and_an_error_inside_is_told_at_its_line() -> None:
    text = EXAMPLES["sequential"].read_text()
    for old, new, path in (
        ("heads: 4, kv_heads: 2", "heads: 4, kv_heads: 3", "blocks.both.mixer.mixers.1.kv_heads"),
        ("          - {kind: gated_deltanet, heads: 2}\n", "", "blocks.both.mixer.mixers"),
    ):
        assert old in text
        with pytest.raises(HeddleErrors) as caught:
            loads(text.replace(old, new))
        (error,) = caught.value.errors
        assert (error.where.path, error.where.line is None) == (path, False)
