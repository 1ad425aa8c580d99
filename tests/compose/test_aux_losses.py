"""What layers add to the loss in training: told beside the task's loss, equal to its formula, gone in evaluation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from heddle.compose.build import build
from heddle.compose.channel.moe import MoEModule
from heddle.compose.hf.model import HeddleForCausalLM
from heddle.compose.train import Fit, Recipe, fit, labelled_loss
from heddle.search.evaluate import Training, train_and_score
from heddle.search.tasks import make_task
from heddle.search.training import TrainRun, collapsed_routers, load_run, train
from heddle.specs import MqarTask, loads
from heddle.terminal import show_trained

SPEC = """
version: 1
name: routed
model:
  vocab_size: 256
  hidden_size: 16
  blocks:
    routed:
      mixer:
        kind: token_router
        mixers:
          - {{kind: attention, heads: 2}}
          - {{kind: attention, heads: 2, window: 4}}
        budget: 0.25
        budget_factor: 0.5
      channel: {{kind: moe, experts: 4, active: 2, width: 8, balance: {balance}}}
    plain: {{mixer: {{kind: attention, heads: 2}}, channel: {{kind: moe, experts: 4, active: 2, width: 8, balance: {balance}}}}}
  layers: [routed, plain]
data: {{source: {corpus}, sequence_length: 32}}
train: {{tokens: 4096, batch_tokens: 256, learning_rate: 1.0e-2}}
"""
RECIPE = Recipe(tokens=6 * 8 * 16, batch_tokens=8 * 16, learning_rate=1e-2)
NAMES = {"load_balance", "busiest_experts", "router_share", "router_budget"}


def spec_text(balance: float = 0.1, corpus: Path | str = "python-stdlib") -> str:
    return SPEC.format(balance=balance, corpus=corpus)


def model_of(balance: float = 0.1) -> HeddleForCausalLM:
    return build(loads(spec_text(balance)).spec.model, seed=3)


def number(value: Tensor) -> float:
    return value.detach().item()


def batch(step: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(256, (8, 17), generator=torch.Generator().manual_seed(step))
    return ids[:, :-1], ids[:, 1:].clone()


def trained(balance: float = 0.1, **changes: Any) -> tuple[HeddleForCausalLM, Fit]:
    model = model_of(balance)
    return model, fit(model, batch, replace(RECIPE, **changes))


def test_the_curve_of_a_training_is_the_loss_of_the_task_alone() -> None:
    _, result = trained()
    fresh = model_of().train()
    inputs, targets = batch(0)
    logits = fresh(inputs, use_cache=False).logits
    task = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert result.losses[0] == pytest.approx(number(task), rel=1e-6)
    assert number(labelled_loss(fresh, inputs, targets)) == pytest.approx(number(task), rel=1e-6)
    # With labels the model itself gives the sum, as models of transformers do.
    labels = torch.cat((inputs[:, :1], targets), dim=1)[:, : inputs.shape[1]]
    whole = fresh(inputs, labels=labels, use_cache=False)
    added = fresh.model(inputs, use_cache=False).aux_loss
    alone = F.cross_entropy(whole.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert number(whole.loss) == pytest.approx(number(alone + added), rel=1e-6)
    assert added > 0.1


def test_each_auxiliary_loss_is_told_for_each_step_without_its_factor() -> None:
    _, result = trained()
    assert set(result.aux) == NAMES
    assert {len(values) for values in result.aux.values()} == {result.steps}
    told = model_of().train().model(batch(0)[0], use_cache=False).aux_losses
    for name in NAMES:
        assert result.aux[name][0] == pytest.approx(number(told[name]), rel=1e-6)
    # The factor of a loss is no part of what is told, and the share has none.
    assert trained(0.7)[1].aux["load_balance"][0] == result.aux["load_balance"][0]
    assert result.aux["router_budget"][0] == pytest.approx(
        (result.aux["router_share"][0] - 0.25) ** 2, abs=1e-6
    )


def test_what_is_trained_is_the_task_and_every_loss_times_its_factor() -> None:
    model = model_of().double().train()
    seen: list[tuple[MoEModule, Tensor]] = []
    for layer in model.model.layers:
        layer.channel.register_forward_pre_hook(lambda module, given: seen.append((module, given[0])))
    found = model.model(batch(0)[0], use_cache=False)
    values = []
    for module, x in seen:
        s = (x.reshape(-1, 16) @ module.gate.weight.T).softmax(-1)
        f = F.one_hot(s.topk(2).indices, 4).sum((0, 1)) / (2 * len(s))
        values.append(4 * (f.double() * s.mean(0)).sum())
    expected = 0.1 * sum(values) + 0.5 * found.aux_losses["router_budget"]
    assert len(values) == 2
    assert number(found.aux_loss) == pytest.approx(number(expected), rel=1e-6)
    assert number(found.aux_losses["load_balance"]) == pytest.approx(number(sum(values)) / 2, rel=1e-6)
    # A loss of balance reaches the routers, and nothing after the last of them.
    found.aux_loss.backward()
    for module, _ in seen:
        assert module.gate.weight.grad.abs().max() > 0
    assert seen[-1][0].experts.down_proj.grad is None


def test_the_factor_decides_what_is_learned() -> None:
    (one, first), (other, second) = trained(0.0), trained(5.0)
    assert first.losses[0] == second.losses[0]
    assert first.losses[-1] != second.losses[-1]
    assert not torch.equal(one.model.layers[0].channel.gate.weight, other.model.layers[0].channel.gate.weight)


@torch.no_grad()
def test_evaluation_adds_nothing() -> None:
    model = model_of().eval()
    inputs, _ = batch(0)
    found = model.model(inputs)
    assert found.aux_loss is None
    assert found.aux_losses is None
    whole = model(inputs, labels=inputs)
    alone = F.cross_entropy(whole.logits[:, :-1].flatten(0, 1), inputs[:, 1:].flatten())
    assert number(whole.loss) == pytest.approx(number(alone), rel=1e-6)


def test_two_trainings_tell_the_same() -> None:
    (one, first), (other, second) = trained(), trained()
    assert (first.losses, first.aux) == (second.losses, second.aux)
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def gradients(model: HeddleForCausalLM, run: Any) -> dict[str, Tensor]:
    model.zero_grad()
    inputs, _ = batch(1)
    run(input_ids=inputs, labels=inputs, use_cache=False).loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_checkpointed_layers_have_the_same_losses_and_gradients(compiled: bool) -> None:
    model = model_of(2.0).double().train()
    plain = gradients(model, model)
    told = model.model(batch(1)[0], use_cache=False).aux_loss
    model.activation_checkpointing_enable()
    assert torch.equal(model.model(batch(1)[0], use_cache=False).aux_loss, told)
    torch.compiler.reset()
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    again = gradients(model, run)
    torch.compiler.reset()
    assert plain.keys() == again.keys()
    for name, exact in plain.items():
        assert (again[name] - exact).abs().max() < 1e-12, name


def test_a_model_without_auxiliary_losses_tells_none() -> None:
    text = (
        spec_text()
        .replace("layers: [routed, plain]", "layers: [dense]")
        .replace(
            "    plain:", "    dense: {mixer: {kind: attention, heads: 2}, channel: {kind: gelu}}\n    plain:"
        )
    )
    assert fit(build(loads(text).spec.model), batch, RECIPE).aux == {}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TrainRun:
    folder = tmp_path_factory.mktemp("aux")
    corpus = folder / "corpus.txt"
    corpus.write_text("".join(f"line {number} of {number * 7919 % 1000}\n" for number in range(3000)))
    return train(loads(spec_text(corpus=corpus)), folder / "run", device="cpu")


def test_a_training_run_keeps_the_auxiliary_losses(run: TrainRun) -> None:
    assert set(run.aux) == NAMES
    assert all(len(values) == len(run.losses) == 16 for values in run.aux.values())
    assert load_run(run.path).aux == run.aux
    assert all(value >= 0.99 for value in run.aux["load_balance"])


def test_a_run_of_an_older_version_has_none(run: TrainRun, tmp_path: Path) -> None:
    record = json.loads((run.path / "train.json").read_text())
    del record["aux"]
    (tmp_path / "train.json").write_text(json.dumps(record))
    assert load_run(tmp_path).aux == {}
    assert load_run(tmp_path).warnings == []


def test_a_record_of_a_search_keeps_them_thinned() -> None:
    spec = loads(spec_text()).spec
    task = make_task(MqarTask(pairs=2, length=16), spec.data, vocab_size=256)
    recipe = replace(RECIPE, tokens=100 * 128)
    result = train_and_score(Training(spec.model, recipe, "cpu"), task).result
    assert set(result["aux"]) == NAMES
    assert {len(curve) for curve in result["aux"].values()} == {len(result["losses"])}
    json.dumps(result, allow_nan=False)


def test_a_router_that_has_collapsed_is_told_once(run: TrainRun, capsys: pytest.CaptureFixture[str]) -> None:
    even, gone = [0.5] * 20, [0.5] * 10 + [0.99] * 10
    assert collapsed_routers({"busiest_experts": even, "router_share": even}) == []
    (line,) = collapsed_routers({"busiest_experts": gone})
    assert line.startswith("the experts' router has collapsed: 99% of the choices")
    (line,) = collapsed_routers({"router_share": [1 - one for one in gone]})
    assert "99% of the tokens go to the second mixer" in line
    for name, told in (
        ("layer_router_share", "a layer router has collapsed: 99% of the prompts go to the second mixer"),
        ("busiest_heads", "a router of heads has collapsed: 99% of the choices"),
        ("largest_cluster", "the clusters of routing have collapsed: 99% of the tokens"),
    ):
        (line,) = collapsed_routers({name: gone})
        assert line.startswith(told)
        assert collapsed_routers({name: even}) == []
    # A layer router that has not left its start of 99 % is told of like one that came back to it.
    (line,) = collapsed_routers({"layer_router_share": [0.01] * 20})
    assert "99% of the prompts go to the first mixer" in line
    assert (
        len(collapsed_routers(dict.fromkeys(("busiest_heads", "busiest_experts", "router_share"), gone))) == 3
    )
    # What was over by the end is none.
    assert collapsed_routers({"busiest_experts": gone[::-1]}) == []
    record = {**run.record, "aux": {"busiest_experts": gone}}
    show_trained(TrainRun(run.path, record))
    assert capsys.readouterr().out.count("warning: the experts' router has collapsed") == 1
    show_trained(run)
    assert "collapsed" not in capsys.readouterr().out


NAMES_OF_SHARES = [
    ("router_share", "router_budget", "99% of the tokens go to the first mixer"),
    ("nats_l_share", "nats_l_budget", "the router of nats_l has collapsed: 99% of the chunks go to softmax attention"),
    ("layer_router_share", "layer_router_missed", "99% of the prompts go to the second mixer"),
    ("layer_router_share", "layer_router", "99% of the prompts go to the second mixer"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "missed", "told"), NAMES_OF_SHARES)
def test_what_was_asked_for_is_no_collapse_where_it_came(name: str, missed: str, told: str) -> None:
    gone, none = [0.99] * 20, [0.0] * 20
    assert collapsed_routers({name: gone, missed: [(0.99 - 0.97) ** 2] * 20}) == []
    assert collapsed_routers({name: none, missed: none}) == []
    # Nothing was asked for, or something else.
    for asked in ({}, {missed: [(0.99 - 0.25) ** 2] * 20}, {missed: [(0.99 - 0.93) ** 2] * 20}):
        (line,) = collapsed_routers({name: gone, **asked})
        assert told in line
    assert len(collapsed_routers({name: none, missed: [0.25**2] * 20})) == 1


def test_a_layer_router_that_keeps_its_target_in_the_mean_alone_has_collapsed() -> None:
    """Soft in training: the mix has the share that was asked for, and evaluation sends all prompts to one mixer."""
    whole, none = [1.0] * 20, [0.0] * 20
    soft = {"layer_router_share": whole, "layer_router": none, "layer_router_missed": [0.25**2] * 20}
    assert len(collapsed_routers(soft)) == 1
    assert collapsed_routers(soft | {"layer_router": [0.4] * 20, "layer_router_missed": none}) == []


@pytest.mark.gpu
def test_a_captured_step_tells_them_like_an_eager_one() -> None:
    def on_cuda(step: int) -> tuple[Tensor, Tensor]:
        inputs, targets = batch(step)
        return inputs.cuda(), targets.cuda()

    for precision in ("float32", "bfloat16"):
        recipe = replace(RECIPE, tokens=20 * 128, precision=precision)
        eager = fit(model_of().cuda(), on_cuda, recipe)
        graph = fit(model_of().cuda(), on_cuda, recipe, launch="graph")
        assert set(graph.aux) == NAMES
        for name in ("load_balance", "router_share"):
            torch.testing.assert_close(
                torch.tensor(graph.aux[name]), torch.tensor(eager.aux[name]), rtol=0.05, atol=0.02
            )
        torch.testing.assert_close(
            torch.tensor(graph.losses), torch.tensor(eager.losses), rtol=0.01, atol=0.01
        )
