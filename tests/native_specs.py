"""Random specs for each native class of transformers, models of them whose every weight counts, and their folders."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from heddle.compose.build import build
from heddle.compose.hf.native import write_native
from heddle.compose.targets.catalogue import BY_NAME
from heddle.specs import ModelSpec

HIDDEN = 32
IDS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
Data = dict[str, Any]
# A spec that qwen3_5_text holds.
HYBRID = """\
version: 1
name: hybrid
model:
  vocab_size: 256
  hidden_size: 32
  context_length: 128
  blocks:
    linear: {mixer: {kind: gated_deltanet, heads: 2}, channel: {kind: swiglu}}
    full:
      mixer: {kind: attention, heads: 2, head_dim: 16, qk_norm: true, gate: true, rope: {fraction: 0.5}}
      channel: {kind: swiglu}
  layers: [linear, full, full]
"""


def scaling(some: random.Random) -> Data | None:
    factor = some.choice([2.0, 4.0])
    return some.choice(
        [
            None,
            {"kind": "linear", "factor": factor},
            {"kind": "llama3", "factor": factor, "original_length": 32},
            {"kind": "yarn", "factor": factor, "original_length": 16, "beta_fast": 8.0},
        ]
    )


def rope(some: random.Random, **more: Any) -> Data:
    return {"theta": some.choice([500.0, 1e4, 1e6]), "scaling": scaling(some), **more}


def swiglu(some: random.Random, kind: str = "swiglu") -> Data:
    return {"kind": kind, "width": some.choice([24, 40])}


def heads(some: random.Random, *, free: bool = False) -> Data:
    count = some.choice([2, 4])
    sizes = {"kind": "attention", "heads": count, "kv_heads": some.choice([1, 2])}
    return {**sizes, "head_dim": some.choice([8, 12, 16])} if free else sizes


def delta(some: random.Random, **more: Any) -> Data:
    count = some.choice([1, 2])
    sizes = {"heads": count, "value_heads": count * some.choice([1, 2]), "short_conv": some.choice([2, 3, 4])}
    dims = {"head_dim": some.choice([8, 12]), "value_dim": some.choice([8, 16])}
    return {"kind": "gated_deltanet", **sizes, **dims, **more}


def mamba(some: random.Random, **more: Any) -> Data:
    count = some.choice([2, 4])
    sizes = {"heads": count, "head_dim": HIDDEN * some.choice([1, 2]) // count, "groups": some.choice([1, 2])}
    flags = {"conv_bias": some.random() < 0.5, "bias": some.random() < 0.5}
    return {"kind": "mamba2", **sizes, **flags, "state_dim": some.choice([4, 8]), "short_conv": 3, **more}


def stack(some: random.Random, blocks: Data, **fields: Any) -> Data:
    """Two or three layers in any order, each block at least once."""
    names = [*blocks, *(some.choice([*blocks]) for _ in range(3 - len(blocks)))]
    some.shuffle(names)
    sizes = {"vocab_size": 256, "hidden_size": HIDDEN, "context_length": 512}
    tied = {"tie_embeddings": some.random() < 0.5, "norm_eps": some.choice([1e-5, 1e-6])}
    return {**sizes, **tied, **fields, "blocks": blocks, "layers": names}


def dense(some: random.Random, first: Data, second: Data, **block: Any) -> Data:
    """Two kinds of layers that differ in their mixers alone."""
    common = {"channel": swiglu(some, block.pop("channel", "swiglu")), **block}
    return {"a": {"mixer": first, **common}, "b": {"mixer": second, **common}}


def llama(some: random.Random) -> Data:
    mixer = heads(some, free=True) | {"rope": rope(some), "bias": some.choice(["none", "all"])}
    return stack(some, {"a": {"mixer": mixer, "channel": swiglu(some)}})


def mistral(some: random.Random) -> Data:
    mixer = heads(some, free=True) | {"rope": rope(some), "window": some.choice([None, 5, 40])}
    return stack(some, {"a": {"mixer": mixer, "channel": swiglu(some)}})


def qwen2(some: random.Random) -> Data:
    mixer = heads(some) | {"rope": rope(some), "bias": "qkv"}
    return stack(some, dense(some, mixer, mixer | {"window": some.choice([3, 20])}))


def qwen3(some: random.Random) -> Data:
    mixer = heads(some, free=True) | {
        "rope": rope(some),
        "qk_norm": True,
        "bias": some.choice(["none", "all"]),
    }
    return stack(some, dense(some, mixer, mixer | {"window": some.choice([3, 20])}))


def qwen_hybrid(some: random.Random) -> Data:
    positions = rope(some, fraction=some.choice([0.25, 0.5, 1.0]))
    mixer = heads(some) | {"head_dim": 16, "rope": positions, "qk_norm": True, "gate": True}
    return stack(some, dense(some, mixer, delta(some)))


def qwen_next(some: random.Random) -> Data:
    data = qwen_hybrid(some)
    moe = {"kind": "moe", "experts": 4, "active": 2, "width": 8, "shared_width": 16, "shared_gate": True}
    moe |= {"normalise": some.random() < 0.5, "balance": some.choice([0.01, 0.1])}
    for name in some.choice([(), ("a",), ("b",), ("a", "b")]):
        data["blocks"][name]["channel"] = moe
    return data


def olmo_hybrid(some: random.Random) -> Data:
    mixer = heads(some) | {"rope": some.choice([None, rope(some)]), "qk_norm": "full"}
    blocks = dense(some, mixer, delta(some, negative_eigenvalues=some.random() < 0.5, norm_eps=1e-5))
    blocks["a"]["norm_placement"] = "post"
    return stack(some, blocks)


def granite(some: random.Random) -> Data:
    mixer = heads(some) | {"rope": some.choice([None, rope(some)]), "scale": some.choice([None, 0.2])}
    blocks = dense(some, mixer, mamba(some, groups=1), residual={"branch": some.choice([1.0, 0.3])})
    if some.random() < 0.5:
        experts = {
            "kind": "moe",
            "experts": 4,
            "active": 2,
            "width": 8,
            "shared_width": some.choice([12, 24]),
        }
        for block in blocks.values():
            block["channel"] = experts | {"balance": 0.001}
    factors = {"embedding_multiplier": some.choice([1.0, 3.0]), "logit_multiplier": some.choice([1.0, 0.3])}
    return stack(some, blocks, **factors)


def bamba(some: random.Random) -> Data:
    mixer = heads(some) | {"rope": rope(some, fraction=0.5)}
    return stack(some, dense(some, mixer, mamba(some, groups=1)))


def falcon_h1(some: random.Random) -> Data:
    attention = heads(some, free=True) | {"rope": rope(some), "key_multiplier": some.choice([1.0, 0.4])}
    ssm = mamba(some, norm=some.choice(["none", "before_gate", "after_gate"]))
    both = {"kind": "parallel", "mixers": [attention, ssm], "weights": some.choice([None, [0.9, 0.3]])}
    block = {"mixer": both, "channel": swiglu(some)}
    return stack(some, {"a": block}, embedding_multiplier=2.0, logit_multiplier=0.5)


def olmo3(some: random.Random) -> Data:
    mixer = heads(some) | {"rope": rope(some), "qk_norm": "full"}
    local = mixer | {"window": some.choice([3, 20]), "rope": {"theta": 1e4}}
    return stack(some, dense(some, mixer, local, norm_placement="post"))


def smollm3(some: random.Random) -> Data:
    mixer = heads(some) | {"rope": rope(some)}
    return stack(some, dense(some, mixer, mixer | {"rope": None, "window": some.choice([None, 7])}))


def gemma3(some: random.Random) -> Data:
    mixer = heads(some, free=True) | {
        "rope": rope(some),
        "qk_norm": True,
        "scale": some.choice([16, 24]) ** -0.5,
    }
    local = mixer | {"window": some.choice([3, 20]), "rope": {"theta": 1e4}}
    blocks = dense(some, mixer, local, channel="geglu", norm_placement="sandwich")
    softcap = some.choice([None, 5.0])
    return stack(some, blocks, embedding_multiplier=HIDDEN**0.5, logit_softcap=softcap)


def kimi(some: random.Random) -> Data:
    delta_heads, size = some.choice([1, 2]), some.choice([8, 12])
    linear = {"kind": "kda", "heads": delta_heads, "head_dim": size, "short_conv": some.choice([2, 4])}
    full = {
        "kind": "mla",
        "heads": some.choice([1, 3]),
        "kv_lora_rank": some.choice([6, 20]),
        "norm_eps": 1e-6,
    }
    full |= {"qk_nope_head_dim": some.choice([6, 10]), "qk_rope_head_dim": some.choice([2, 4])}
    full |= {"q_lora_rank": some.choice([None, 12]), "v_head_dim": some.choice([8, 12])}
    blocks = dense(some, full, linear)
    moe = {"kind": "moe", "experts": 4, "active": 2, "width": 8, "shared_width": some.choice([8, 16])}
    moe |= {"score": "sigmoid", "correction_bias": True, "scale": some.choice([1.0, 2.5])}
    moe |= {"normalise": some.random() < 0.5, "balance": some.choice([0.0, 0.01])}
    for name in some.choice([(), ("a",), ("b",), ("a", "b")]):
        blocks[name]["channel"] = moe
    return stack(some, blocks, tie_embeddings=False)


def minimax(some: random.Random) -> Data:
    count, size = some.choice([2, 4]), some.choice([8, 12])
    full = {"kind": "attention", "heads": count, "kv_heads": some.choice([1, 2]), "head_dim": size}
    full |= {"rope": rope(some), "window": some.choice([None, 7])}
    linear = {"kind": "lightning", "heads": count, "head_dim": size, "norm_eps": 1e-6}
    moe = {"kind": "moe", "experts": 4, "active": 2, "width": 8, "balance": some.choice([0.001, 0.1])}
    past = {"of": "normed", "stream": some.choice([1.0, 2.0]), "branch": some.choice([1.0, 0.5])}
    blocks = {
        "a": {"mixer": full, "channel": moe, "residual": past},
        "b": {"mixer": linear, "channel": moe, "residual": {"of": "normed"}, "channel_residual": past},
    }
    return stack(some, blocks)


SPECS: dict[str, Callable[[random.Random], Data]] = {
    "llama": llama, "mistral": mistral, "qwen2": qwen2, "qwen3": qwen3, "qwen3_5_text": qwen_hybrid, "qwen3_next": qwen_next,
    "olmo_hybrid": olmo_hybrid, "granitemoehybrid": granite, "bamba": bamba, "falcon_h1": falcon_h1, "olmo3": olmo3,
    "smollm3": smollm3, "gemma3_text": gemma3, "kimi_linear": kimi, "minimax": minimax,
}  # fmt: skip


def model_spec(name: str, seed: int = 0) -> ModelSpec:
    return ModelSpec.model_validate(SPECS[name](random.Random(f"{name} {seed}")))


def without_period(name: str, seed: int = 0) -> ModelSpec:
    """Seven layers whose blocks repeat no pattern, where the class has two."""
    some = random.Random(f"{name} {seed}")
    data = SPECS[name](some)
    blocks = [*data["blocks"]]
    while True:
        layers = [some.choice(blocks) for _ in range(7)]
        repeats = any(layers == (layers[:period] * 7)[:7] for period in range(1, 4))
        if len(blocks) == 1 or not repeats:
            return ModelSpec.model_validate({**data, "layers": layers})


@torch.no_grad()
def ready(spec: ModelSpec, seed: int = 0) -> Any:
    """A model whose every weight counts."""
    model = build(spec, seed=seed).eval()
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith(".D"):
            nn.init.uniform_(parameter, 0.5, 1.5)
        elif parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)
        elif name.endswith(".bias"):
            nn.init.normal_(parameter, std=0.2)
    return model


def begun(spec: ModelSpec, seed: int = 0) -> Any:
    """A model with the weights that it begins its training with."""
    return build(spec, seed=seed).eval()


def written(model: Any, name: str, folder: Path) -> Path:
    folder.mkdir()
    write_native(model, folder, BY_NAME[name], IDS)
    return folder
