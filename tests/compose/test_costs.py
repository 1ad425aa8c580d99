"""What the plan says a model costs, against built modules and against torch's own counter of FLOPs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from heddle.compose.build import build
from heddle.compose.cache import cache_bytes
from heddle.compose.plan import plan
from heddle.kernels._decay_attention_torch import sweep
from heddle.kernels.gated_delta_rule import gated_delta_rule
from heddle.specs import ModelSpec, Site, load
from heddle.specs.mixers import Attention
from heddle.specs.mixers.layer_router import LayerRouter
from heddle.specs.pattern import layers_of
from heddle.specs.selection import Selection

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples" / "specs").glob("*.yaml"))
every_example = pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
WIDTH, VOCABULARY, LENGTH = 64, 128, 96

ATTENTION: dict[str, Any] = {"kind": "attention", "heads": 4, "kv_heads": 2}
GATED = {"kind": "attention", "heads": 4, "head_dim": 32, "gate": True, "qk_norm": True}
PAIR = [ATTENTION, GATED]
NONE = {"kind": "none"}
MOE = {"kind": "moe", "experts": 8, "active": 2, "width": 48}
SHARED_EXPERT = {"shared_width": 32, "shared_gate": True}


def model_with(*blocks: dict[str, Any], layers: int = 2, **fields: Any) -> ModelSpec:
    """A model of these blocks, a, b, …: all of them once, or of a single one so many layers."""
    named = dict(zip("abc", blocks, strict=False))
    sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "blocks": named}
    order = list(named) if len(blocks) > 1 else ["a"] * layers
    return ModelSpec.model_validate(sizes | {"layers": order} | fields)


def mixing(mixer: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"mixer": mixer, "channel": NONE, **fields}


# What runs in dense products of torch, which its counter sees as they are.
DENSE: dict[str, ModelSpec] = {
    "attention": model_with(mixing(ATTENTION)),
    "gated attention": model_with(mixing(GATED)),
    "attention with softcap, sinks, bias": model_with(
        mixing(ATTENTION | {"softcap": 5.0, "sinks": True, "bias": "all"})
    ),
    **{
        kind: model_with({"mixer": ATTENTION, "channel": {"kind": kind}})
        for kind in ("swiglu", "gelu", "relu2", "geglu")
    },
    # Each token is sent to its experts alone, so no expectation over routes is left in the count.
    "moe": model_with({"mixer": ATTENTION, "channel": MOE}),
    "moe with a shared expert": model_with({"mixer": ATTENTION, "channel": MOE | SHARED_EXPERT}),
    **{
        f"parallel {merge}": model_with(mixing({"kind": "parallel", "mixers": PAIR, "merge": merge}))
        for merge in ("sum", "gate", "concat")
    },
    "sequential": model_with(mixing({"kind": "sequential", "mixers": PAIR})),
    "head_split": model_with(
        mixing({"kind": "head_split", "mixers": [GATED, ATTENTION | {"kv_heads": 4}], "share": 0.25})
    ),
    "moh": model_with(mixing({"kind": "moh", "mixer": ATTENTION, "shared_heads": 2, "active": 1})),
    "token_router": model_with(mixing({"kind": "token_router", "mixers": PAIR, "merge": "gate"})),
    "layer_router": model_with(mixing({"kind": "layer_router", "mixers": PAIR, "router_dim": 8})),
    "shared block": model_with({"mixer": ATTENTION, "channel": {"kind": "gelu"}, "shared": True}, layers=3),
    "keys_from": model_with(mixing(ATTENTION), mixing(ATTENTION | {"keys_from": "a"})),
    "values_from": model_with(mixing(ATTENTION), mixing(ATTENTION | {"values_from": "a"})),
    "qk_source": model_with(mixing(ATTENTION), mixing(ATTENTION | {"qk_source": "embedding"})),
    "skip": model_with(mixing(ATTENTION), mixing(GATED, skip={"source": "a"})),
}
every_dense = pytest.mark.parametrize("name", DENSE)


def tokens(length: int = LENGTH, batch: int = 2) -> Tensor:
    return torch.arange(batch * length).view(batch, length) % VOCABULARY


def counted(run: Any) -> int:
    """FLOPs of `run()` by torch's counter, which sees attention as the two products that it is made of."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def unmasked(spec: ModelSpec, length: int) -> float:
    """FLOPs a token of a pass in which every token sees all `length`, as the counter has it."""
    # A token that is decoded after all others sees so many.
    found = plan(spec).cost(length - 1)["decode_flops_per_token"]
    # What works once for a prompt is no part of a step.
    once = [one for layer in layers_of(spec) if isinstance(one := layer.spec.mixer, LayerRouter)]
    return found + sum(one.prefill_flops(Site(WIDTH), 1) - one.flops(Site(WIDTH), 0) for one in once) / length


