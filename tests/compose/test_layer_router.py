"""The layer router: what it reads of a prompt, what it mixes in training, and that a decision lasts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import EXACT, EXAMPLES, call_at, mixer_of, model_with, noise, tokens

from heddle.compose.build import build
from heddle.compose.cache import cache_bytes
from heddle.compose.mixers.layer_router import LayerRouterModule
from heddle.compose.modules.prompt_router import PromptRouter
from heddle.specs import MIXERS, ModelSpec, load, spec_hash
from heddle.specs.layer import Site as SpecSite

HIDDEN, LENGTH = 24, 30
FULL: dict[str, Any] = {"kind": "attention", "heads": 2}
CHEAP: dict[str, Any] = {"kind": "gated_deltanet", "heads": 2}


def router_of(**fields: Any) -> Any:
    return mixer_of(HIDDEN, "layer_router", **{"mixers": [FULL, CHEAP], "router_dim": 4, "pool": 6, **fields})


def split_by_the_prompt(router: Any) -> Any:
    """The router with a decision that follows the first feature's sign in the ends of a prompt: positive, the first."""
    with torch.no_grad():
        for layer in (*router.router.encoder, *router.router.head):
            if isinstance(layer, nn.Linear):
                layer.weight.zero_()
                layer.bias.zero_()
                # Far from 0 silu passes what is positive and stops what is not.
                layer.weight[0, 0] = 20.0
        router.router.last_weight.copy_(torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0]]))
        router.router.last_bias.copy_(torch.tensor([0.0, 1.0]))
    return router


def prompts() -> Tensor:
    """Two rows, the first of which goes to the first mixer and the second to the second."""
    x = noise(2, LENGTH, HIDDEN)
    x[0, :, 0], x[1, :, 0] = 1.0, -1.0
    return x


@pytest.mark.parametrize("length", [1, 5, 8, 9, 20])
def test_both_ends_of_a_prompt_are_read_and_a_short_one_as_a_whole(length: int) -> None:
    x, pool = noise(2, length, HIDDEN), 4
    got = PromptRouter(HIDDEN, size=2, pool=pool).pooled(x, None)
    ends = x if length <= 2 * pool else torch.cat((x[:, :pool], x[:, -pool:]), dim=1)
    assert (got - ends.mean(1)).abs().max() < EXACT


@pytest.mark.parametrize("padded", [0, 3, 15, 29])
def test_padding_is_not_read(padded: int) -> None:
    x, real = noise(2, LENGTH, HIDDEN), torch.ones(2, LENGTH, dtype=torch.bool)
    real[0, :padded] = False
    pooler = PromptRouter(HIDDEN, size=2, pool=4)
    got = pooler.pooled(x, real)
    assert (got[0] - pooler.pooled(x[:1, padded:], None)[0]).abs().max() < EXACT
    assert (got[1] - pooler.pooled(x[1:], None)[0]).abs().max() < EXACT


def test_the_router_is_as_large_as_the_paper_says() -> None:
    # 393 k and 197 k weights at a width of 128, and biases.
    made = PromptRouter(128, size=128, pool=100)
    sizes = [
        sum(part.weight.numel() for part in side if isinstance(part, nn.Linear))
        for side in (made.encoder, made.head)
    ]
    assert sizes == [128 * 1024 + 1024 * 256, 256 * 512 + 512 * 128]
    spec = MIXERS["layer_router"].model_validate({"mixers": [FULL, CHEAP]})
    assert spec.own_params(SpecSite(128)) == sum(parameter.numel() for parameter in made.parameters())


def test_it_begins_at_the_first_mixer_whatever_the_prompt() -> None:
    router, x = router_of(), noise(2, LENGTH, HIDDEN)
    assert torch.equal(router(x, call_at(0, LENGTH)), router.mixers[0](x, call_at(0, LENGTH)))
    share = router.train().decide(x, call_at(0, LENGTH))
    assert share[:, 0, 0].tolist() == pytest.approx([0.98901] * 2, abs=1e-5)


