"""A hybrid with every form of layer under a compiler: with padding, from a cache, and in training.

That each kind of mixer compiles by itself is held by tests/contracts, that each example does by test_examples.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from toys import checkpoint, gradients, in_pieces, shaken
from toys import tokens as ids_of

from heddle.compose.build import build
from heddle.compose.channel.moe import MoEModule
from heddle.compose.hf.model import HeddleForCausalLM
from heddle.specs import ModelSpec

GLU = {"kind": "swiglu", "width": 40}
DELTA = {"kind": "gated_deltanet", "heads": 2}
BOTH = {
    "kind": "parallel",
    "mixers": [{"kind": "attention", "heads": 4, "window": 7}, DELTA],
    "merge": "gate",
}
BLOCKS: dict[str, Any] = {
    "full": {"mixer": {"kind": "attention", "heads": 4, "kv_heads": 2, "qk_norm": True}, "channel": GLU},
    "local": {"mixer": {"kind": "attention", "heads": 4, "window": 7}, "channel": {"kind": "none"}},
    "delta": {"mixer": DELTA, "channel": GLU, "norm_placement": "sandwich"},
    "decay": {
        "mixer": {"kind": "decay_attention", "heads": 4, "short_conv": 3},
        "channel": GLU,
        "shared": True,
    },
    "both": {
        "mixer": BOTH,
        "channel": {"kind": "gelu", "width": 40},
        "skip": {"source": "delta", "init": 0.5},
    },
}
# Every block once, the shared one twice.
HYBRID = ModelSpec.model_validate(
    {
        "vocab_size": 50,
        "hidden_size": 32,
        "logit_softcap": 5.0,
        "blocks": BLOCKS,
        "layers": ["full", "decay", "local", "delta", "decay", "both"],
    }
)
# Float64: a compiler may join operations, and no more.
CLOSE = 1e-9


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def hybrid(dtype: torch.dtype = torch.float64) -> HeddleForCausalLM:
    made: HeddleForCausalLM = shaken(build(HYBRID)).to(dtype)
    return made


def tokens(length: int) -> Tensor:
    return ids_of(length, vocabulary=50)


def compiled(function: Any, backend: str = "aot_eager") -> Any:
    return torch.compile(function, fullgraph=True, backend=backend)


def furthest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of a gradient, relative to the largest of that weight's."""
    assert found.keys() == expected.keys()
    return max(
        float((found[name] - exact).abs().max() / exact.abs().max().clamp(min=1e-12))
        for name, exact in expected.items()
    )


@pytest.mark.slow
@torch.no_grad()
def test_a_prefill_with_padding_compiles_as_one_graph() -> None:
    model, ids = hybrid().eval(), tokens(24)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    graph = compiled(lambda ids, mask: model(ids, attention_mask=mask, use_cache=False).logits)
    difference = graph(ids, mask) - model(ids, attention_mask=mask).logits
    assert difference[mask.bool()].abs().max() < CLOSE


@pytest.mark.slow
@torch.no_grad()
def test_a_prefill_that_fills_a_cache_and_steps_after_it_compile() -> None:
    model, ids = hybrid().eval(), tokens(24)
    whole = model(ids, use_cache=False).logits
    assert (in_pieces(compiled(model), ids, [*range(20, 25)])[0] - whole).abs().max() < CLOSE


@pytest.mark.slow
@torch.no_grad()
def test_a_decode_step_of_fixed_size_compiles_once_and_repeats() -> None:
    model = hybrid().eval()
    cache, ids = model.decode_cache(2, 40), tokens(1)
    graphs: list[int] = []

    def counted(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(len(graph.graph.nodes))
        return aot_eager(graph, inputs)

    step = torch.compile(
        lambda ids: model(ids, past_key_values=cache, use_cache=True).logits, fullgraph=True, backend=counted
    )
    expected = model(ids, past_key_values=cache).logits
    for _ in range(3):
        assert (step(ids) - expected).abs().max() < CLOSE
    assert len(graphs) == 1


# Of this backend's decompositions inductor makes its code; plain aot_eager trips over softplus_backward, whose strides torch
# foretells wrongly on a CPU.
TRAINING = "aot_eager_decomp_partition"
# torch's own, while it loads the decompositions.
decomposed = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")


@pytest.mark.slow
@decomposed
def test_a_checkpointed_training_step_compiles_with_equal_gradients() -> None:
    model, ids = hybrid().train(), tokens(24)

    def loss(ids: Tensor) -> Tensor:
        # The usual loss is taken in float32.
        found: Tensor = model(ids, use_cache=False).logits.square().mean()
        return found

    exact = gradients(model, loss(ids))
    checkpoint(model)
    assert furthest(gradients(model, compiled(loss, TRAINING)(ids)), exact) < CLOSE


@pytest.mark.slow
@decomposed
def test_a_checkpointed_step_of_corrected_experts_compiles_and_counts_each_choice_once() -> None:
    experts = {"kind": "moe", "experts": 4, "active": 2, "width": 16, "correction_bias": True}
    block = {"mixer": {"kind": "attention", "heads": 4}, "channel": experts}
    sizes = {"vocab_size": 50, "hidden_size": 32, "layers": ["own", "twice", "twice"]}
    spec = sizes | {"blocks": {"own": block, "twice": block | {"shared": True}}}
    model, ids = build(ModelSpec.model_validate(spec), dtype=torch.float64).train(), tokens(24)

    def loss(ids: Tensor) -> Tensor:
        found: Tensor = model(ids, use_cache=False).logits.square().mean()
        return found

    def step(function: Any) -> tuple[dict[str, Tensor], list[Tensor]]:
        counts = [module.correction.load for module in model.modules() if isinstance(module, MoEModule)]
        for count in counts:
            count.zero_()
        found = gradients(model, function(ids))
        return found, [count.clone() for count in counts]

    exact, counted = step(loss)
    # Two choices for each of 48 tokens, and in the shared block twice as many.
    assert [int(count.sum()) for count in counted] == [96, 192]
    checkpoint(model)
    for function in (loss, compiled(loss, TRAINING)):
        found, again = step(function)
        assert furthest(found, exact) < CLOSE
        assert [count.tolist() for count in again] == [count.tolist() for count in counted]


@pytest.mark.slow
@decomposed
def test_a_training_step_compiles_under_autocast() -> None:
    model, ids = hybrid(torch.float32).train(), tokens(24)

    def loss(ids: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found: Tensor = model(ids, labels=ids, use_cache=False).loss
        return found

    exact = gradients(model, model(ids, labels=ids).loss)
    eager, traced = gradients(model, loss(ids)), gradients(model, compiled(loss, TRAINING)(ids))
    assert all(gradient.dtype == torch.float32 for gradient in traced.values())
    assert furthest(traced, exact) <= 2 * furthest(eager, exact) + 1e-3
