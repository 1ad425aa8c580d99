"""A search that demands a class of transformers tries nothing that it does not hold, and exports to it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from heddle.compose.plan import plan
from heddle.compose.targets.catalogue import BY_NAME
from heddle.compose.targets.verdict import verdict
from heddle.errors import HeddleError
from heddle.search.record import RUN_FILE
from heddle.search.run import search
from heddle.search.workers import Workers
from heddle.specs import loads

HEAD = """
version: 1
name: served
model:
  vocab_size: 256
  hidden_size: 32
  context_length: 256
"""
SPEC = (
    HEAD
    + """
  blocks:
    full:
      mixer:
        choice:
          - {{kind: retnet, heads: 2}}
          - {{kind: attention, heads: 2, qk_norm: {{choice: [false, true]}}, gate: {{choice: [false, true]}}}}
      channel: {{kind: swiglu, width: {{choice: [16, 32, 48]}}}}
    linear: {{mixer: {{kind: gated_deltanet, heads: 2}}, channel: {{kind: swiglu, ratio: 1.0}}}}
  layers: {{placement: {{length: 2, of: [full, linear], count: {{full: {{int: [1, 2]}}}}}}}}
data: {{source: {corpus}, sequence_length: 32}}
train: {{tokens: 2k, batch_tokens: 512}}
search:
  tasks: [text]
  trials: 3
  seed: 1
  sampler: random
  confirm_seeds: 0
  export: {{must_fit: [qwen3]}}
"""
)
# All windows of the class are equal: which pairs are is not known before they are drawn.
PAIRS = (
    HEAD
    + """
  blocks:
    near:
      mixer: {choice: [{kind: retnet, heads: 2}, {kind: attention, heads: 2, qk_norm: true, window: {int: [4, 25]}}]}
      channel: {kind: swiglu, ratio: 1.0}
    far: {mixer: {kind: attention, heads: 2, qk_norm: true, window: {int: [4, 25]}}, channel: {kind: swiglu, ratio: 1.0}}
  layers: [near, far]
search:
  {tasks: [{mqar: {pairs: 2, length: 16}}], trials: 4, seed: 1, sampler: random, confirm_seeds: 0, export: {must_fit: [qwen3]}}
"""
)
SERVED = (
    HEAD
    + """
  blocks:
    full:
      mixer: {{kind: attention, heads: 2, qk_norm: true, gate: {{choice: [false, true]}}, window: {{choice: [null, 8]}}}}
      channel: {{kind: swiglu, width: {{choice: [16, 32]}}}}
    linear: {{mixer: {{kind: gated_deltanet, heads: 2}}, channel: {{kind: swiglu, width: {{choice: [16, 32]}}}}}}
  layers: [linear, full]
data: {{source: {corpus}, sequence_length: 32}}
train: {{tokens: 2k, batch_tokens: 512}}
search: {{tasks: [text], trials: 2, seed: 1, sampler: random, confirm_seeds: 0, export: {{must_fit: [sglang, vllm]}}}}
"""
)


@pytest.mark.slow
def test_what_a_server_does_not_take_is_not_proposed(workers: Workers, corpus: Path, tmp_path: Path) -> None:
    assert workers.parallel
    run = search(loads(SERVED.format(corpus=corpus)), tmp_path / "run")
    for trial in run.trials:
        assert trial.params["blocks.full.mixer.gate"] is True
        assert trial.params["blocks.full.mixer.window"] is None
        fits = trial.params["blocks.full.channel.width"] == trial.params["blocks.linear.channel.width"]
        assert (trial.state == "complete") == fits
        assert fits or "channel.width: is" in (trial.reason or "")
    assert run.export is not None
    assert json.loads((run.export / "config.json").read_text())["architectures"] == ["Qwen3_5ForCausalLM"]


@pytest.mark.slow
def test_what_does_not_fit_is_not_proposed(workers: Workers, corpus: Path, tmp_path: Path) -> None:
    assert workers.parallel
    file = loads(SPEC.format(corpus=corpus))
    run = search(file, tmp_path / "run")
    assert [trial.state for trial in run.trials] == ["complete"] * 3
    for trial in run.trials:
        assert verdict(BY_NAME["qwen3"], plan(loads(trial.spec).spec.model).runtime()).fits
        assert trial.layers == ("full", "full")
        assert trial.params["blocks.full.mixer"]["kind"] == "attention"
    assert run.export is not None
    assert json.loads((run.export / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]


@pytest.mark.slow
def test_what_is_drawn_and_does_not_fit_is_refused(workers: Workers, tmp_path: Path) -> None:
    assert workers.parallel
    file = loads(PAIRS)
    run = search(file, tmp_path / "run")
    refused = [trial for trial in run.trials if trial.state != "complete"]
    assert refused
    assert all("target-mismatch" in (trial.reason or "") for trial in refused)
    # No trial has the other kind, which no block alone can be; a run that goes on is cut in the same way.
    more = search(file, tmp_path / "run", trials=5, resume=True)
    assert more.trials[:4] == run.trials
    assert {trial.params["blocks.near.mixer"]["kind"] for trial in more.trials} == {"attention"}
    meta = json.loads((tmp_path / "run" / RUN_FILE).read_text())
    meta["lock"]["cut"] = "another"
    (tmp_path / "run" / RUN_FILE).write_text(json.dumps(meta))
    with pytest.raises(HeddleError, match="cut of its space"):
        search(file, tmp_path / "run", resume=True)