def test_training_mixes_both_and_evaluation_takes_one_for_each_row() -> None:
    router, x = split_by_the_prompt(router_of(temperature=3.0)), prompts()
    parts = [mixer(x, call_at(0, LENGTH)) for mixer in router.mixers]
    z = router.router(x, call_at(0, LENGTH))
    assert z.argmax(-1).tolist() == [0, 1]
    r = torch.softmax(z / 3.0, dim=-1)[:, None]
    got = router.train()(x, call_at(0, LENGTH))
    assert (got - (r[..., :1] * parts[0] + r[..., 1:] * parts[1])).abs().max() < EXACT
    hard = router.eval()(x, call_at(0, LENGTH))
    assert torch.equal(hard[0], parts[0][0])
    assert torch.equal(hard[1], parts[1][1])


def test_the_gradient_of_the_soft_mix_equals_finite_differences() -> None:
    router, x, aim = (
        router_of(temperature=1.5).train(),
        noise(2, LENGTH, HIDDEN),
        noise(2, LENGTH, HIDDEN, seed=5),
    )
    nn.init.normal_(router.router.last_weight)
    bias = router.router.last_bias

    def loss() -> Tensor:
        return (router(x, call_at(0, LENGTH)) * aim).sum()

    (gradient,) = torch.autograd.grad(loss(), bias)
    step = 1e-5
    for index in range(2):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                bias[index] += sign * step
                values.append(loss().item())
                bias[index] -= sign * step
        assert gradient[index].item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-6)
    assert gradient.abs().min() > 1e-3


def test_straight_through_trains_what_evaluation_computes_with_the_gradient_of_the_mix() -> None:
    hard, soft = (split_by_the_prompt(router_of(straight_through=one)) for one in (True, False))
    x, call = prompts(), call_at(0, LENGTH)
    trained = hard.train()(x, call)
    assert (trained - hard.eval()(x, call_at(0, LENGTH))).abs().max() < EXACT
    assert (trained - soft.train()(x, call_at(0, LENGTH))).abs().max() > 1e-3
    gradients = [
        torch.autograd.grad(router.train()(x, call_at(0, LENGTH)).sum(), router.router.last_bias)[0]
        for router in (hard, soft)
    ]
    # y is linear in r, so what reaches r is the same.
    assert gradients[0].abs().max() > 1e-6
    assert (gradients[0] - gradients[1]).abs().max() < 1e-9


def test_a_decision_lasts_whatever_comes_after_the_prompt() -> None:
    router, x = split_by_the_prompt(router_of()), prompts()
    # What follows the prompt would be decided the other way round.
    x[:, 12:, 0] = -10.0 * x[:, 12:, 0]
    assert router.decide(x, call_at(0, LENGTH)).argmax(-1).tolist() == [[1], [0]]
    cache, pieces = router.new_cache(), []
    for start, end in ((0, 12), *((t, t + 1) for t in range(12, 20)), (20, LENGTH)):
        pieces.append(router(x[:, start:end], call_at(start, end - start, cache)))
        cache.advance(end - start)
    parts = [mixer(x, call_at(0, LENGTH)) for mixer in router.mixers]
    got = torch.cat(pieces, dim=1)
    assert (got[0] - parts[0][0]).abs().max() < EXACT
    assert (got[1] - parts[1][1]).abs().max() < EXACT
    assert not cache.is_croppable


def test_a_decision_moves_with_its_row() -> None:
    router, x = split_by_the_prompt(router_of()), prompts()
    cache = router.new_cache()
    router(x[:, :12], call_at(0, 12, cache))
    cache.advance(12)
    cache.batch_select_indices(torch.tensor([1, 0, 1]))
    got = router(x[[1, 0, 1], 12:13], call_at(12, 1, cache, rows=3))
    parts = [mixer(x, call_at(0, LENGTH))[:, 12] for mixer in router.mixers]
    expected = torch.stack((parts[1][1], parts[0][0], parts[1][1]))
    assert (got[:, 0] - expected).abs().max() < EXACT


