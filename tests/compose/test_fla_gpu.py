"""Layers of flash-linear-attention in a model of ours, on a CUDA device: built, counted, trained, decoded.

Each stands under softmax attention. What it should give is asked of its own recurrent kernel in float32, and of our Gated
DeltaNet.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.autotuner import Autotuner

from heddle.compose.build import build, kernel_paths
from heddle.compose.hf.flatten import flatten
from heddle.compose.hf.model import HeddleForCausalLM
from heddle.compose.plan import plan
from heddle.errors import HeddleError, HeddleErrors
from heddle.kernels.accuracy import EPSILON
from heddle.specs import ModelSpec, load, loads

pytestmark = pytest.mark.gpu

EXAMPLE = Path(__file__).parents[2] / "examples" / "fla" / "gated_deltanet.yaml"
HIDDEN, LENGTH = 128, 150
GATED: dict[str, Any] = {"num_heads": 2, "head_dim": 64, "expand_v": 1}
LAYERS: dict[str, dict[str, Any]] = {
    "GatedDeltaNet": GATED,
    "GatedLinearAttention": {"num_heads": 2, "use_short_conv": True},
    "MultiScaleRetention": {"num_heads": 2},
}
# That library tunes each kernel for minutes; what it makes is to be right with any launch.
TRIED = 2
every_layer = pytest.mark.parametrize("layer", LAYERS)


@pytest.fixture(autouse=True)
def few_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    prune = Autotuner.prune_configs
    monkeypatch.setattr(Autotuner, "prune_configs", lambda self, given: prune(self, given)[:TRIED])


def spec_of(mixer: dict[str, Any]) -> ModelSpec:
    """The mixer, and attention over it."""
    other = {"kind": "attention", "heads": 4, "kv_heads": 2}
    blocks = {
        name: {"mixer": one, "channel": {"kind": "swiglu"}} for name, one in (("it", mixer), ("over", other))
    }
    return ModelSpec.model_validate(
        {"vocab_size": 100, "hidden_size": HIDDEN, "blocks": blocks, "layers": ["it", "over"]}
    )


def model_of(layer: str, **options: Any) -> HeddleForCausalLM:
    """The model in float32 on the CPU, its weights large enough for every part to count."""
    model = build(spec_of({"kind": "fla", "layer": layer, "options": LAYERS[layer] | options}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
    assert isinstance(model, HeddleForCausalLM)
    return model


def exact_of(layer: str, ids: Tensor) -> Tensor:
    """Logits by the recurrent kernel of the layer in float32."""
    model = model_of(layer, mode="fused_recurrent").cuda().eval()
    found: Tensor = model(ids, use_cache=False).logits
    return found


def tokens(batch: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randint(1, 100, (batch, length), generator=torch.Generator().manual_seed(1)).cuda()


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double().cpu() - exact.double().cpu()).norm() / exact.double().norm())


@every_layer
def test_it_is_checked_counted_and_built_without_a_device(layer: str) -> None:
    spec = spec_of({"kind": "fla", "layer": layer, "options": LAYERS[layer]})
    built = build(spec, device="meta")
    assert plan(spec).parameters == sum(one.numel() for one in built.parameters())
    assert kernel_paths(spec, "cpu", torch.float32) == {"fla": "fla", "attention": "sdpa"}
    assert built(torch.zeros(1, 4, dtype=torch.int64, device="meta"), use_cache=False).logits.is_meta
    with pytest.raises(HeddleError, match=f"fla.{layer} runs on a GPU, and its input is on the cpu"):
        build(spec)(torch.zeros(1, 4, dtype=torch.int64))


@every_layer
@torch.no_grad()
def test_decode_agrees_with_prefill(layer: str) -> None:
    ids, exact = tokens(), exact_of(layer, tokens())
    model = model_of(layer).to(torch.bfloat16).cuda().eval()
    whole, bound = model(ids, use_cache=False).logits, EPSILON[torch.bfloat16]
    # A prefill that its chunked kernel takes, a second piece, single tokens.
    found, cache = [], None
    for first, last in [(0, 100), (100, 140), *((place, place + 1) for place in range(140, LENGTH))]:
        out = model(ids[:, first:last], past_key_values=cache, use_cache=True)
        found.append(out.logits)
        cache = out.past_key_values
    assert cache.get_seq_length() == LENGTH
    pieces = torch.cat(found, dim=1)
    assert error(pieces[:, 140:], exact[:, 140:]) <= 2 * error(whole[:, 140:], exact[:, 140:]) + bound
    # Beams: the rows change places, and each goes on as its own.
    cache.batch_select_indices(torch.tensor([1, 0]).cuda())
    more = torch.tensor([[5], [5]]).cuda()
    swapped = model(more, past_key_values=cache).logits
    longer = model(torch.cat((ids, more), dim=1).flip(0), use_cache=False).logits[:, -1:]
    assert error(swapped, longer) <= 2 * error(whole, exact) + bound


@every_layer
@torch.no_grad()
def test_left_padding_equals_none(layer: str) -> None:
    ids, exact = tokens(1, 90), exact_of(layer, tokens(1, 90))
    model = model_of(layer).to(torch.bfloat16).cuda().eval()
    whole = model(ids, use_cache=False).logits
    padded = torch.cat((torch.zeros(1, 30, dtype=torch.int64).cuda(), ids), dim=1)
    mask = torch.ones_like(padded)
    mask[:, :30] = 0
    out = model(padded[:, :-1], attention_mask=mask[:, :-1], use_cache=True)
    last = model(padded[:, -1:], attention_mask=mask, past_key_values=out.past_key_values).logits
    found = torch.cat((out.logits[:, 30:], last), dim=1)
    assert error(found, exact) <= 2 * error(whole, exact) + EPSILON[torch.bfloat16]


@every_layer
@torch.no_grad()
def test_a_filled_cache_repeats_its_step(layer: str) -> None:
    model = model_of(layer).to(torch.bfloat16).cuda().eval()
    cache, ids = model.decode_cache(2, 40), tokens(2, 1)
    first, again = (model(ids, past_key_values=cache).logits for _ in range(2))
    assert torch.equal(first, again)
    assert cache.get_seq_length() == 40
    grown = model(tokens(2, 41)).past_key_values.layers[0].tensors()
    held = cache.layers[0].tensors()
    assert {name: one.shape for name, one in held.items()} == {name: one.shape for name, one in grown.items()}


# The backward pass of its Gated DeltaNet refuses some pairs of Triton and GPU.
@pytest.mark.parametrize("layer", ["GatedLinearAttention", "MultiScaleRetention"])
def test_it_trains(layer: str) -> None:
    model, ids = model_of(layer).cuda().train(), tokens()
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for _ in range(10):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > 0, name
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)


@torch.no_grad()
def test_its_gated_deltanet_is_ours_with_the_same_weights() -> None:
    theirs, ids = model_of("GatedDeltaNet"), tokens()
    own = {"kind": "gated_deltanet", "heads": 2, "head_dim": 64, "value_dim": 64}
    ours = build(spec_of(own))
    weights = {name: one for name, one in theirs.state_dict().items() if ".mixer.layer." not in name}
    layer: Any = theirs.model.layers[0].mixer.layer
    row = {
        "qkv_proj.weight": torch.cat([getattr(layer, f"{side}_proj").weight for side in "qkv"]),
        "z_proj.weight": layer.g_proj.weight,
        "a_proj.weight": layer.a_proj.weight,
        "b_proj.weight": layer.b_proj.weight,
        "conv.weight": torch.cat([getattr(layer, f"{side}_conv1d").weight for side in "qkv"]),
        "A_log": layer.A_log,
        "dt_bias": layer.dt_bias,
        "norm.weight": layer.o_norm.weight,
        "o_proj.weight": layer.o_proj.weight,
    }
    mine = ours.state_dict()
    for name, one in row.items():
        path = f"model.layers.0.mixer.{name}"
        weights[path] = one.reshape(mine[path].shape)
    ours.load_state_dict(weights)
    exact = copy.deepcopy(ours).double().eval()(ids.cpu(), use_cache=False).logits
    theirs, ours = (one.to(torch.bfloat16).cuda().eval() for one in (theirs, ours))
    found, baseline = (one(ids, use_cache=False).logits for one in (theirs, ours))
    assert error(found, exact) <= 2 * error(baseline, exact) + EPSILON[torch.bfloat16]


def test_mistakes_are_told_at_their_line() -> None:
    text = EXAMPLE.read_text()
    for old, new, where, what in [
        ("GatedDeltaNet,", "GatedDeltNet,", "layer", "fla.layers has no 'GatedDeltNet'"),
        ("num_heads", "num_head", "options.num_head", "GatedDeltaNet takes no 'num_head'"),
        ("expand_v: 1", "expand_v: 1.3", "options", "GatedDeltaNet cannot be made: expand_v=1.3 does not"),
        (
            "num_heads: 4",
            "num_heads: [4]",
            "options.num_heads",
            "expected a number, true, false, a text or null",
        ),
    ]:
        with pytest.raises(HeddleErrors) as told:
            loads(text.replace(old, new))
        (error_,) = told.value.errors
        assert error_.where.path == f"blocks.linear.mixer.{where}"
        assert error_.what.startswith(what)
        assert error_.where.line == 9


def test_the_example_is_built_and_its_source_is_one_flat_folder() -> None:
    spec = load(EXAMPLE).spec.model
    model = build(spec).cuda().eval()
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        assert model(torch.zeros(1, 70, dtype=torch.int64).cuda()).logits.isfinite().all()
    files = flatten(["attention", "fla"], ["swiglu"])
    # Its import is made at run time: transformers would ask for a package named fla.
    assert "import fla" not in "".join(files.values())
