"""What routers learned, layer by layer: of what was scored, in the result, the record and on the trial's page."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest
import torch

from heddle.compose.build import build_causal_lm
from heddle.search.evaluate import Training, train_and_score
from heddle.search.learned_share import learned_shares
from heddle.search.record import score_from
from heddle.search.tasks import make_task, recipe_for
from heddle.specs import MqarTask, loads

SPEC = """
version: 1
name: routed
model:
  vocab_size: 256
  hidden_size: 16
  blocks:
    plain: {mixer: {kind: attention, heads: 2}, channel: {kind: none}}
    tokens: {mixer: {kind: token_router, mixers: [FULL, NEAR]}, channel: {kind: none}}
    prompt: {mixer: {kind: layer_router, mixers: [FULL, NEAR]}, channel: {kind: none}}
    chunks: {mixer: {kind: nats_l, heads: 2, chunk: 4}, channel: {kind: none}}
  layers: [tokens, plain, chunks, tokens, prompt]
train: {tokens: 512, batch_tokens: 256}
"""
SPEC = SPEC.replace("FULL", "{kind: attention, heads: 2}").replace(
    "NEAR", "{kind: attention, heads: 2, window: 4}"
)


def test_each_router_of_each_layer_tells_its_own_share() -> None:
    file = loads(SPEC)
    model = build_causal_lm(file.spec.model, seed=0).eval()
    seen: dict[int, list[float]] = {0: [], 3: []}
    for layer, held in seen.items():
        (router,) = [one for name, one in model.named_modules() if name.endswith(f"layers.{layer}.mixer")]
        router.routes_out.register_forward_hook(
            lambda _, __, m, held=held: held.append(float(m[..., 0].mean()))
        )
    with learned_shares(model) as shares, torch.inference_mode():
        for seed in range(3):
            model(torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(seed)))
    found = dict(shares)
    assert sorted(found) == [0, 2, 3, 4]
    for layer, held in seen.items():
        assert found[layer] == pytest.approx(sum(held) / 3, abs=1e-12)
    # The prompt's router begins at the first mixer, and what can be asked of it is the share of the second.
    assert found[4] == 0.0
    assert found[0] != found[3]


def test_a_share_that_is_no_number_is_told() -> None:
    model = build_causal_lm(loads(SPEC).spec.model, seed=0).eval()
    for name, router in model.named_modules():
        if name.endswith("layers.3.mixer"):
            router.routes_out.register_forward_hook(lambda _, __, routes: routes * torch.nan)
    with learned_shares(model) as shares, torch.inference_mode():
        model(torch.randint(256, (2, 16)))
    assert math.isnan(dict(shares)[3])


def test_nothing_is_watched_afterwards() -> None:
    model = build_causal_lm(loads(SPEC).spec.model, seed=0).eval()
    with learned_shares(model) as shares:
        pass
    assert shares == []
    assert not any(module._forward_hooks for module in model.modules())


def test_the_result_of_a_training_has_the_share_of_each_layer() -> None:
    file = loads(SPEC)
    kind = MqarTask(pairs=2, length=16)
    task = make_task(kind, file.spec.data, vocab_size=256)
    found = train_and_score(Training(file.spec.model, recipe_for(kind, file.spec.train), "cpu"), task).result
    score = score_from(json.loads(json.dumps(found)))
    assert [layer for layer, _ in score.learned_share] == [0, 2, 3, 4]
    assert all(0.0 <= share <= 1.0 for _, share in score.learned_share)
    assert score_from(asdict(score)) == score