@pytest.mark.parametrize("picked", [0, 1])
def test_with_single_the_picked_mixer_alone_is_computed_and_cached(picked: int) -> None:
    both, router = (split_by_the_prompt(router_of(**({"single": True} if one else {}))) for one in (0, 1))
    router.load_state_dict(both.state_dict())
    alike, mixed = prompts()[[picked, picked]], prompts()
    ran: list[int] = []
    for index, mixer in enumerate(router.mixers):
        mixer.register_forward_hook(lambda *_, index=index: ran.append(index))
    for x, expected in ((alike, {picked}), (mixed, {0, 1})):
        ran.clear()
        cache, whole = router.new_cache(), both(x, call_at(0, LENGTH))
        for start, end in ((0, 12), (12, 13), (13, LENGTH)):
            part = router(x[:, start:end], call_at(start, end - start, cache))
            cache.advance(end - start)
            cache.reorder_cache(torch.tensor([0, 1]))
            assert (part - whole[:, start:end]).abs().max() < EXACT
        held = {int(name.split(".")[1]) for name in cache.tensors() if name.startswith("mixers")}
        assert held == expected
        assert set(ran) == expected
    cache.reset()
    assert cache.single is None
    assert torch.equal(router.train()(alike, call_at(0, LENGTH)), both.train()(alike, call_at(0, LENGTH)))


def test_with_single_the_costs_are_those_of_the_first_mixer() -> None:
    site = SpecSite(HIDDEN)
    spec = MIXERS["layer_router"].model_validate({"mixers": [FULL, CHEAP], "router_dim": 4, "single": True})
    first = MIXERS["attention"].model_validate(FULL)
    assert spec.flops(site, 40) == first.flops(site, 40)
    assert spec.state_bytes(site, 40, 4) == first.state_bytes(site, 40, 4) + 2 * 4
    made = router_of(single=True).filled_cache(3, 40, torch.zeros(1))
    assert cache_bytes([made]) == 3 * spec.state_bytes(site, 40 + 1, 4)


def model_of(*targets: float | None, **fields: Any) -> Any:
    """A model of one layer for each target."""
    blocks = {
        f"b{index}": {
            "mixer": {
                "kind": "layer_router",
                "mixers": [FULL, CHEAP],
                "router_dim": 4,
                "target": target,
                "target_factor": 2.0,
                **fields,
            },
            "channel": {"kind": "none"},
        }
        for index, target in enumerate(targets)
    }
    sizes = {"vocab_size": 20, "hidden_size": HIDDEN, "blocks": blocks, "layers": list(blocks)}
    return build(ModelSpec.model_validate(sizes), dtype=torch.float64)


def with_gaps(model: Any, gaps: tuple[float, ...]) -> Any:
    """The model with so much between the logits of each layer's mixers, whatever the prompt."""
    with torch.no_grad():
        for layer, gap in zip(model.model.layers, gaps, strict=True):
            layer.mixer.router.last_bias.copy_(torch.tensor([gap, 0.0]))
    return model


@pytest.mark.parametrize("hard", [False, True])
def test_a_target_holds_for_all_its_layers_together(hard: bool) -> None:
    gaps = (4.0, -2.0, 0.5, 3.0)
    model = with_gaps(model_of(0.5, 0.5, 0.125, None, straight_through=hard), gaps).train()
    ids = torch.arange(40).view(2, 20) % 20
    found = model.model(ids)
    soft = [1 / (1 + torch.tensor(gap).double().exp().item()) for gap in gaps]
    chosen = [float(gap < 0) for gap in gaps]

    def missed(cheap: list[float]) -> list[float]:
        return [((cheap[0] + cheap[1]) / 2 - 0.5) ** 2, (cheap[2] - 0.125) ** 2]

    asked = missed(chosen if hard else soft)
    assert found.aux_loss.item() == pytest.approx(2.0 * sum(asked))
    assert found.aux_losses["layer_router"].item() == pytest.approx(sum(asked) / 2)
    # What is told is what evaluation does, and how far that is from the target.
    assert found.aux_losses["layer_router_share"].item() == 0.25
    assert found.aux_losses["layer_router_missed"].item() == pytest.approx(sum(missed(chosen)) / 2)
    found.aux_loss.backward()
    gradients = [layer.mixer.router.last_bias.grad for layer in model.model.layers]
    # With one of two layers at either mixer half of the choices are what is asked for.
    assert (gradients[0].abs().max() == 0) == hard
    assert gradients[2].abs().min() > 0
    assert gradients[3] is None or gradients[3].abs().max() == 0
    assert model.eval().model(ids).aux_loss is None


