"""Falcon-H1's factors of projections become factors of weights on import."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from native_specs import model_spec, ready, written

from heddle.compose.hf.load_native import read_native
from heddle.compose.hf.verify import rounded_apart
from heddle.specs import spec_hash

FACTORS = {
    "attention_in_multiplier": 0.7,
    "ssm_in_multiplier": 1.3,
    "mlp_multipliers": [0.6, 1.7],
    "ssm_multipliers": [0.35, 1.25, 0.5, 0.75, 1.5],
}


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
# The second has biases on the projections of Mamba-2.
@pytest.mark.parametrize("seed", [0, 2])
def test_factors_of_projections_are_read_into_the_weights(seed: int, tmp_path: Path) -> None:
    spec = model_spec("falcon_h1", seed)
    folder = written(ready(spec, seed), "falcon_h1", tmp_path / "out")
    plain = read_native(folder, name="plain")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | FACTORS))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = read_native(folder, name="scaled")
    ids = torch.randint(256, (2, 70), generator=torch.Generator().manual_seed(seed))
    expected = found.model(ids).logits
    error, allowed = rounded_apart(
        found.model, {"ids": ids}, {"ids": theirs(ids, use_cache=False).logits}, {"ids": expected}
    )
    assert error <= allowed
    # The factors matter, and the spec is the one without them.
    assert (expected - plain.model(ids).logits).abs().max() > 0.01
    assert spec_hash(found.spec.model) == spec_hash(spec)
