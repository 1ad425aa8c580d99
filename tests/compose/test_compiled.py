"""A hybrid with every form of layer under a compiler, autocast, checkpointing, on the meta device and sharded by FSDP2.

That each kind of mixer compiles by itself is held by tests/contracts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from heddle.compose.build import build
from heddle.compose.channel.moe import MoEModule
from heddle.compose.hf.model import HeddleForCausalLM
from heddle.compose.modules.layer import HeddleLayer
from heddle.specs import ModelSpec, load

EXAMPLES = Path(__file__).parents[2] / "examples" / "specs"
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
    model = build(HYBRID, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
    return model


def tokens(length: int, batch: int = 2) -> Tensor:
    return torch.randint(1, 50, (batch, length), generator=torch.Generator().manual_seed(2))


def compiled(function: Any, backend: str = "aot_eager") -> Any:
    return torch.compile(function, fullgraph=True, backend=backend)


def gradients(model: HeddleForCausalLM, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def checkpoint(model: HeddleForCausalLM) -> None:
    # The old name warns in later versions of transformers, the new one is not in earlier ones.
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()


def furthest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of a gradient, relative to the largest of that weight's."""
    assert found.keys() == expected.keys()
    return max(
        float((found[name] - exact).abs().max() / exact.abs().max().clamp(min=1e-12))
        for name, exact in expected.items()
    )


@pytest.mark.slow
@torch.no_grad()
def test_a_prefill_compiles_as_one_graph_with_and_without_padding() -> None:
    model, ids = hybrid().eval(), tokens(24)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    for given in (None, mask):
        graph = compiled(lambda ids, mask: model(ids, attention_mask=mask, use_cache=False).logits)
        real = slice(None) if given is None else given.bool()
        difference = graph(ids, given)[real] - model(ids, attention_mask=given).logits[real]
        assert difference.abs().max() < CLOSE


@pytest.mark.slow
@torch.no_grad()
def test_a_prefill_that_fills_a_cache_and_steps_after_it_compile() -> None:
    model, ids = hybrid().eval(), tokens(24)
    whole = model(ids, use_cache=False).logits
    graph = compiled(lambda ids, cache: model(ids, past_key_values=cache, use_cache=True))
    out = graph(ids[:, :20], None)
    found = [out.logits]
    for index in range(20, 24):
        out = graph(ids[:, index : index + 1], out.past_key_values)
        found.append(out.logits)
    assert (torch.cat(found, dim=1) - whole).abs().max() < CLOSE


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


def test_checkpointing_gives_equal_gradients_in_the_whole_hybrid() -> None:
    model, ids = hybrid().train(), tokens(70)
    plain = gradients(model, model(ids, labels=ids).loss)
    checkpoint(model)
    assert furthest(gradients(model, model(ids, labels=ids).loss), plain) == 0


def test_a_hybrid_is_prefilled_and_stepped_on_the_meta_device() -> None:
    model = build(HYBRID, device="meta", dtype=torch.bfloat16).eval()
    ids = torch.zeros(2, 70, dtype=torch.int64, device="meta")
    out = model(ids, use_cache=True)
    assert out.logits.is_meta
    assert model(ids[:, :1], past_key_values=out.past_key_values).logits.shape == (2, 1, 50)
    assert model(ids[:, :1], past_key_values=model.decode_cache(2, 40)).logits.is_meta


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    """One process, as a mesh."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def sharded(model: HeddleForCausalLM, mesh: DeviceMesh) -> HeddleForCausalLM:
    made = copy.deepcopy(model)
    for layer in made.modules():
        if isinstance(layer, HeddleLayer):
            fully_shard(layer, mesh=mesh)
    fully_shard(made, mesh=mesh)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hybrid", "shared_block", "skip"])
def test_a_model_sharded_layer_by_layer_trains_as_the_plain_one(name: str, mesh: DeviceMesh) -> None:
    spec = HYBRID if name == "hybrid" else load(EXAMPLES / f"{name}.yaml").spec.model
    plain = build(spec, dtype=torch.float64)
    split, ids = sharded(plain.train(), mesh), tokens(40)
    for model in (plain, split):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            model(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    pairs = list(zip(plain.named_parameters(), split.named_parameters(), strict=True))
    for (name, weight), (other, shard) in pairs:
        assert name == other
        assert isinstance(shard, DTensor)
        # The gradients of a shared weight are summed in another order.
        assert (shard.full_tensor() - weight).abs().max() < CLOSE, name