def test_with_straight_through_a_target_hears_of_choices_with_the_gradient_of_the_mix() -> None:
    """A router a hair from the middle sends every prompt to one mixer, which a mean of shares does not see."""
    told, gradients = {}, {}
    for hard in (False, True):
        model = with_gaps(model_of(0.5, straight_through=hard), (0.02,)).train()
        found = model.model(torch.arange(40).view(2, 20) % 20)
        found.aux_loss.backward()
        told[hard], gradients[hard] = found.aux_losses, model.model.layers[0].mixer.router.last_bias.grad
    assert told[False]["layer_router"].item() == pytest.approx(2.5e-5, rel=1e-3)
    assert told[True]["layer_router"].item() == 0.25
    for one in told.values():
        assert (one["layer_router_share"].item(), one["layer_router_missed"].item()) == (0.0, 0.25)
    # (share - target)² has a slope of twice what is missed, and the share that of the softmax.
    cheap = 1 / (1 + torch.tensor(0.02).double().exp().item())
    slope = cheap * (1 - cheap)
    for hard, share in ((False, cheap), (True, 0.0)):
        expected = 2.0 * 2 * (share - 0.5) * slope
        assert gradients[hard].tolist() == pytest.approx([-expected, expected])


@pytest.mark.parametrize("hard", [False, True])
def test_training_on_the_target_alone_reaches_it(hard: bool) -> None:
    model, ids = model_of(0.75, 0.75, straight_through=hard).train(), tokens(20, vocabulary=20)
    optimizer, seen = torch.optim.Adam(model.parameters(), lr=0.005), []
    for _ in range(300):
        found = model.model(ids)
        optimizer.zero_grad()
        found.aux_loss.backward()
        optimizer.step()
        seen.append({name: value.item() for name, value in found.aux_losses.items()})
    if not hard:
        assert seen[-1]["layer_router"] < 0.05**2
    else:
        # A router that does not tell prompts apart flickers about it.
        assert sum(one["layer_router_share"] for one in seen[-100:]) / 100 == pytest.approx(0.75, abs=0.05)


def test_a_factor_without_a_target_computes_nothing() -> None:
    def hash_of(**fields: Any) -> str:
        return spec_hash(model_with({"kind": "layer_router", "mixers": [FULL, CHEAP], **fields}, HIDDEN))

    assert hash_of() == hash_of(target_factor=0.5) == hash_of(pool=100)
    assert len({hash_of(), hash_of(target=0.5), hash_of(target=0.5, target_factor=0.5)}) == 3


@pytest.mark.parametrize("choice", [0, 1])
def test_the_example_learns_at_first_by_its_last_weights_alone_and_decodes_by_either_mixer(
    choice: int,
) -> None:
    model, ids = build(load(EXAMPLES["layer_router"]).spec.model), tokens(150)
    routers = [one.mixer.router for one in model.model.layers if isinstance(one.mixer, LayerRouterModule)]
    assert len(routers) == 5
    model.train()(ids, labels=ids).loss.backward()
    # The last layer of a router begins at zeros.
    assert all(router.last_weight.grad.abs().max() > 0 for router in routers)
    # Without a cache the text so far is the prompt, so the decision has to be one that no text changes.
    with torch.no_grad():
        for router in routers:
            router.last_bias.copy_(torch.tensor([1.0 - choice, float(choice)]))
    model.double().eval()
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    texts = [model.generate(ids, use_cache=cached, **options) for cached in (True, False)]
    assert torch.equal(*texts)
