"""Encoders that were trained come back from transformers, by its Auto classes and without heddle, as they were."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from toys import tokens
from transformers import AutoModel

from heddle.search.export import export_run
from heddle.search.training import train
from heddle.specs import loads

# A layer of each kind that sees both sides; of `film` the last frame of 40 tokens is a third there.
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
    film:
      channel: {{kind: none}}
      mixer: {{kind: attention, heads: 2, causal: false, boundary: inward, grid: {{width: 6, height: 2, frame_window: 2}}}}
    tree: {{mixer: {{kind: hierarchical_attention, heads: 2, branching: 4}}, channel: {{kind: none}}}}
    means: {{mixer: {{kind: inline, heads: 2, causal: false, local: 3}}, channel: {{kind: none}}}}
    image: {{mixer: {{kind: contmix, heads: 2, taps: 3, summaries: 1, grid: {{width: 8}}}}, channel: {{kind: none}}}}
  layers: [near, film, tree, means, image, full]
data: {{source: {corpus}, sequence_length: 32}}
train: {{tokens: 4096, batch_tokens: 512, learning_rate: 1.0e-2}}
"""
EP = "  readout: {kind: ep, classes: 256, queries: 8}"


@pytest.mark.slow
@pytest.mark.usefixtures("_own_module_cache")
@pytest.mark.parametrize(
    ("kind", "readout"),
    [pytest.param("MaskedLM", "", marks=pytest.mark.long), ("SequenceClassification", EP)],
)
def test_a_trained_encoder_comes_back_as_it_was(kind: str, readout: str, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("".join(f"line {number} of {number * 7919 % 1000}\n" for number in range(3000)))
    run = train(loads(SPEC.format(readout=readout, corpus=corpus)), tmp_path / "run", device="cpu")
    result = export_run(run.path, tmp_path / f"a trained {kind}", battery="none")
    ours, ids = run.model(), tokens(40)
    auto = getattr(transformers, f"AutoModelFor{kind}")
    theirs = auto.from_pretrained(result.path, trust_remote_code=True).eval()
    bare = AutoModel.from_pretrained(result.path, trust_remote_code=True).eval()
    assert type(theirs).__module__.startswith("transformers_modules")
    padded = torch.ones_like(ids)
    padded[0, :7] = 0
    with torch.no_grad():
        for mask in (None, padded):
            shown = ... if mask is None or readout else mask.bool()
            got, expected = (one(ids, attention_mask=mask).logits[shown] for one in (theirs, ours))
            assert torch.allclose(got, expected, rtol=0, atol=1e-5)
            real = padded.bool() if mask is not None else torch.ones_like(padded).bool()
            got, expected = (
                one(ids, attention_mask=mask, use_cache=False).last_hidden_state[real]
                for one in (bare, ours.model)
            )
            assert torch.allclose(got, expected, rtol=0, atol=1e-5)
