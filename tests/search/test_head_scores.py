"""What each head's mixing is worth to a model: against models perturbed by hand, slopes, and who is refused."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from torch import Tensor

from heddle.compose.build import build_causal_lm
from heddle.compose.hf.model import HeddleForCausalLM
from heddle.errors import HeddleError
from heddle.search.evaluators import head_scores
from heddle.specs import loads

SPEC = """
version: 1
name: tiny
model:
  vocab_size: 256
  hidden_size: 32
  context_length: 64
  blocks:
    full: {{mixer: {{kind: attention, heads: 4, kv_heads: 2}}, channel: {{kind: gelu, ratio: 1.0}}}}
    once: {{mixer: {{kind: attention, heads: 2}}, channel: {{kind: none}}, shared: true}}
    linear: {{mixer: {{kind: gla, heads: 2}}, channel: {{kind: gelu, ratio: 1.0}}}}
  layers: [{layers}]
"""
INPUTS = torch.randint(64, (3, 20), generator=torch.Generator().manual_seed(0))


def built(layers: str) -> HeddleForCausalLM:
    model = build_causal_lm(loads(SPEC.format(layers=layers)).spec.model, seed=0).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name:
                parameter.mul_(12.0)
    return model.eval()


@torch.no_grad()
def loss_of(model: HeddleForCausalLM, labels: Tensor = INPUTS) -> float:
    # The model's own loss is float32.
    told = model(input_ids=INPUTS).logits[:, :-1].log_softmax(-1)
    rows = [told[b, t, labels[b, t + 1]] for b in range(3) for t in range(19) if labels[b, t + 1] >= 0]
    return -float(torch.stack(rows).mean())


def test_changes_are_those_of_models_that_are_perturbed_by_hand() -> None:
    model = built("full, linear, full")
    scores = head_scores(model, INPUTS, share=0.5)
    assert scores.layers == (0, 2)
    assert scores.loss == pytest.approx(loss_of(model))
    for place, layer in enumerate(scores.layers):
        point = model.model.layers[layer].mixer.head_mix
        for head in range(4):
            point.share = torch.zeros(4)
            point.share[head] = 0.5
            assert scores.change[place][head] == pytest.approx(loss_of(model) - scores.loss)
        point.share = torch.full((4,), 0.5)
        assert scores.whole[place] == pytest.approx(loss_of(model) - scores.loss)
        point.share = None
    assert all(abs(one) > 1e-6 for layer in scores.change for one in layer)


def test_slopes_are_the_first_order_of_small_changes() -> None:
    model = built("full, full")
    errors = []
    for share in (0.04, 0.02):
        scores = head_scores(model, INPUTS, share=share)
        pairs = zip(scores.change, scores.slope, strict=True)
        left = [change - share * slope for one in pairs for change, slope in zip(*one, strict=True)]
        errors.append(torch.tensor(left).norm() / torch.tensor(scores.change).norm())
    # What is left is of the second order: beside the change it is halved with the share.
    assert errors[0] < 0.1
    assert errors[1] / errors[0] == pytest.approx(0.5, abs=0.05)


def test_a_model_is_left_as_it_was_and_rows_may_come_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model, labels = built("full"), INPUTS.clone()
    labels[0, 5:], labels[2] = -100, -100
    whole = head_scores(model.train(), INPUTS, labels)
    assert model.training
    assert model.model.layers[0].mixer.head_mix.share is None
    assert all(one.grad is None for one in model.parameters())
    assert whole.loss == pytest.approx(loss_of(model.eval(), labels))
    monkeypatch.setattr(import_module("heddle.search.evaluators.head_scores"), "TOKENS_AT_ONCE", 20)
    pieces = head_scores(model, INPUTS, labels)
    assert pieces.loss == pytest.approx(whole.loss)
    for one, other in ((pieces.change, whole.change), (pieces.slope, whole.slope)):
        assert one[0] == pytest.approx(other[0])


def test_a_shared_layer_is_counted_once() -> None:
    scores = head_scores(built("once, linear, once"), INPUTS)
    assert scores.layers == (0,)
    assert len(scores.change[0]) == 2


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(HeddleError, match="no layer of this model has softmax attention"):
        head_scores(built("linear"), INPUTS)
    with pytest.raises(HeddleError, match=r"share 1\.5 is not between 0 and 1"):
        head_scores(built("full"), INPUTS, share=1.5)
