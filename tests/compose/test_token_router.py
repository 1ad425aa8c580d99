"""The token router: what each mixer remembers, how the choice is learned, and what chunks share."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from toys import EXACT, EXAMPLES, call_at, mixer_of, model_with, noise, padded_call, tokens

from heddle.compose.build import build
from heddle.compose.cache import Call
from heddle.compose.mixers.parallel import ParallelModule
from heddle.compose.mixers.token_router import TokenRouterModule
from heddle.compose.modules.site import Site
from heddle.specs import MIXERS, load, spec_hash
from heddle.specs.layer import Site as SpecSite
from heddle.specs.mixers.attention import Attention

HIDDEN, HEADS, DIM, LENGTH = 24, 2, 12, 29
GDN: dict[str, Any] = {"kind": "gated_deltanet", "heads": HEADS}
DECAY: dict[str, Any] = {"kind": "decay_attention", "heads": HEADS}
SOFTMAX: dict[str, Any] = {"kind": "attention", "heads": HEADS, "rope": None}
PAIRS = [[GDN, DECAY], [DECAY, GDN]]
WITH_SOFTMAX = [[SOFTMAX, GDN], [DECAY, SOFTMAX], [SOFTMAX, SOFTMAX]]


def _named(pair: list[dict[str, Any]]) -> str:
    return "+".join(one["kind"] for one in pair)


every_pair = pytest.mark.parametrize("mixers", PAIRS + WITH_SOFTMAX, ids=_named)
every_linear_pair = pytest.mark.parametrize("mixers", PAIRS, ids=_named)


def router_of(mixers: list[dict[str, Any]], **fields: Any) -> Any:
    return mixer_of(HIDDEN, "token_router", mixers=mixers, **fields)


def whole(**fields: Any) -> Call:
    return call_at(0, LENGTH, **fields)


def fixed_routes() -> Tensor:
    """Each token to one mixer, both often and in runs."""
    first = torch.tensor([1, 0, 0, 1, 1, 1, 0, 1, 0, 0, 0, 0, 1, 1, 0, 1] * 2)[:LENGTH].double()
    rows = torch.stack((first, 1.0 - first))
    return torch.stack((rows, 1.0 - rows), dim=-1)


# Token by token, in float64, from the weights alone: nothing is shared with the modules.


def decay_oracle(mixer: Any, x: Tensor, written: Tensor) -> Tensor:
    rows = F.silu(F.linear(x, mixer.qkv_proj.weight)).unflatten(-1, (3, HEADS, DIM))
    outputs = []
    for b in range(x.shape[0]):
        memory = torch.zeros(HEADS, DIM, DIM, dtype=torch.float64)
        for t in range(x.shape[1]):
            q, k, v = rows[b, t]
            memory = mixer.log_decay.double().exp()[:, None, None] * memory
            memory = memory + written[b, t] * k[:, :, None] * v[:, None]
            outputs.append(torch.einsum("hkv,hk->hv", memory, q).flatten())
    o = torch.stack(outputs).view(*x.shape[:2], -1)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt() * mixer.norm.weight
    return F.linear(o * torch.sigmoid(F.linear(x, mixer.gate_proj.weight)), mixer.o_proj.weight)


def deltanet_oracle(mixer: Any, x: Tensor, written: Tensor) -> Tensor:
    qkv, taps = F.linear(x, mixer.qkv_proj.weight), mixer.conv.weight
    outputs = []
    for b in range(x.shape[0]):
        memory = torch.zeros(HEADS, DIM, DIM, dtype=torch.float64)
        for t in range(x.shape[1]):
            mixed = sum(taps[:, 3 - back] * qkv[b, t - back] for back in range(min(t + 1, 4)))
            q, k, v = F.silu(mixed).view(3, HEADS, DIM)
            q, k = (side / (side.square().sum(-1, keepdim=True) + 1e-6).sqrt() for side in (q, k))
            step = F.softplus(F.linear(x[b, t], mixer.a_proj.weight) + mixer.dt_bias)
            memory = torch.exp(-mixer.A_log.exp() * step)[:, None, None] * memory
            if written[b, t] == 1.0:
                beta = torch.sigmoid(F.linear(x[b, t], mixer.b_proj.weight))
                wrong = v - torch.einsum("hkv,hk->hv", memory, k)
                memory = memory + beta[:, None, None] * k[:, :, None] * wrong[:, None]
            o = torch.einsum("hkv,hk->hv", memory, q) * DIM**-0.5
            o = o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt() * mixer.norm.weight
            outputs.append((o * F.silu(F.linear(x[b, t], mixer.z_proj.weight)).view(HEADS, DIM)).flatten())
    return F.linear(torch.stack(outputs).view(*x.shape[:2], -1), mixer.o_proj.weight)


def softmax_oracle(mixer: Any, x: Tensor, written: Tensor) -> Tensor:
    q, k, v = (
        F.linear(x, one.weight).unflatten(-1, (HEADS, DIM))
        for one in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    )
    outputs = []
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            scores = torch.exp(torch.einsum("jhd,hd->jh", k[b, : t + 1], q[b, t]) * DIM**-0.5)
            # Its own key a token sees in any case.
            kept = torch.cat((written[b, :t], torch.ones(1)))
            p = scores * kept[:, None] / (scores * kept[:, None]).sum(0)
            outputs.append(torch.einsum("jh,jhd->hd", p, v[b, : t + 1]).flatten())
    return F.linear(torch.stack(outputs).view(*x.shape[:2], -1), mixer.o_proj.weight)


ORACLES = {"gated_deltanet": deltanet_oracle, "decay_attention": decay_oracle, "attention": softmax_oracle}


@every_pair
def test_fixed_routes_equal_a_loop_over_tokens(mixers: list[dict[str, Any]]) -> None:
    router, x, m = router_of(mixers), noise(2, LENGTH, HIDDEN), fixed_routes()
    parts = [
        ORACLES[one["kind"]](part, x, m[..., index])
        for index, (one, part) in enumerate(zip(mixers, router.mixers, strict=True))
    ]
    assert (router.answer(x, whole(), m) - sum(parts)).abs().max() < EXACT


@every_pair
@pytest.mark.parametrize("chunk", [1, 3, 16])
def test_a_chunk_goes_where_its_first_token_is_sent(mixers: list[dict[str, Any]], chunk: int) -> None:
    router, x = router_of(mixers, chunk=chunk), noise(2, LENGTH, HIDDEN)
    chosen = (x @ router.router.weight.mT).argmax(-1)
    expected = [[int(chosen[b, t - t % chunk]) for t in range(LENGTH)] for b in range(2)]
    m = router.routes(x, whole())
    assert m.argmax(-1).tolist() == expected
    assert torch.equal(m.detach(), F.one_hot(torch.tensor(expected), 2).double())
    assert {0, 1} == {one for row in expected for one in row}
    assert torch.equal(router(x, whole()), router.answer(x, whole(), m))


@every_pair
def test_all_tokens_to_the_first_mixer_is_parallel_with_the_second_never_written(
    mixers: list[dict[str, Any]],
) -> None:
    x = noise(2, LENGTH, HIDDEN)
    for merge in ("sum", "mean", "gate"):
        router = router_of(mixers, merge=merge, norm=True)
        weights = {name: held for name, held in router.state_dict().items() if name != "router.weight"}
        other = router_of(mixers)
        parallel = ParallelModule(
            Site(HIDDEN, 1, 3), mixers=list(other.mixers), merge=merge, norm=True, weights=None
        ).double()
        parallel.load_state_dict(weights)
        never = whole(written=torch.zeros(2, LENGTH))
        outputs = [parallel.mixers[0](x, whole()), parallel.mixers[1](x, never)]
        m = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(2, LENGTH, 2)
        assert (router.answer(x, whole(), m) - parallel.merged(x, outputs)).abs().max() < EXACT
    # What a linear memory never wrote it does not answer; a softmax sees its own token.
    assert (outputs[1].abs().max() < EXACT) == (mixers[1]["kind"] != "attention")


def test_the_gradient_of_a_softmax_is_that_of_weights_of_keys_and_hidden_ones_have_none() -> None:
    router, x, aim = router_of([SOFTMAX, GDN]), noise(2, LENGTH, HIDDEN), noise(2, LENGTH, HIDDEN, seed=7)
    m = fixed_routes().requires_grad_()
    softmax, first = router.mixers[0], m[..., 0].detach()
    call = whole(written=m[..., 0])
    (gradient,) = torch.autograd.grad((softmax(x, call) * aim).sum(), m)
    step = 1e-5
    for place in [(0, 0), (0, 3), (0, 15), (1, 1), (1, 10), (1, 22)]:
        offset = torch.zeros_like(first)
        offset[place] = step
        with torch.no_grad():
            up, down = ((softmax_oracle(softmax, x, first + sign * offset) * aim).sum() for sign in (1, -1))
        assert gradient[..., 0][place].item() == pytest.approx(
            (up - down).item() / (2 * step), rel=1e-6, abs=1e-8
        )
    assert gradient[..., 0][first == 0].abs().max() == 0


@every_linear_pair
def test_the_gradient_of_the_routes_is_that_of_real_valued_ones(mixers: list[dict[str, Any]]) -> None:
    router, x, aim = router_of(mixers), noise(2, LENGTH, HIDDEN), noise(2, LENGTH, HIDDEN, seed=7)
    m = torch.rand(2, LENGTH, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)

    def loss(routes: Tensor) -> Tensor:
        return (router.answer(x, whole(), routes) * aim).sum()

    m.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(m), m)
    step = 1e-5
    for place in [(0, 0, 0), (0, 9, 1), (1, 14, 0), (1, 14, 1), (0, 27, 1)]:
        offset = torch.zeros_like(m)
        offset[place] = step
        with torch.no_grad():
            slope = (loss(m + offset) - loss(m - offset)) / (2 * step)
        assert gradient[place] == pytest.approx(slope.item(), rel=1e-6, abs=1e-8)


@every_pair
@pytest.mark.parametrize("chunk", [1, 4])
def test_the_router_learns_straight_through_a_softmax(mixers: list[dict[str, Any]], chunk: int) -> None:
    router, x, aim = (
        router_of(mixers, chunk=chunk),
        noise(2, LENGTH, HIDDEN),
        noise(2, LENGTH, HIDDEN, seed=7),
    )
    (router(x, whole()) * aim).sum().backward()
    m = router.routes(x, whole()).detach().requires_grad_()
    (of_routes,) = torch.autograd.grad((router.answer(x, whole(), m) * aim).sum(), m)
    # The logits of a chunk's first token answer for the whole chunk.
    summed = torch.zeros_like(of_routes)
    for t in range(LENGTH):
        summed[:, t - t % chunk] += of_routes[:, t]
    p = (x @ router.router.weight.mT).softmax(-1).detach()
    of_logits = p * (summed - (summed * p).sum(-1, keepdim=True))
    expected = torch.einsum("bti,btd->id", of_logits, x)
    assert (router.router.weight.grad - expected).abs().max() < EXACT


def test_training_and_evaluation_choose_alike() -> None:
    router, x = router_of(PAIRS[0], budget=0.3), noise(2, LENGTH, HIDDEN)
    assert torch.equal(router.train()(x, whole()), router.eval()(x, whole()))


def test_chunks_are_counted_from_each_rows_first_token() -> None:
    router = router_of(PAIRS[0], chunk=5)
    x, pad = noise(2, LENGTH, HIDDEN), 8
    real = torch.ones(2, LENGTH, dtype=torch.bool)
    real[0, :pad] = False
    m = router.routes(x, padded_call(real))
    alone = router.routes(x[:1, pad:].expand(2, -1, -1), call_at(0, LENGTH - pad))
    assert torch.equal(m[0, pad:], alone[0])
    assert torch.equal(m[1], router.routes(x, whole())[1])


def test_an_open_chunk_stays_where_it_was_sent() -> None:
    router, x = router_of(PAIRS[0], chunk=6), noise(2, LENGTH, HIDDEN)
    together, cache = router.routes(x, whole()), router.new_cache()
    assert not cache.is_croppable
    pieces = []
    for start, end in ((0, 4), (4, 5), (5, 20), (20, LENGTH)):
        pieces.append(router.routes(x[:, start:end], call_at(start, end - start, cache)))
    assert torch.equal(torch.cat(pieces, dim=1), together)
    assert router_of(PAIRS[0]).new_cache().tensors() == {}


def test_a_router_inside_a_router_forgets_what_either_sends_past() -> None:
    inner = {"kind": "token_router", "mixers": [DECAY, GDN]}
    router, x = router_of([inner, GDN]), noise(2, LENGTH, HIDDEN)
    outer, routes = fixed_routes(), router.mixers[0].routes(x, whole())
    call = whole(written=outer[..., 0])
    expected = sum(
        ORACLES[kind](part, x, outer[..., 0] * routes[..., index])
        for index, (kind, part) in enumerate(
            zip(("decay_attention", "gated_deltanet"), router.mixers[0].mixers, strict=True)
        )
    )
    assert (router.mixers[0](x, call) - expected).abs().max() < EXACT


def losses_of(router: Any, call: Call) -> dict[str, tuple[Tensor, float]]:
    router(noise(2, LENGTH, HIDDEN), call)
    return {name: (value, factor) for name, value, factor in call.losses}


def test_the_budget_is_a_loss_on_the_share_of_real_tokens() -> None:
    router = router_of(PAIRS[0], budget=0.3, budget_factor=2.0)
    assert losses_of(router, whole()) == {}
    real = torch.ones(2, LENGTH, dtype=torch.bool)
    real[0, :11] = False
    found = losses_of(router.train(), padded_call(real))
    seen: list[Tensor] = []
    router.routes_out.register_forward_hook(lambda _, __, m: seen.append(m.detach()))
    router(noise(2, LENGTH, HIDDEN), padded_call(real))
    share = sum(float(seen[0][b, t, 0]) for b in range(2) for t in range(LENGTH) if real[b, t]) / (
        2 * LENGTH - 11
    )
    assert found["router_share"][0].item() == pytest.approx(share)
    assert found["router_share"][1] == 0.0
    assert not found["router_share"][0].requires_grad
    assert found["router_budget"][0].item() == pytest.approx((share - 0.3) ** 2)
    assert found["router_budget"][1] == 2.0
    assert set(losses_of(router_of(PAIRS[0]).train(), whole())) == {"router_share"}


@pytest.mark.parametrize("budget", [0.1, 0.9])
def test_training_on_the_budget_alone_reaches_it(budget: float) -> None:
    router, x = router_of(PAIRS[0], budget=budget).train(), noise(2, 400, HIDDEN)
    # A feature that is always there, as a bias would be.
    x[..., 0] = 2.0
    optimizer = torch.optim.SGD(router.router.parameters(), lr=1.0)
    for _ in range(100):
        call = call_at(0, 400)
        router.routes(x, call)
        losses = {name: value for name, value, _ in call.losses}
        optimizer.zero_grad()
        losses["router_budget"].backward()
        optimizer.step()
    assert losses["router_share"].item() == pytest.approx(budget, abs=0.05)


def test_a_kind_that_remembers_all_is_refused() -> None:
    class Keeping(Attention):
        exempt: ClassVar[dict[str, str]] = {"written": "a fixed table"}

    spec = MIXERS["token_router"](mixers=[Keeping(heads=2), MIXERS["gated_deltanet"](heads=2)])
    (problem,) = spec.problems(SpecSite(HIDDEN))
    assert (problem.field, problem.code) == ("mixers.0", "conflicting-fields")


def test_a_factor_without_a_budget_computes_nothing() -> None:
    def hash_of(**fields: Any) -> str:
        return spec_hash(model_with({"kind": "token_router", "mixers": PAIRS[0], **fields}, HIDDEN))

    assert hash_of() == hash_of(budget_factor=0.5) == hash_of(chunk=1, merge="sum")
    assert len({hash_of(), hash_of(budget=0.5), hash_of(budget=0.5, budget_factor=0.5)}) == 3


def test_the_example_tells_its_share_and_misses_its_budget_at_first() -> None:
    model, ids = build(load(EXAMPLES["token_router"]).spec.model).train(), tokens(40)
    assert isinstance(model.model.layers[3].mixer, TokenRouterModule)
    assert set(model.model(ids).aux_losses) == {"router_share", "router_budget"}
    model(ids, labels=ids).loss.backward()
    assert model.model.layers[3].mixer.router.weight.grad.abs().min() > 0


def test_a_token_surely_sees_what_the_narrower_mixer_sees() -> None:
    narrow, site = {"kind": "attention", "heads": 2, "window": 5}, SpecSite(HIDDEN)
    for kind in ("token_router", "layer_router"):
        sights = MIXERS[kind].model_validate({"kind": kind, "mixers": [narrow, GDN]}).sights(site)
        assert [(one.window, one.is_certain) for one in sights] == [(5, True), (None, False)]
        sights = MIXERS[kind].model_validate({"kind": kind, "mixers": [DECAY, GDN]}).sights(site)
        assert all(one.is_certain for one in sights)


@pytest.mark.parametrize("chunk", [1, 4])
def test_a_cache_of_two_softmax_mixers_is_cropped_unless_a_chunk_is_open(chunk: int) -> None:
    router, x = router_of([SOFTMAX, {**SOFTMAX, "head_dim": 6}], chunk=chunk), noise(2, LENGTH, HIDDEN)
    expected, cache = router(x, whole())[:, 12:], router.new_cache()
    assert cache.is_croppable == (chunk == 1)
    router(x[:, :20], call_at(0, 20, cache))
    cache.advance(20)
    if chunk > 1:
        with pytest.raises(RuntimeError, match="cannot forget single tokens"):
            cache.crop(-8)
        assert cache.get_seq_length() == 20
        return
    cache.crop(-8)
    assert (router(x[:, 12:], call_at(12, LENGTH - 12, cache)) - expected).abs().max() < EXACT
