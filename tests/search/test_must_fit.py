"""A search that demands a class of transformers tries nothing that it does not hold, and exports to it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from heddle.compose.plan import plan
from heddle.compose.targets.catalogue import BY_NAME
from heddle.compose.targets.verdict import verdict
from heddle.search.run import search
from heddle.search.workers import Workers
from heddle.specs import loads

SPEC = """
version: 1
name: served
model:
  vocab_size: 256
  hidden_size: 32
  context_length: 256
  blocks:
    full: {{mixer: {{kind: attention, heads: 2, qk_norm: {{choice: [false, true]}}, gate: {{choice: [false, true]}}}},
      channel: {{kind: swiglu, ratio: 1.0}}}}
  layers: [full]
data: {{source: {corpus}, sequence_length: 32}}
train: {{tokens: 2k, batch_tokens: 512}}
search:
  tasks: [text]
  trials: 4
  seed: 1
  sampler: random
  confirm_seeds: 0
  export: {{must_fit: [qwen3]}}
"""


@pytest.mark.slow
def test_what_does_not_fit_is_not_tried(workers: Workers, corpus: Path, tmp_path: Path) -> None:
    assert workers.parallel
    run = search(loads(SPEC.format(corpus=corpus)), tmp_path / "run")
    tried = [trial for trial in run.trials if trial.state == "complete"]
    assert tried
    for trial in tried:
        assert verdict(BY_NAME["qwen3"], plan(loads(trial.spec).spec.model).runtime()).fits
    refused = [trial for trial in run.trials if trial.state != "complete"]
    assert refused
    assert all("target-mismatch" in (trial.reason or "") for trial in refused)
    assert run.export is not None
    assert json.loads((run.export / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]
