"""Test-time training: the layer is its formula, chunks count real tokens, AllMem is it beside a window, its costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from toys import EXACT, call_at, mixer_of, noise, padded_call

from heddle.compose.cache import Call
from heddle.specs import Site as SpecSite
from heddle.specs.mixers import Ttt

HIDDEN, LENGTH, CHUNK = 24, 23, 5
MLP: dict[str, Any] = {"heads": 2, "width": 10, "chunk": CHUNK, "rate": 0.3, "scale": 0.7}
LINEAR = MLP | {"width": None, "memory": "linear"}


def ready(**fields: Any) -> Any:
    """A mixer in float64 whose rates differ from token to token, and whose channels have factors of their own."""
    mixer = mixer_of(HIDDEN, "ttt", **fields)
    nn.init.normal_(mixer.rate_proj.weight, std=0.2)
    nn.init.uniform_(mixer.scale, 0.5, 1.5)
    return mixer


def memory_of(z: Tensor, weights: list[Tensor]) -> Tensor:
    """f of one token.  Shapes:  z, out: [d];  weights: W_1, or W_0, W_2, W_1"""
    if len(weights) == 1:
        return z + weights[0] @ z
    w_0, w_2, w_1 = weights
    return z + w_1 @ (F.silu(w_0 @ z) * (w_2 @ z))


def by_loop(mixer: Any, x: Tensor, spec: dict[str, Any]) -> Tensor:
    """Row by row, head by head and token by token from the weights alone, inner gradients by autograd."""
    q, k, v = (side.unflatten(-1, (mixer.heads, -1)) for side in (x @ mixer.qkv_proj.weight.T).chunk(3, -1))
    q, k = (F.silu(side) for side in (q, k))
    q, k = (side / (side.square().sum(-1, keepdim=True) + 1e-6).sqrt() for side in (q, k))
    base = torch.log(torch.expm1(torch.tensor(spec["rate"], dtype=torch.float64)))
    rates = torch.log1p(torch.exp(x @ mixer.rate_proj.weight.T + base)).unflatten(-1, (mixer.heads, -1))
    gates = torch.sigmoid(x @ mixer.momentum_proj.weight.T)
    outputs = torch.zeros_like(q)
    for row in range(x.shape[0]):
        for head in range(mixer.heads):
            first = list(mixer.weight[head].detach().clone())
            first[-1] = first[-1].T
            now, moving = first, [torch.zeros_like(one) for one in first]
            for t in range(x.shape[1]):
                if t and t % CHUNK == 0:
                    chunk = range(t - CHUNK, t)
                    gate = sum(gates[row, s, head] for s in chunk) / CHUNK
                    steps = gradients_of(
                        now, [(k[row, s, head], v[row, s, head], rates[row, s, head]) for s in chunk]
                    )
                    moving = [gate * one + step for one, step in zip(moving, steps, strict=True)]
                    now = [one - step for one, step in zip(now, moving, strict=True)]
                    now = [
                        one * had.norm(dim=1, keepdim=True) / (one.norm(dim=1, keepdim=True) + 1e-5)
                        for one, had in zip(now, first, strict=True)
                    ]
                outputs[row, t, head] = memory_of(q[row, t, head], now)
    o = outputs / (outputs.square().mean(-1, keepdim=True) + 1e-6).sqrt() * mixer.norm.weight
    return o.flatten(2) @ mixer.o_proj.weight.T * mixer.scale


def gradients_of(now: list[Tensor], tokens: list[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
    """The gradient of -rate f(k) · v, summed over tokens, for each matrix with its own rates."""
    found = []
    for index, _ in enumerate(now):
        weights = [one.detach().requires_grad_() for one in now]
        with torch.enable_grad():
            loss = -sum(rate[index].detach() * (memory_of(k, weights) @ v) for k, v, rate in tokens)
            found += torch.autograd.grad(loss, weights[index])
    return found


@torch.no_grad()
@pytest.mark.parametrize("fields", [MLP, LINEAR], ids=["mlp", "linear"])
def test_it_equals_its_formula(fields: dict[str, Any]) -> None:
    mixer, x = ready(**fields), noise(2, LENGTH, HIDDEN)
    assert (mixer(x, call_at(0, LENGTH)) - by_loop(mixer, x, fields)).abs().max() < EXACT


@torch.no_grad()
def test_chunks_count_real_tokens() -> None:
    mixer, x = ready(**MLP), noise(2, LENGTH, HIDDEN)
    real = torch.ones(2, LENGTH, dtype=torch.bool)
    real[0, :3] = real[1, :9] = False
    found = mixer(x, padded_call(real))
    cache, pieces = mixer.new_cache(), []
    for begin, end in ((0, 4), (4, 11), *((t, t + 1) for t in range(11, LENGTH))):
        call = Call(torch.zeros(2, end - begin), real[:, begin:end], real[:, :end], cache)
        pieces.append(mixer(x[:, begin:end], call))
        cache.advance(end - begin)
    for row, width in enumerate((3, 9)):
        alone = mixer(x[row : row + 1, width:], call_at(0, LENGTH - width, rows=1))
        for y in (found, torch.cat(pieces, dim=1)):
            assert (y[row, width:] - alone[0]).abs().max() < EXACT


@torch.no_grad()
def test_the_memory_of_allmem_begins_as_a_window_of_attention_alone() -> None:
    window = {"kind": "attention", "heads": 2, "window": 8}
    both = mixer_of(HIDDEN, "parallel", mixers=[window, {"kind": "ttt", **MLP, "scale": 0.0, "chunk": 8}])
    x = noise(2, LENGTH, HIDDEN)
    attention = both.mixers[0](x, call_at(0, LENGTH))
    assert torch.equal(both(x, call_at(0, LENGTH)), attention)
    nn.init.ones_(both.mixers[1].scale)
    added = both(x, call_at(0, LENGTH)) - attention
    assert (added - both.mixers[1](x, call_at(0, LENGTH))).abs().max() < EXACT
    # The first token is out of the window's sight, and in the memory.
    other = x.clone()
    other[:, 0] = -x[:, 0]
    heard = (both(other, call_at(0, LENGTH)) - both(x, call_at(0, LENGTH))).abs().amax((0, 2))
    alone = (both.mixers[0](other, call_at(0, LENGTH)) - attention).abs().amax((0, 2))
    assert (alone[8:] == 0).all()
    assert (heard[8:] > 1e-9).all()


def test_rates_are_those_of_the_spec_where_their_projection_is_nothing() -> None:
    for rate in (1e-6, 1e-3, 0.5, 20.0):
        mixer = mixer_of(HIDDEN, "ttt", heads=2, rate=rate)
        assert F.softplus(torch.tensor(mixer.rate_bias, dtype=torch.float64)).item() == pytest.approx(rate)


def test_it_costs_what_the_sheet_says() -> None:
    # 4 memories of 256 with 256 features: 0.8 M weights; W, M and the open gradient in float32, 18 M d FLOPs a token and head.
    site = SpecSite(hidden_size=1024)
    spec = Ttt(heads=4, width=256)
    assert spec.params(site) == 4 * 1024 * 1024 + 4 * 4 * 1024 + 3 * 4 * 256 * 256 + 256 + 1024
    assert spec.state_bytes(site, 1, 2) == 4 * 4 * (3 * 3 * 256 * 256 + 2)
    outside = 2 * (4 * 1024 * 1024 + 4 * 4 * 1024)
    assert spec.flops(site, 9) - outside == spec.prefill_flops(site, 9) - outside == 4 * 18 * 256 * 256
    plain = Ttt(heads=4, memory="linear", momentum=False)
    assert plain.state_bytes(site, 1, 2) == 4 * 4 * (2 * 256 * 256 + 2)


@torch.no_grad()
@pytest.mark.parametrize("memory", ["linear", "mlp"])
@pytest.mark.parametrize("loss", ["dot", "l2"])
def test_flops_are_those_that_torch_counts(memory: Any, loss: Any) -> None:
    spec = Ttt(heads=2, memory=memory, loss=loss, chunk=8)
    mixer = mixer_of(32, "ttt", heads=2, memory=memory, loss=loss, chunk=8)
    with FlopCounterMode(display=False) as counter:
        mixer(noise(2, 64, 32), call_at(0, 64))
    assert counter.get_total_flops() == 2 * 64 * spec.prefill_flops(SpecSite(hidden_size=32), 64)


def test_what_does_not_fit_is_told() -> None:
    site = SpecSite(hidden_size=HIDDEN)
    (wrong,) = Ttt(heads=2, memory="linear", width=10).problems(site)
    assert (wrong.field, wrong.code) == ("width", "out-of-range")
    assert wrong.what == "10 features in a linear memory of 12 dimensions, which has nothing inside"
    assert [one.field for one in Ttt(heads=5).problems(site)] == ["heads"]
    assert Ttt(heads=2, memory="linear", width=12).problems(site) == []
