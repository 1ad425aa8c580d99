"""The forms of layers: each runs as its equation says, differentiates, decodes and is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toys import EXACT, in_pieces, left_padded, shaken, tokens

from heddle.compose.build import build
from heddle.compose.hf.model import HeddleForCausalLM
from heddle.compose.modules.layer import Again
from heddle.specs import ModelSpec
from heddle.specs.pattern import Layer, layers_of
from heddle.specs.references import links

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
every_form = pytest.mark.parametrize("name", FORMS)


def model_of(name: str) -> HeddleForCausalLM:
    made: HeddleForCausalLM = shaken(build(FORMS[name]))
    return made


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
    oracle = Oracle(FORMS[name], dict(model.state_dict()))
    difference = (model(tokens(40), use_cache=False).logits - oracle.logits(tokens(40))).abs().max()
    assert difference < EXACT


@every_form
def test_the_gradients_of_a_form_are_those_of_its_equation(name: str) -> None:
    model = model_of(name).train()
    ids, pick = tokens(12), torch.randn(2, 12, VOCABULARY, dtype=torch.float64)
    (model(ids).logits * pick).sum().backward()
    named = {key: weight.detach().clone().requires_grad_() for key, weight in model.named_parameters()}
    (Oracle(FORMS[name], named).logits(ids) * pick).sum().backward()
    for key, weight in model.named_parameters():
        assert weight.grad is not None, key
        assert (weight.grad - named[key].grad).abs().max() < EXACT * 1e3, key
        assert weight.grad.abs().max() > 0, key


@every_form
@torch.no_grad()
def test_step_by_step_equals_the_whole_and_left_padding_none(name: str) -> None:
    model, ids = model_of(name), tokens(80)
    whole = model(ids, use_cache=False).logits
    # A prefill, a second piece, single steps.
    assert (in_pieces(model, ids, [67, 70, *range(71, 81)])[0] - whole).abs().max() < EXACT
    padded, mask = left_padded(ids, 9)
    assert (model(padded, attention_mask=mask).logits[:, 9:] - whole).abs().max() < EXACT


@every_form
def test_a_form_survives_saving_and_loading(name: str, tmp_path: Path) -> None:
    # What checkpoints are written in; rates of decay are read in float32 whatever they were.
    model = model_of(name).float()
    model.save_pretrained(tmp_path)
    loaded = HeddleForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(tokens(40)).logits, model(tokens(40)).logits)


@pytest.mark.parametrize("name", ["shared", "shared with a skip"])
def test_a_shared_block_has_one_set_of_weights_and_a_cache_for_each_layer(name: str) -> None:
    model = model_of(name)
    spec = layers_of(FORMS[name])
    shared = [layer.index for layer in spec if layer.spec.shared]
    for index in shared[1:]:
        assert isinstance(model.model.layers[index], Again)
        assert model.model.layer_at(index) is model.model.layers[shared[0]]
    prefixes = {key.split(".")[2] for key in model.state_dict() if key.startswith("model.layers.")}
    assert prefixes == {str(layer.index) for layer in spec} - {str(index) for index in shared[1:]}
    cache = model(tokens(40)).past_key_values
    keys = [cache.layers[index].tensors()["keys"] for index in shared]
    assert len({tensor.data_ptr() for tensor in keys}) == len(shared)
    assert not torch.equal(keys[0], keys[1])
