"""Which layers of a trained model choose blocks and which take them over, solved from its own attention."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from heddle import api
from heddle.errors import HeddleError
from heddle.search.evaluators import Blocks
from heddle.search.record import Run
from heddle.search.reuse_policy import reuse_policy
from heddle.search.training import TrainRun, train
from heddle.specs import loads, spec_hash, to_yaml
from heddle.specs.pattern import layers_of
from heddle.specs.references import links

SPEC = """
version: 1
name: dense
model:
  vocab_size: 256
  hidden_size: 32
  context_length: 256
  blocks:
    full: {{mixer: {{kind: attention, heads: 2}}, channel: {{kind: gelu, ratio: 1.0}}}}
    near: {{mixer: {{kind: attention, heads: 2, window: 8}}, channel: {{kind: none}}}}
  layers: [full, near, {{repeat: 4, pattern: [full]}}]
data: {{source: {corpus}, sequence_length: 64}}
train: {{tokens: 4096, batch_tokens: 512, learning_rate: 3.0e-3}}
"""
BLOCKS = Blocks(size=4, top=5, sink=4, recent=8)


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainRun:
    return train(loads(SPEC.format(corpus=corpus)), tmp_path_factory.mktemp("dense") / "run")


def test_a_training_becomes_a_model_whose_layers_take_from_their_sources(trained: TrainRun) -> None:
    found = api.reuse_policy(trained.path, full=1, resets=3, blocks=BLOCKS, sequences=2)
    # The window stays as it is, the layer of the widest attention reads all.
    assert found.layers == (0, 2, 3, 4, 5)
    coverage = [found.profile.coverage[found.profile.layers.index(layer)] for layer in found.layers]
    assert found.policy.roles.index("full") == coverage.index(max(coverage))
    assert found.policy.roles.count("full") == 1
    assert found.policy.resets <= 3
    taken = {link.layer: link.source for link in links(layers_of(found.model))}
    assert taken == {
        found.layers[layer]: found.layers[source]
        for layer, source in enumerate(found.policy.sources)
        if source >= 0
    }
    # It is a spec that can be written, and has the trained weights.
    spec = trained.spec_file().spec.model_copy(update={"model": found.model})
    assert spec_hash(loads(to_yaml(spec)).spec.model) == spec_hash(found.model)
    held, made = trained.model().state_dict(), found.network.state_dict()
    assert all(torch.equal(made[name], tensor) for name, tensor in held.items())


def test_blocks_that_are_all_read_leave_the_model_as_it_was(trained: TrainRun) -> None:
    inputs = torch.randint(256, (2, 40), generator=torch.Generator().manual_seed(0))
    all_read = reuse_policy(trained.path, inputs, resets=2, blocks=Blocks(size=4, top=10, sink=4, recent=4))
    fewer = reuse_policy(trained.path, inputs, resets=2, blocks=Blocks(size=4, top=3, sink=4, recent=4))
    with torch.no_grad():
        dense, same, other = (
            net(input_ids=inputs, use_cache=False).logits
            for net in (trained.model(), all_read.network, fewer.network)
        )
    torch.testing.assert_close(same, dense)
    assert not torch.allclose(other, dense)


def test_blocks_that_no_selection_reads_are_refused(trained: TrainRun) -> None:
    with pytest.raises(HeddleError, match="not whole blocks of 16") as caught:
        reuse_policy(trained.path, blocks=Blocks(size=16, top=4, sink=8, recent=16))
    assert caught.value.code == "bad-argument"
    with pytest.raises(HeddleError, match="0 resets are asked for") as caught:
        reuse_policy(trained.path, resets=0, blocks=BLOCKS)
    assert caught.value.code == "nothing-feasible"


def test_the_winner_of_a_search_has_a_policy(tiny_run: Run) -> None:
    found = reuse_policy(tiny_run.path, full=0, resets=1, blocks=Blocks(size=4, top=3, sink=4, recent=4))
    best = tiny_run.best_trial
    assert best is not None
    assert found.layers == tuple(layer for layer, block in enumerate(best.layers) if block == "full")
    assert set(found.policy.roles) <= {"select", "reuse"}
