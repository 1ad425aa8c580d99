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
from heddle.specs import ModelSpec, Site, load
from heddle.specs.mixers import Attention
from heddle.specs.selection import Selection

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples" / "specs").glob("*.yaml"))
every_example = pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
WIDTH, VOCABULARY, LENGTH = 64, 128, 96

ATTENTION: dict[str, Any] = {"kind": "attention", "heads": 4, "kv_heads": 2}
GATED = {"kind": "attention", "heads": 4, "head_dim": 32, "gate": True, "qk_norm": True}
NONE = {"kind": "none"}
DENSE: dict[str, dict[str, Any]] = {
    "attention": {"mixer": ATTENTION, "channel": NONE},
    "gated attention": {"mixer": GATED, "channel": NONE},
    "swiglu": {"mixer": ATTENTION, "channel": {"kind": "swiglu"}},
    "gelu": {"mixer": ATTENTION, "channel": {"kind": "gelu"}},
    "relu2": {"mixer": ATTENTION, "channel": {"kind": "relu2"}},
    **{
        f"parallel {merge}": {
            "mixer": {"kind": "parallel", "mixers": [ATTENTION, GATED], "merge": merge},
            "channel": NONE,
        }
        for merge in ("sum", "gate", "concat")
    },
}
every_dense = pytest.mark.parametrize("name", DENSE)


def model_with(block: dict[str, Any], *, layers: int = 2) -> ModelSpec:
    return ModelSpec.model_validate(
        {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "blocks": {"it": block}, "layers": ["it"] * layers}
    )


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
    return plan(spec).cost(length - 1)["decode_flops_per_token"]


@every_dense
def test_flops_of_a_prefill_are_those_that_torch_counts(name: str) -> None:
    spec, ids = model_with(DENSE[name]), tokens()
    model = build(spec).eval()
    with torch.no_grad():
        found = counted(lambda: model(ids, use_cache=False)) / ids.numel()
    assert found == pytest.approx(unmasked(spec, LENGTH), rel=0.02)
    # The plan reports the causal half of what the counter counts in full.
    cost, full = plan(spec).cost(LENGTH), unmasked(spec, LENGTH)
    scores = sum(4 * heads * size * LENGTH for heads, size in _heads(DENSE[name]["mixer"])) * 2
    assert cost["prefill_flops_per_token"] == pytest.approx(full - scores * (1 - (LENGTH + 1) / (2 * LENGTH)))


def _heads(mixer: dict[str, Any]) -> list[tuple[int, int]]:
    if "mixers" in mixer:
        return [pair for one in mixer["mixers"] for pair in _heads(one)]
    return [(mixer["heads"], mixer.get("head_dim", WIDTH // mixer["heads"]))]


@every_dense
@pytest.mark.parametrize("context", [0, 1, 50])
def test_flops_of_a_decoded_token_are_those_that_torch_counts(name: str, context: int) -> None:
    spec = model_with(DENSE[name])
    model = build(spec).eval()
    with torch.no_grad():
        cache = model(tokens(context), use_cache=True).past_key_values if context else None
        found = counted(lambda: model(tokens(1), past_key_values=cache, use_cache=True)) / 2
    assert found == pytest.approx(plan(spec).cost(context)["decode_flops_per_token"], rel=0.02)


@every_dense
def test_training_counts_a_forward_and_twice_as_much_backward(name: str) -> None:
    spec, ids = model_with(DENSE[name]), tokens()
    model = build(spec).train()
    found = counted(lambda: model(ids).logits.sum().backward()) / ids.numel()
    # The gradient of a sum is an expanded one, and the embedding has none to pass on: nothing else is spared.
    assert found == pytest.approx(3 * unmasked(spec, LENGTH), rel=0.02)
    cost = plan(spec).cost(LENGTH)
    assert cost["train_flops_per_token"] == 3 * cost["prefill_flops_per_token"]


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


def test_bytes_of_a_decode_step_are_weights_once_and_caches_for_each_sequence() -> None:
    spec = model_with(DENSE["swiglu"])
    layer = plan(spec).layers[0]
    cache, token = 100 * 2 * 2 * 16 * 2, 2 * 2 * 16 * 2
    for batch in (1, 8):
        expected = 2 * layer.parameters + batch * (cache + token)
        assert layer.cost(100, batch)["decode_bytes"] == expected
        assert plan(spec).cost(100, batch)["decode_bytes"] == 2 * expected + HEAD + batch * ROW
    # The sixteenth token of a window of 16 sees the fifteen that are held.
    windowed = plan(model_with({"mixer": ATTENTION | {"window": 16}, "channel": NONE})).layers[0]
    assert windowed.cost(100)["decode_bytes"] == 2 * windowed.parameters + 16 * token
    state = plan(model_with({"mixer": {"kind": "decay_attention", "heads": 4}, "channel": NONE})).layers[0]
    # float32 memory, read and written.
    assert state.cost(100)["decode_bytes"] == 2 * state.parameters + 2 * 4 * 4 * 16 * 16
    assert state.cost(0)["decode_bytes"] == 2 * state.parameters + 4 * 4 * 16 * 16


def test_bytes_of_a_prefill_are_weights_once_streams_and_caches() -> None:
    spec = model_with(DENSE["swiglu"])
    layer, cache = plan(spec).layers[0], 100 * 2 * 2 * 16 * 2
    for batch in (1, 8):
        expected = 2 * layer.parameters + batch * (100 * 4 * ROW + cache)
        assert layer.cost(100, batch)["prefill_bytes"] == expected
        assert plan(spec).cost(100, batch)["prefill_bytes"] == 2 * expected + HEAD + batch * 100 * 3 * ROW
    skipping = model_with({"mixer": ATTENTION, "channel": NONE, "skip": {"source": "embedding"}})
    layer = plan(skipping).layers[0]
    assert layer.cost(100)["prefill_bytes"] == 2 * layer.parameters + 100 * 3 * ROW + cache


def test_a_shared_block_is_counted_once_and_read_by_each_of_its_layers() -> None:
    block = DENSE["swiglu"]
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