@every_dense
def test_flops_of_a_prefill_are_those_that_torch_counts(name: str) -> None:
    spec, ids = DENSE[name], tokens()
    model = build(spec).eval()
    with torch.no_grad():
        found = counted(lambda: model(ids, use_cache=False)) / ids.numel()
    assert found == pytest.approx(unmasked(spec, LENGTH), rel=0.02)


@pytest.mark.parametrize(
    ("name", "heads"), [("attention", 64), ("gated attention", 128), ("parallel sum", 192)]
)
def test_a_causal_prefill_counts_the_half_that_is_seen(name: str, heads: int) -> None:
    full, scores = unmasked(DENSE[name], LENGTH), 2 * 4 * heads * LENGTH
    seen = full - scores * (1 - (LENGTH + 1) / (2 * LENGTH))
    assert plan(DENSE[name]).cost(LENGTH)["prefill_flops_per_token"] == pytest.approx(seen)


# A layer router decides when a prompt begins, so it takes no single step after nothing.
STEPS = [(name, context) for name in DENSE for context in (0, 1, 50) if context or name != "layer_router"]


@pytest.mark.parametrize(("name", "context"), STEPS)
def test_flops_of_a_decoded_token_are_those_that_torch_counts(name: str, context: int) -> None:
    spec = DENSE[name]
    model = build(spec).eval()
    with torch.no_grad():
        cache = model(tokens(context), use_cache=True).past_key_values if context else None
        found = counted(lambda: model(tokens(1), past_key_values=cache, use_cache=True)) / 2
    assert found == pytest.approx(plan(spec).cost(context)["decode_flops_per_token"], rel=0.02)


@every_dense
def test_training_counts_a_forward_and_twice_as_much_backward(name: str) -> None:
    spec, ids = DENSE[name], tokens()
    model = build(spec).train()
    found = counted(lambda: model(ids).logits.sum().backward()) / ids.numel()
    # The gradient of a sum is an expanded one, and the embedding has none to pass on: nothing else is spared.
    assert found == pytest.approx(3 * unmasked(spec, LENGTH), rel=0.02)
    cost = plan(spec).cost(LENGTH)
    assert cost["train_flops_per_token"] == 3 * cost["prefill_flops_per_token"]


BOTH_WAYS = mixing(ATTENTION | {"causal": False})
READOUTS: dict[str, dict[str, Any] | None] = {
    "masked": None,
    **{kind: {"kind": kind, "classes": 5} for kind in ("last", "mean", "cls")},
    "ep": {"kind": "ep", "classes": 5, "queries": 8},
}


@pytest.mark.parametrize("name", READOUTS)
def test_flops_of_an_encoder_are_those_that_torch_counts(name: str) -> None:
    spec, ids = model_with(BOTH_WAYS, kind="encoder", readout=READOUTS[name]), tokens()
    model = build(spec).eval()
    with torch.no_grad():
        found = counted(lambda: model(ids)) / ids.numel()
    # No half is masked here, so the plan is what torch counts.
    assert found == pytest.approx(plan(spec).cost(LENGTH)["prefill_flops_per_token"], rel=0.02)


