"""Stacked models whose kinds of layers are compiled once: the numbers are those of the models themselves."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from heddle.compose import train_layers
from heddle.compose.build import build_causal_lm
from heddle.compose.hf.model import HeddleForCausalLM
from heddle.compose.train import Fit, Recipe
from heddle.compose.train_many import fit_many
from heddle.specs import loads

# The compiler looks at the gradients of what it is given, also where there are none.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

ROWS, LENGTH, VOCAB = 4, 16, 256
RECIPE = Recipe(tokens=4 * ROWS * LENGTH, batch_tokens=ROWS * LENGTH)
SPEC = """
version: 1
name: stacked
model:
  vocab_size: 256
  hidden_size: 16
  tie_embeddings: {tied}
  blocks:
    full: {{mixer: {{kind: attention, heads: 2}}, channel: {{kind: swiglu, ratio: 2.0}}}}
    linear: {{mixer: {{kind: gated_deltanet, heads: 2, head_dim: 8, value_dim: 8}}, channel: {{kind: swiglu, ratio: 2.0}}}}
  layers: [linear, full, linear]
"""


@pytest.fixture(autouse=True)
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the compiler traces, run as it is: making C++ of it takes minutes."""
    monkeypatch.setattr(train_layers, "BACKEND", "eager")
    train_layers._layer.cache_clear()
    yield
    train_layers._layer.cache_clear()


def models(tied: bool) -> list[HeddleForCausalLM]:
    spec = loads(SPEC.format(tied=str(tied).lower())).spec.model
    return [build_causal_lm(spec, seed=seed) for seed in range(2)]


def drawn(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randint(VOCAB, (ROWS, LENGTH), generator=generator)
    return inputs, inputs.roll(1, dims=1)


@pytest.mark.parametrize("tied", [False, True])
def test_compiled_layers_train_as_the_models_do(tied: bool) -> None:
    usual, compiled = (
        fit_many(models(tied), [drawn] * 2, [RECIPE] * 2, compiled=way) for way in (False, True)
    )
    for one, other in zip(usual, compiled, strict=True):
        assert isinstance(one, Fit)
        assert isinstance(other, Fit)
        assert one.losses == pytest.approx(other.losses, rel=1e-5)


def test_a_kind_of_layer_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []

    def counted(module: GraphModule, inputs: list[Tensor]) -> GraphModule:  # noqa: ARG001
        graphs.append(module)
        return module

    monkeypatch.setattr(train_layers, "BACKEND", counted)
    for cached in (train_layers._embedding, train_layers._ending, train_layers.compiled_pointwise):
        cached.cache_clear()
    for layers in ("[linear, full, linear]", "[linear, linear, linear]", "[full, full, linear]"):
        text = SPEC.format(tied="true").replace("[linear, full, linear]", layers)
        fit_many([build_causal_lm(loads(text).spec.model)], [drawn], [RECIPE], compiled=True)
    assert train_layers._layer.cache_info().misses == 2
    # Two kinds of layers, the embedding, the losses and the optimizer.
    assert len(graphs) == 5


def test_layers_that_take_from_each_other_are_refused() -> None:
    text = SPEC.format(tied="true").replace(
        "channel: {kind: swiglu, ratio: 2.0}}\n  layers", "channel: {kind: gelu}, shared: true}\n  layers"
    )
    with pytest.raises(AssertionError, match="not alone"):
        fit_many([build_causal_lm(loads(text).spec.model)], [drawn], [RECIPE], compiled=True)


def halved_first(step: int) -> tuple[Tensor, Tensor]:
    inputs, targets = drawn(step)
    return (
        (inputs.reshape(-1, LENGTH // 2), targets.reshape(-1, LENGTH // 2)) if step < 2 else (inputs, targets)
    )


def test_batches_may_change_their_shape() -> None:
    usual, compiled = (
        fit_many(models(False), [halved_first] * 2, [RECIPE] * 2, compiled=way) for way in (False, True)
    )
    for one, other in zip(usual, compiled, strict=True):
        assert isinstance(one, Fit)
        assert isinstance(other, Fit)
        torch.testing.assert_close(one.losses, other.losses)
