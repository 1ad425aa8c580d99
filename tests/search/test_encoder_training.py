"""Encoders from a spec file on: trained on masked text, read back, and searched."""

from __future__ import annotations

from pathlib import Path

import pytest
from predicted_search import QUICK

from heddle.errors import HeddleError
from heddle.search.export import trained_model
from heddle.search.run import search
from heddle.search.tasks import task_of
from heddle.search.training import TrainRun, train
from heddle.search.workers import Workers
from heddle.specs import MaskedBytesTask, loads

SPEC = """
version: 1
name: small
model:
  kind: encoder
  vocab_size: 256
  hidden_size: 32
  context_length: 64
{readout}
  blocks:
    full: {{mixer: {{kind: attention, heads: 2, causal: false}}, channel: {{kind: gelu, ratio: 1.0}}}}
    near: {{mixer: {{kind: attention, heads: 2, causal: false, window: 4, boundary: inward}}, channel: {{kind: none}}}}
    tree: {{mixer: {{kind: hierarchical_attention, heads: 2, branching: 4}}, channel: {{kind: none}}}}
    means: {{mixer: {{kind: inline, heads: 2, causal: false, local: 3}}, channel: {{kind: none}}}}
  layers: {layers}
data: {{source: {corpus}, sequence_length: 32}}
train: {{tokens: 8192, batch_tokens: 512, learning_rate: 1.0e-2}}
"""
ALL = "[near, tree, means, full]"
READOUT = "  readout: {kind: ep, classes: 256, queries: 8}"
SEARCH = """
search:
  tasks: [{paragraph_topic: {tokens: 4k}}, masked_bytes]
  trials: 2
  round: 2
  confirm_seeds: 0
  budgets: [{prefill_ms: {at_most: 1.0e6, relative_to: all-full, batch: 1, context: 32}}]
"""


def text_of(corpus: Path, *, readout: str = READOUT, layers: str = ALL) -> str:
    return SPEC.format(corpus=corpus, readout=readout, layers=layers)


@pytest.fixture(scope="module", params=["masked", "ep"])
def run(request: pytest.FixtureRequest, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainRun:
    readout = READOUT if request.param == "ep" else ""
    file = loads(text_of(corpus, readout=readout))
    return train(file, tmp_path_factory.mktemp("runs") / "run", device="cpu")


def test_an_encoder_is_trained_on_masked_text_and_read_back(run: TrainRun) -> None:
    spec = run.spec_file().spec
    assert run.record["task"]["name"] == "masked_bytes"
    assert run.losses[-1] < 0.8 * run.losses[0]
    task = task_of(MaskedBytesTask(), spec)
    assert task.digest == run.record["task"]["digest"]
    assert task.evaluate(run.model(), device="cpu").value == pytest.approx(run.score.value, abs=1e-6)
    with pytest.raises(HeddleError, match="a causal language model is needed") as told:
        trained_model(run.path)
    assert told.value.code == "bad-argument"


def test_a_readout_that_cannot_name_every_byte_is_refused_at_its_line(corpus: Path, tmp_path: Path) -> None:
    file = loads(text_of(corpus, readout=READOUT.replace("256", "10")), file="a.yaml")
    with pytest.raises(HeddleError, match="this readout tells 10 classes apart") as told:
        train(file, tmp_path / "run", device="cpu")
    assert (told.value.code, told.value.where.path) == ("conflicting-fields", "model.readout.classes")
    assert told.value.where.line == 9
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_a_search_of_encoders_ends_with_a_winner_and_its_export(
    corpus: Path, workers: Workers, tmp_path: Path
) -> None:
    assert workers.parallel
    layers = "{placement: {length: 2, of: [tree, full], count: {full: {int: [0, 1]}}}}"
    file = loads(text_of(corpus, layers=layers) + SEARCH, file="a.yaml")
    found = search(file, tmp_path / "run", effort=QUICK)
    assert found.best_trial is not None
    assert set(found.best_trial.scores) == {"paragraph_topic", "masked_bytes"}
    assert found.meta["exported"] == "masked_bytes"
    assert list(found.best_trial.latency) == ["prefill_ms@1x32"]
    assert (tmp_path / "run" / "best" / "export" / "modeling_heddle_encoder.py").is_file()