# Of a linear mixer torch's counter sees products alone. It cannot see a convolution that is a sum of shifted products, nor in
# a step a memory that decays, what is added to it and their outer product: 3 K V of a head. Into the op of decay attention,
# which is one step to it, it does not look at all; its path in torch is counted beside it. Windows and selected blocks are
# not compared, because torch's path computes the logits that it then masks.
DECAY = {"kind": "decay_attention", "heads": 4}
DELTA = {"kind": "gated_deltanet", "heads": 2, "value_heads": 4, "value_dim": 48}
# The mixer, and FLOPs a token of its convolution and of a step of its memory that are not seen.
LINEAR: dict[str, tuple[dict[str, Any], int, int]] = {
    "lightning": (DECAY, 0, 4 * 5 * 16 * 16),
    "retnet": (DECAY | {"form": "retnet", "short_conv": 4}, 2 * 4 * 3 * 64, 4 * 5 * 16 * 16),
    "gated_deltanet": (DELTA, 2 * 4 * (2 * 64 + 192), 4 * 3 * 32 * 48),
}
every_linear = pytest.mark.parametrize("name", LINEAR)


@every_linear
def test_flops_of_a_step_of_a_linear_mixer_are_those_torch_counts_and_those_it_cannot_see(name: str) -> None:
    mixer, convolution, memory = LINEAR[name]
    spec = model_with(mixing(mixer))
    model, planned = build(spec).eval(), plan(spec).cost(50)["decode_flops_per_token"]
    with torch.no_grad():
        cache = model(tokens(50), use_cache=True).past_key_values
        found = counted(lambda: model(tokens(1), past_key_values=cache, use_cache=True)) / 2
    assert found + 2 * (convolution + memory) == planned


@every_linear
def test_flops_of_a_prefill_of_a_linear_mixer_are_those_torch_counts_and_those_it_cannot_see(
    name: str,
) -> None:
    mixer, convolution, _ = LINEAR[name]
    # Two chunks.
    spec, ids = model_with(mixing(mixer)), tokens(128)
    model, planned = build(spec).eval(), plan(spec).cost(128)["prefill_flops_per_token"]
    with torch.no_grad():
        found = counted(lambda: model(ids, use_cache=False)) / ids.numel()
        op = _delta_rule_beside_torch() if mixer is DELTA else _decay_in_torch()
    assert found + 2 * (convolution + op) == pytest.approx(planned, rel=0.02)


def _decay_in_torch() -> float:
    """FLOPs a token of the op at the sizes of `DECAY`, on its path in torch."""
    q, k, v = (torch.rand(2, 128, 4, 16) for _ in range(3))
    return counted(lambda: sweep(q, k, v, -torch.rand(4), scale=1.0, state=None, cu_seqlens=None)) / 256


def _delta_rule_beside_torch() -> float:
    """FLOPs a token of the op at the sizes of `DELTA` by its closed form, less those that torch counts on its own path.

    The closed form is that of a kernel, which needs no product of T and beta e^G K.
    """
    q, k, v = torch.rand(2, 128, 2, 32), torch.rand(2, 128, 2, 32), torch.rand(2, 128, 4, 48)
    found = counted(lambda: gated_delta_rule(q, k, v, -torch.rand(2, 128, 4), torch.rand(2, 128, 4))) / 256
    closed = 4 * 2 * (2 * 64 * (32 + 48) + 64 * 64 + 3 * 32 * 48)
    assert closed < found < 1.5 * closed
    return closed - found


@every_example
def test_parameters_of_an_example_are_those_of_the_built_module(path: Path) -> None:
    spec = load(path).spec.model
    planned, model = plan(spec), build(spec, device="meta")
    assert planned.parameters == sum(weight.numel() for weight in model.parameters())
    for layer in planned.layers:
        held = model.model.layers[layer.index]
        assert layer.parameters == sum(weight.numel() for weight in held.parameters()), layer.index


@every_example
def test_cache_bytes_of_an_example_are_those_of_the_filled_cache(path: Path) -> None:
    spec = load(path).spec.model
    model, context = build(spec, dtype=torch.bfloat16).eval(), 20
    with torch.no_grad():
        cache = model(tokens(context)).get("past_key_values")
    cost = plan(spec).cost(context, batch=2)
    # An encoder gives no cache.
    assert (cache is None) is (spec.kind == "encoder")
    held = 0 if cache is None else cache_bytes(cache.layers)
    assert cost["cache_bytes"] + cost["state_bytes"] == held


