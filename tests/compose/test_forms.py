"""The forms of layers: each runs as its equation says, differentiates, decodes, is saved and exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from heddle.compose.build import build
from heddle.compose.hf.card import Card
from heddle.compose.hf.export import export
from heddle.compose.hf.model import HeddleForCausalLM
from heddle.compose.modules.layer import Again
from heddle.specs import ModelSpec, load
from heddle.specs.pattern import Layer, layers_of
from heddle.specs.references import links

EXAMPLES = Path(__file__).parents[2] / "examples" / "specs"
# Float64: a sum may be taken in another order, and nothing else.
EXACT = 1e-9
WIDTH, VOCABULARY = 32, 256

FULL: dict[str, Any] = {
    "mixer": {"kind": "attention", "heads": 4, "rope": None},
    "channel": {"kind": "gelu", "width": 40},
}
BARE = {"mixer": {"kind": "attention", "heads": 2, "rope": None}, "channel": {"kind": "none"}}
SCALED = {"of": "stream", "stream": 0.75, "branch": 0.22}


def model_with(blocks: dict[str, Any], layers: list[Any], **fields: Any) -> ModelSpec:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH}
    return ModelSpec.model_validate(sizes | fields | {"blocks": blocks, "layers": layers})


# All of attention without positions and of GELU, which the oracle below knows: what is tested is how they are joined.
FORMS: dict[str, ModelSpec] = {
    "pre": model_with({"a": FULL, "b": BARE}, ["a", "b", "a"]),
    "post": model_with({"a": FULL | {"norm_placement": "post"}}, ["a", "a"]),
    "sandwich": model_with({"a": FULL | {"norm_placement": "sandwich", "norm": "layernorm"}}, ["a", "a"]),
    "factors": model_with({"a": FULL | {"residual": SCALED}}, ["a", "a"]),
    "normed": model_with(
        {
            "a": FULL
            | {"residual": {"of": "normed", "stream": 2.5, "branch": 0.5}, "channel_residual": SCALED}
        },
        ["a", "a"],
    ),
    "normed sandwich": model_with(
        {"a": FULL | {"residual": {"of": "normed"}, "norm_placement": "sandwich"}}, ["a", "a"]
    ),
    "multipliers": model_with(
        {"a": FULL},
        ["a"],
        embedding_multiplier=5.7,
        logit_multiplier=0.3,
        logit_softcap=2.0,
        tie_embeddings=False,
    ),
    "skip of the embedding": model_with(
        {"a": FULL | {"skip": {"source": "embedding", "init": 0.3}}, "b": BARE}, ["b", "a", "a"]
    ),
    "skip of a layer": model_with(
        {"a": FULL | {"skip": {"source": "b", "init": 0.3}}, "b": BARE}, ["b", "a", "b", "a"]
    ),
    "shared": model_with({"a": FULL | {"shared": True}, "b": BARE}, ["a", "b", "a", "a"]),
    "shared with a skip": model_with(
        {"a": FULL | {"shared": True, "skip": {"source": "embedding", "init": 0.3}}, "b": BARE},
        ["a", "b", "a"],
    ),
    "named and overridden": model_with(
        {"a": FULL, "c": BARE | {"skip": {"source": "here", "init": 1.0}}},
        [
            {"block": "a", "name": "here", "override": {"mixer": {"heads": 2, "kv_heads": 1}}},
            {"block": "a", "override": {"norm_placement": "post", "channel": {"kind": "none"}}},
            {"repeat": 2, "pattern": ["a", "c"]},
        ],
    ),
}
FILES = ("patterns", "shared_block", "skip", "parallel")
every_form = pytest.mark.parametrize("name", FORMS)
every_model = pytest.mark.parametrize("name", [*FORMS, *FILES])


def spec_of(name: str) -> ModelSpec:
    return FORMS[name] if name in FORMS else load(EXAMPLES / f"{name}.yaml").spec.model


def model_of(name: str) -> HeddleForCausalLM:
    """The model in float64, its weights large enough for every part to count."""
    model = build(spec_of(name), dtype=torch.float64).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
        for name_, parameter in model.named_parameters():
            if parameter.ndim == 1 and not name_.endswith(("A_log", "dt_bias")):
                parameter.uniform_(0.5, 1.5, generator=generator)
    return model


def tokens(length: int = 40, batch: int = 2) -> Tensor:
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(2))


class Oracle:
    """The logits of a model of attention without positions, GELU and none, from its weights and its spec alone."""

    def __init__(self, spec: ModelSpec, weights: dict[str, Tensor]) -> None:
        self.spec, self.weights = spec, weights
        self.layers = layers_of(spec)
        self.skips = {link.layer: link.source for link in links(self.layers)}
        self.prefix = ""

    def logits(self, ids: Tensor) -> Tensor:
        spec, first = self.spec, dict[str, int]()
        streams = {-1: self.weights["model.embed_tokens.weight"][ids] * spec.embedding_multiplier}
        for layer in self.layers:
            owner = first.setdefault(layer.block, layer.index) if layer.spec.shared else layer.index
            self.prefix = f"model.layers.{owner}."
            streams[layer.index] = self.layer(layer, streams)
        self.prefix = "model."
        x = self.norm("norm", streams[len(self.layers) - 1], "rmsnorm")
        head = "model.embed_tokens.weight" if spec.tie_embeddings else "lm_head.weight"
        y = x @ self.weights[head].T * spec.logit_multiplier
        return y if spec.logit_softcap is None else spec.logit_softcap * torch.tanh(y / spec.logit_softcap)

    def layer(self, layer: Layer, streams: dict[int, Tensor]) -> Tensor:
        block, x = layer.spec, streams[layer.index - 1]
        if block.skip is not None:
            source = self.skips[layer.index]
            assert source is not None
            a, b = self.weights[self.prefix + "skip.factors"]
            x = a * x + b * streams[source]
        halves = [("mixer", block.residual)]
        halves += [] if block.channel.is_empty else [("channel", block.channel_residual or block.residual)]
        for half, residual in halves:
            seen = x if block.norm_placement == "post" else self.norm(f"{half}_norm", x, block.norm)
            y = self.attention(seen, block.mixer.heads) if half == "mixer" else self.gelu(seen)  # type: ignore[attr-defined]
            y = y if block.norm_placement == "pre" else self.norm(f"{half}_post_norm", y, block.norm)
            past, stream, branch = x, 1.0, 1.0
            if residual is not None:
                past, stream, branch = (
                    seen if residual.of == "normed" else x,
                    residual.stream,
                    residual.branch,
                )
            x = stream * past + branch * y
        return x

    def norm(self, name: str, x: Tensor, kind: str) -> Tensor:
        x = x - x.mean(-1, keepdim=True) if kind == "layernorm" else x
        y = x / torch.sqrt((x**2).mean(-1, keepdim=True) + self.spec.norm_eps)
        y = y * self.weights[f"{self.prefix}{name}.weight"]
        return y + self.weights[f"{self.prefix}{name}.bias"] if kind == "layernorm" else y

    def attention(self, x: Tensor, heads: int) -> Tensor:
        q, k, v = (x @ self.weights[f"{self.prefix}mixer.{name}_proj.weight"].T for name in "qkv")
        size, out = q.shape[-1] // heads, []
        for head in range(heads):
            of = slice(head * size, (head + 1) * size)
            shared = head * k.shape[-1] // q.shape[-1]
            kv = slice(shared * size, (shared + 1) * size)
            scores = q[..., of] @ k[..., kv].mT / size**0.5
            ahead = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
            out.append(scores.masked_fill(ahead, -torch.inf).softmax(-1) @ v[..., kv])
        return torch.cat(out, -1) @ self.weights[f"{self.prefix}mixer.o_proj.weight"].T

    def gelu(self, x: Tensor) -> Tensor:
        y = x @ self.weights[f"{self.prefix}channel.up_proj.weight"].T
        y = 0.5 * y * (1 + torch.erf(y / 2**0.5))
        return y @ self.weights[f"{self.prefix}channel.down_proj.weight"].T


@every_form
def test_a_form_computes_its_equation(name: str) -> None:
    model = model_of(name)
    oracle = Oracle(spec_of(name), dict(model.state_dict()))
    difference = (model(tokens(), use_cache=False).logits - oracle.logits(tokens())).abs().max()
    assert difference < EXACT


@every_form
def test_the_gradients_of_a_form_are_those_of_its_equation(name: str) -> None:
    model = model_of(name).train()
    ids, pick = tokens(12), torch.randn(2, 12, VOCABULARY, dtype=torch.float64)
    (model(ids).logits * pick).sum().backward()
    named = {key: weight.detach().clone().requires_grad_() for key, weight in model.named_parameters()}
    (Oracle(spec_of(name), named).logits(ids) * pick).sum().backward()
    for key, weight in model.named_parameters():
        assert weight.grad is not None, key
        assert (weight.grad - named[key].grad).abs().max() < EXACT * 1e3, key
        assert weight.grad.abs().max() > 0, key


@every_model
def test_gradients_reach_every_weight(name: str) -> None:
    model = model_of(name).train()
    model(tokens(70), labels=tokens(70)).loss.backward()
    for key, weight in model.named_parameters():
        assert weight.grad is not None, key
        assert weight.grad.isfinite().all(), key
        assert weight.grad.abs().max() > 0, key


@every_model
@torch.no_grad()
def test_step_by_step_equals_the_whole(name: str) -> None:
    model, ids = model_of(name), tokens(80)
    whole = model(ids, use_cache=False).logits
    # A prefill, a second piece, single steps.
    pieces, cache, start = [], None, 0
    for end in (67, 70, *range(71, 81)):
        out = model(ids[:, start:end], past_key_values=cache, use_cache=True)
        cache, start = out.past_key_values, end
        pieces.append(out.logits)
    assert (torch.cat(pieces, dim=1) - whole).abs().max() < EXACT


@every_model
@torch.no_grad()
def test_left_padding_equals_none(name: str) -> None:
    model, ids = model_of(name), tokens(30)
    whole = model(ids).logits
    padded = torch.cat((torch.zeros(2, 9, dtype=torch.int64), ids), dim=1)
    mask = torch.ones_like(padded)
    mask[:, :9] = 0
    assert (model(padded, attention_mask=mask).logits[:, 9:] - whole).abs().max() < EXACT


@every_model
def test_greedy_generation_is_the_same_with_and_without_a_cache(name: str) -> None:
    model = model_of(name)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    found = [model.generate(tokens(20), use_cache=cache, **options) for cache in (True, False)]
    assert torch.equal(*found)


@every_model
def test_a_form_survives_saving_and_loading(name: str, tmp_path: Path) -> None:
    # What checkpoints are written in; rates of decay are read in float32 whatever they were.
    model = model_of(name).float()
    model.save_pretrained(tmp_path)
    loaded = HeddleForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("name", ["shared", "shared with a skip", "shared_block"])
def test_a_shared_block_has_one_set_of_weights_and_a_cache_for_each_layer(name: str) -> None:
    model = model_of(name)
    spec = layers_of(spec_of(name))
    shared = [layer.index for layer in spec if layer.spec.shared]
    for index in shared[1:]:
        assert isinstance(model.model.layers[index], Again)
        assert model.model.layer_at(index) is model.model.layers[shared[0]]
    prefixes = {key.split(".")[2] for key in model.state_dict() if key.startswith("model.layers.")}
    assert prefixes == {str(layer.index) for layer in spec} - {str(index) for index in shared[1:]}
    cache = model(tokens()).past_key_values
    keys = [cache.layers[index].tensors()["keys"] for index in shared]
    assert len({tensor.data_ptr() for tensor in keys}) == len(shared)
    assert not torch.equal(keys[0], keys[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shared with a skip", "normed", "multipliers", "patterns", "parallel"])
def test_a_form_is_exported_and_found_again_without_heddle(name: str, tmp_path: Path) -> None:
    model = model_of(name).float()
    result = export(
        model, tmp_path / "out", card=Card(name, f"version: 1\nname: {name}\n", license="apache-2.0")
    )
    assert result.max_difference <= 1e-5
