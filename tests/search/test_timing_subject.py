"""What is timed: models with routers read a task's tokens, at the end with the weights that the search trained."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from heddle.compose.build import build_causal_lm
from heddle.search.latency import Effort, Place, measure
from heddle.search.record import Run, read_run
from heddle.search.results import Latency
from heddle.search.run import search
from heddle.search.tasks import make_task
from heddle.search.timing_subject import Subject, routes, subject_of, task_ids
from heddle.search.training import weights_of
from heddle.search.workers import Workers
from heddle.specs import MqarTask, loads

QUICK = Effort(warmup=1, least=2, most=2, seconds=0.1, builds=1)
PLAIN = "{kind: attention, heads: 2}"
NEAR = "{kind: attention, heads: 2, window: 4}"
SPEC = """
version: 1
name: routed
model:
  vocab_size: 256
  hidden_size: 16
  context_length: 64
  blocks:
    plain: {mixer: PLAIN, channel: {kind: none}}
    tokens: {mixer: MIXER, channel: CHANNEL}
  layers: [plain, tokens]
"""
ROUTER = f"{{kind: token_router, mixers: [{PLAIN}, {NEAR}]}}"
CHOOSING = [
    (ROUTER, "{kind: none}"),
    (f"{{kind: layer_router, mixers: [{PLAIN}, {NEAR}]}}", "{kind: none}"),
    (f"{{kind: moh, mixer: {PLAIN}, active: 1, shared_heads: 0}}", "{kind: none}"),
    ("{kind: nats_l, heads: 2, chunk: 4}", "{kind: none}"),
    ("{kind: routing, heads: 2, clusters: 2}", "{kind: none}"),
    ("{kind: attention, heads: 2, selection: {block: 4, count: 3}}", "{kind: none}"),
    (f"{{kind: parallel, mixers: [{PLAIN}, {ROUTER}]}}", "{kind: none}"),
    (PLAIN, "{kind: moe, experts: 2, active: 1, normalise: false}"),
]


def spec(mixer: str = ROUTER, channel: str = "{kind: none}") -> str:
    return SPEC.replace("MIXER", mixer).replace("CHANNEL", channel).replace("PLAIN", PLAIN)


@pytest.mark.parametrize(("mixer", "channel"), CHOOSING)
def test_what_chooses_by_what_tokens_say_is_known(mixer: str, channel: str) -> None:
    assert routes(loads(spec(mixer, channel)).spec.model)


def test_what_does_not_choose_reads_random_tokens() -> None:
    model = loads(spec(PLAIN)).spec.model
    assert not routes(model)
    row = measure(model, Place("prefill", 1, 16), device="cpu", effort=QUICK, ids=mqar_ids())
    assert (row.inputs, row.weights, row.learned_share) == ("random", "fresh", [])


def mqar_ids() -> np.ndarray:
    return task_ids(make_task(MqarTask(pairs=2, length=16), loads(spec()).spec.data, vocab_size=256))


def test_rows_begin_with_other_sequences_and_go_on_to_the_length_asked_for() -> None:
    ids = np.arange(12, dtype=np.int32).reshape(3, 4)
    told = Subject(loads(spec()).spec.model, ids).tokens(4, 15)
    assert told.dtype == torch.int64
    assert told[0].tolist() == [*range(12), 0, 1, 2]
    assert told[1].tolist() == [*range(4, 12), *range(7)]
    assert told[3].tolist() == told[0].tolist()


def test_a_reference_that_does_not_know_the_tokens_reads_random_ones() -> None:
    model = loads(spec()).spec.model
    assert subject_of(model, mqar_ids()).inputs_told == "task"
    assert subject_of(model, mqar_ids() + 256).inputs_told == "random"
    assert subject_of(model, None).inputs_told == "random"


def leaning(towards: int) -> bytes:
    """Weights with which all tokens go to one mixer of the router."""
    model = build_causal_lm(loads(spec()).spec.model, seed=0)
    (router,) = [one for one in model.modules() if hasattr(one, "routes_out")]
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 4.0
        for layer in model.model.layers:
            for name, held in layer.named_parameters():
                if "norm" in name:
                    held.fill_(1.0)
        router.router.weight.zero_()
        router.router.weight[towards, 0] = 8.0
    return save(weights_of(model))


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_the_share_that_a_router_learned_is_the_one_that_is_timed(phase: str) -> None:
    model, place = loads(spec()).spec.model, Place(phase, 2, 16)
    found = [
        measure(model, place, leaning(towards), device="cpu", effort=QUICK, ids=mqar_ids())
        for towards in (0, 1)
    ]
    assert [row.learned_share for row in found] == [[[1.0, 1.0]], [[1.0, 0.0]]]
    assert {(row.inputs, row.weights) for row in found} == {("task", "trained")}


def test_weights_of_another_model_are_refused() -> None:
    other = loads(spec(PLAIN)).spec.model
    weights = save({"model.none": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="have no"):
        measure(other, Place("prefill", 1, 8), weights, device="cpu", effort=QUICK)


def test_rows_of_before_are_read_as_random_and_fresh() -> None:
    row = asdict(measure(loads(spec(PLAIN)).spec.model, Place("prefill", 1, 8), device="cpu", effort=QUICK))
    old = {name: held for name, held in row.items() if name not in ("inputs", "weights", "learned_share")}
    assert Latency(**old) == Latency(**row)


SEARCH = """
data: {{source: {corpus}, sequence_length: 32}}
train: {{tokens: 2k, batch_tokens: 512, learning_rate: 3.0e-3}}
search:
  tasks: [text]
  trials: 2
  round: 2
  confirm_seeds: 0
  budgets: [{{decode_ms: {{at_most: 1.0e6, batch: 1, context: 32}}}}]
"""


@pytest.fixture(scope="module")
def routed_run(workers: Workers, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A search over a routed and a plain layer."""
    assert workers.parallel
    open_ = spec().replace(
        "layers: [plain, tokens]", "layers: {placement: {length: 2, of: [plain, tokens], count: {tokens: 1}}}"
    )
    file = loads(open_ + SEARCH.format(corpus=corpus), file="routed.yaml")
    return search(file, tmp_path_factory.mktemp("routed") / "run", effort=QUICK)


@pytest.mark.slow
def test_a_search_times_its_front_with_trained_weights_at_their_learned_share(routed_run: Run) -> None:
    timed = [row for trial in routed_run.trials for row in trial.latency.values()]
    assert {(row.inputs, row.weights) for row in timed} == {("task", "fresh")}
    for trial in routed_run.front_trials:
        assert trial.remeasured
        for row in trial.remeasured.values():
            assert (row.inputs, row.weights) == ("task", "trained")
            assert [layer for layer, _ in row.learned_share] == [float(trial.layers.index("tokens"))]
    again = read_run(routed_run.path)
    assert [trial.remeasured for trial in again.trials] == [trial.remeasured for trial in routed_run.trials]
