"""First steps of a training in which a mixer that selects reads everything: how they are counted, and what is read in them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from toys import EXACT, call_at, mixer_of, model_with, noise, tokens

from heddle.compose.build import build_causal_lm
from heddle.compose.modules.first_steps import FirstSteps, first_steps
from heddle.compose.train import Recipe, fit
from heddle.specs import ModelSpec

HIDDEN, LENGTH = 12, 23
SELECTION: dict[str, Any] = {"block": 4, "count": 3, "sink": 1, "recent": 1}


def begin(mixer: Any, steps: int = 4) -> None:
    """A training of so many steps, half of them first ones, before its first step."""
    mixer.train().first.before_training(steps)


def test_they_are_a_share_of_the_steps_and_none_without_a_training() -> None:
    first = FirstSteps(0.4)
    first.initialise(0.02)
    assert not first.now()
    first.before_training(10)
    told = []
    for _ in range(7):
        told.append(bool(first.now()))
        first.after_step()
    assert told == [True] * 4 + [False] * 3
    assert list(first.state_dict()) == []
    assert first_steps(None) is first_steps(0.0) is None


def test_a_training_tells_its_steps_and_counts_them() -> None:
    kind = {"kind": "attention", "heads": 2, "selection": SELECTION | {"dense_first": 0.5}}
    model = build_causal_lm(model_with(kind, HIDDEN), seed=0)
    first, seen = model.model.layer_at(0).mixer.first, list[int]()
    recipe = Recipe(tokens=6 * 2 * LENGTH, batch_tokens=2 * LENGTH)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        seen.append(int(first.left))
        return tokens(LENGTH, vocabulary=9, seed=step), tokens(LENGTH, vocabulary=9, seed=step + 1)

    fit(model, batch, recipe)
    # The first batch is drawn before the steps are known.
    assert seen == [0, 2, 1, 0, 0, 0]


@torch.no_grad()
@pytest.mark.parametrize("scores", ["mean", "kernels"])
def test_a_selection_is_dense_in_them_in_training_alone(scores: str) -> None:
    x = noise(2, LENGTH, HIDDEN)
    shape = {"heads": 4, "kv_heads": 2}
    dense = mixer_of(HIDDEN, "attention", **shape)(x, call_at(0, LENGTH))
    how = SELECTION | {"scores": scores}
    chosen = mixer_of(HIDDEN, "attention", **shape, selection=how)(x, call_at(0, LENGTH))
    mixer = mixer_of(HIDDEN, "attention", **shape, selection=how | {"dense_first": 0.5})
    begin(mixer)
    assert (mixer(x, call_at(0, LENGTH)) - dense).abs().max() < EXACT
    assert torch.equal(mixer.eval()(x, call_at(0, LENGTH)), chosen)
    mixer.train()
    for _ in range(2):
        mixer.first.after_step()
    assert torch.equal(mixer(x, call_at(0, LENGTH)), chosen)
    assert (chosen - dense).abs().max() > 1e-3


@torch.no_grad()
def test_who_takes_the_blocks_of_another_layer_does_as_that_one() -> None:
    ids = tokens(LENGTH)

    def hidden(selection: dict[str, Any] | None, source: dict[str, Any] | None) -> Tensor:
        parts = ({"kind": "attention", "heads": 2, "selection": one} for one in (selection, source))
        blocks = {
            name: {"mixer": part, "channel": {"kind": "swiglu"}}
            for name, part in zip("ab", parts, strict=True)
        }
        net = model_of(blocks).train()
        for module in net.modules():
            if isinstance(module, FirstSteps):
                module.before_training(2)
        found: Tensor = net.model(input_ids=ids, use_cache=False).last_hidden_state
        return found

    taken = {"block": 4, "count": 3, "source": "a"}
    assert (hidden(SELECTION | {"dense_first": 1.0}, taken) - hidden(None, None)).abs().max() < EXACT
    assert (hidden(SELECTION, taken) - hidden(None, None)).abs().max() > 1e-3


def model_of(blocks: dict[str, Any]) -> Any:
    data = {"vocab_size": 256, "hidden_size": HIDDEN, "blocks": blocks, "layers": list(blocks)}
    return build_causal_lm(ModelSpec.model_validate(data), seed=0).double()


def routes_of(mixer: Any, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    seen: list[Tensor] = []
    hook = mixer.routes_out.register_forward_hook(lambda _, __, out: seen.append(out))
    call = call_at(0, x.shape[1], rows=len(x))
    mixer(x, call)
    hook.remove()
    return seen[0], {name: value for name, value, _ in call.losses}


PAIR = [
    {"kind": "attention", "heads": 2, "rope": None},
    {"kind": "gated_deltanet", "heads": 2, "head_dim": 4},
]
NAMES = {"nats_l": ("nats_l_share", "nats_l_budget"), "token_router": ("router_share", "router_budget")}
ROUTED: dict[str, dict[str, Any]] = {
    "nats_l": {"heads": 2, "head_dim": 6, "chunk": 4},
    "token_router": {"mixers": PAIR, "chunk": 4},
}


@pytest.mark.parametrize("kind", ROUTED)
def test_a_router_sends_all_to_the_first_in_them_and_still_learns(kind: str) -> None:
    mixer = mixer_of(HIDDEN, kind, **ROUTED[kind], budget=0.25, dense_first=0.5)
    with torch.no_grad():
        mixer.router.weight.normal_(generator=torch.Generator().manual_seed(5))
    x = noise(2, 24, HIDDEN)
    chosen, _ = routes_of(mixer, x)
    assert 0.0 < chosen[..., 0].mean() < 1.0
    begin(mixer)
    first, told = routes_of(mixer, x)
    assert torch.equal(first, torch.tensor([1.0, 0.0], dtype=x.dtype).expand_as(first))
    # The budget is one of what it would choose.
    share, (told_share, told_budget) = chosen[..., 0].mean().item(), NAMES[kind]
    assert told[told_share].item() == pytest.approx(share)
    assert told[told_budget].item() == pytest.approx((share - 0.25) ** 2)
    (gradient,) = torch.autograd.grad(
        (mixer(x, call_at(0, 24)) * noise(2, 24, HIDDEN, seed=3)).sum(), mixer.router.weight
    )
    assert gradient.abs().max() > 1e-6
    assert torch.equal(routes_of(mixer.eval(), x)[0], chosen)
    mixer.train()
    for _ in range(2):
        mixer.first.after_step()
    later, told = routes_of(mixer, x)
    assert torch.equal(later, chosen)
    assert told[told_budget].item() == pytest.approx((share - 0.25) ** 2)


@torch.no_grad()
def test_generation_in_train_mode_is_what_it_is_in_eval_mode() -> None:
    kind = {
        "kind": "attention",
        "heads": 2,
        "selection": SELECTION | {"dense_first": 0.5, "distillation": 0.1},
    }
    model, ids = build_causal_lm(model_with(kind, HIDDEN), seed=0), tokens(LENGTH, vocabulary=9, seed=0)
    expected = model.eval().generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(model.train().generate(ids, max_new_tokens=4, do_sample=False), expected)