# Bytes, by hand: width 64, 4 heads of 16, 2 of them for keys and values; numbers of 2 bytes.
ROW = 2 * WIDTH
HEAD = 2 * (VOCABULARY * WIDTH + WIDTH)
SWIGLU = {"mixer": ATTENTION, "channel": {"kind": "swiglu"}}


def test_bytes_of_a_decode_step_are_weights_once_and_caches_for_each_sequence() -> None:
    spec = model_with(SWIGLU)
    layer = plan(spec).layers[0]
    cache, token = 100 * 2 * 2 * 16 * 2, 2 * 2 * 16 * 2
    for batch in (1, 8):
        expected = 2 * layer.parameters + batch * (cache + token)
        assert layer.cost(100, batch)["decode_bytes"] == expected
        assert plan(spec).cost(100, batch)["decode_bytes"] == 2 * expected + HEAD + batch * ROW
    # The sixteenth token of a window of 16 sees the fifteen that are held.
    windowed = plan(model_with(mixing(ATTENTION | {"window": 16}))).layers[0]
    assert windowed.cost(100)["decode_bytes"] == 2 * windowed.parameters + 16 * token
    state = plan(model_with(mixing(DECAY))).layers[0]
    # float32 memory, read and written.
    assert state.cost(100)["decode_bytes"] == 2 * state.parameters + 2 * 4 * 4 * 16 * 16
    assert state.cost(0)["decode_bytes"] == 2 * state.parameters + 4 * 4 * 16 * 16


def test_bytes_of_a_prefill_are_weights_once_streams_and_caches() -> None:
    spec = model_with(SWIGLU)
    layer, cache = plan(spec).layers[0], 100 * 2 * 2 * 16 * 2
    for batch in (1, 8):
        expected = 2 * layer.parameters + batch * (100 * 4 * ROW + cache)
        assert layer.cost(100, batch)["prefill_bytes"] == expected
        assert plan(spec).cost(100, batch)["prefill_bytes"] == 2 * expected + HEAD + batch * 100 * 3 * ROW
    skipping = model_with(mixing(ATTENTION, skip={"source": "embedding"}))
    layer = plan(skipping).layers[0]
    assert layer.cost(100)["prefill_bytes"] == 2 * layer.parameters + 100 * 3 * ROW + cache


def test_a_shared_block_is_counted_once_and_read_by_each_of_its_layers() -> None:
    block = SWIGLU
    shared, plain = plan(model_with(block | {"shared": True})), plan(model_with(block))
    assert [layer.parameters for layer in shared.layers] == [plain.layers[0].parameters, 0]
    for name, value in plain.cost(100, 2).items():
        assert shared.cost(100, 2)[name] == value, name


def test_a_step_reads_the_keys_that_it_sees_whoever_caches_them() -> None:
    """In bytes of bfloat16, 4 heads of 16, after 10,000 tokens: keys and values of a token are 256 bytes."""
    choose = {"block": 8, "count": 4, "sink": 1, "recent": 1}
    read = {
        "plain": {},
        "windowed": {"window": 8},
        "taken": {"keys_from": "plain"},
        "taken in a window": {"keys_from": "plain", "window": 8},
        "mixed": {"values_from": "plain"},
        "chosen": {"selection": choose},
    }
    found = {
        name: Attention(heads=4, **fields).read_bytes(Site(64), 10_000, 2)  # type: ignore[arg-type]
        for name, fields in ((name, _selection(fields)) for name, fields in read.items())
    }
    assert found["plain"] == found["taken"] == found["mixed"] == 10_000 * 256
    assert found["windowed"] == found["taken in a window"] == 7 * 256
    # At most 4 blocks of 8 with the token's own, and the means of the blocks before it.
    assert 24 * 256 <= found["chosen"] <= 31 * 256 + 1250 * 128


def _selection(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: Selection(**one) if name == "selection" else one for name, one in fields.items()}
