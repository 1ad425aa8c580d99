"""Olmo3ForCausalLM and OlmoHybridForCausalLM: norms after parts, one norm for all heads of q and of k."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

from heddle.compose.targets import parts
from heddle.compose.targets.rope import rope_of, rope_parameters
from heddle.compose.targets.target import Config, Key, Model, Refusal, Target, mixers_of, same

# What the output norm of a linear layer adds under its root, whatever the configuration says.
LINEAR_EPS = 1e-5
_WHY = {
    "mixer.qk_norm": "all heads of q, and of k, are normed together",
    "mixer.head_dim": "a head is hidden_size / heads",
}


class Olmo3(Target):
    """OLMo 3 (arXiv 2512.13961): full and sliding layers in any order, each with positions of its own."""

    name = "olmo3"
    config_class, model_class = "Olmo3Config", "Olmo3ForCausalLM"
    holds = "post-norm softmax attention with full QK-norm, full and sliding layers, dense"
    why: ClassVar = {
        **_WHY,
        "mixer.window": "all its windows are equal",
        "mixer.rope": "all full layers have the same positions, and so have all sliding ones",
        "norm_placement": "its norms stand after the parts",
    }

    def fields(self, model: Model) -> dict[str, Any]:
        windows = parts.window_fields(model)
        by_type = dict(
            zip(reversed(windows["layer_types"]), reversed(mixers_of(model, "attention")), strict=True)
        )
        sizes = parts.attention_fields(model)
        del sizes["head_dim"]
        first = mixers_of(model, "attention")[0]
        ropes = {kind: by_type.get(kind, first)["rope"] for kind in (parts.FULL, parts.SLIDING)}
        return {
            **sizes,
            "intermediate_size": parts.width_of(model),
            "hidden_act": "silu",
            "rope_parameters": {kind: rope_parameters(rope) for kind, rope in ropes.items()},
            "attention_bias": first.get("bias") == "all",
            **windows,
        }

    def block(self, config: Config, index: int) -> dict[str, Any]:
        mixer = parts.attention_of(
            config,
            rope=rope_of(config["rope_parameters"][config["layer_types"][index]]),
            qk_norm="full",
            bias="all" if config["attention_bias"] else "none",
            window=parts.window_of(config, index),
        )
        return {"mixer": mixer, "channel": parts.swiglu(config), "norm_placement": "post"}

    def layer_keys(self, config: Config, index: int) -> Iterator[Key]:  # noqa: ARG002
        yield from parts.post_norm_keys()
        yield from parts.attention_keys(norms=True, biases="all" if config["attention_bias"] else "none")
        yield from parts.channel_keys()

    def problems(self, model: Model) -> Iterator[Refusal]:
        yield from parts.divides_hidden_size(model)

    def idle(self, config: Config) -> frozenset[str]:
        return super().idle(config) | parts.idle_windows(config)


class OlmoHybrid(Target):
    """Olmo Hybrid (arXiv 2604.03444): pre-norm Gated DeltaNet layers, post-norm softmax ones without positions.

    On disk the convolution is three tensors, and transformers' own writer cuts them at the wrong rows where K and V differ;
    ours does not, and both are read. It also gives a norm of softmax layers the name that one of linear layers has on disk.
    """

    name = "olmo_hybrid"
    config_class, model_class = "OlmoHybridConfig", "OlmoHybridForCausalLM"
    holds = "pre-norm Gated DeltaNet and post-norm softmax attention with full QK-norm in any order, dense"
    mixers = ("gated_deltanet", "attention")
    needs = mixers
    written: ClassVar = {"post_attention_layernorm": "feedforward_layer_norm"}
    turns = False
    why: ClassVar = {
        **_WHY,
        "mixer.window": "it has no windows",
        "mixer.rope": "every attention layer has the same positions, or none",
        "norm_placement": "norms stand before the parts of linear layers and after those of softmax layers",
        "mixer.norm_eps": f"the output norm of its linear layers has {LINEAR_EPS:g} whatever the rest has",
        "mixer.negative_eigenvalues": "all its linear layers allow them, or none does",
    }

    def fields(self, model: Model) -> dict[str, Any]:
        first, linear = mixers_of(model, "attention")[0], mixers_of(model, "gated_deltanet")[0]
        sizes = parts.attention_fields(model)
        del sizes["head_dim"]
        return {
            **sizes,
            **parts.delta_fields(model),
            "intermediate_size": parts.width_of(model),
            "hidden_act": "silu",
            # A base of null is how the class, and a published configuration, says that there are no positions.
            "rope_parameters": {"rope_type": "default", "rope_theta": None}
            if first["rope"] is None
            else rope_parameters(first["rope"]),
            "attention_bias": first.get("bias") == "all",
            "linear_allow_neg_eigval": linear["negative_eigenvalues"],
            "layer_types": parts.placed(model),
        }

    def block(self, config: Config, index: int) -> dict[str, Any]:
        channel = parts.swiglu(config)
        if config["layer_types"][index] == parts.LINEAR:
            allowed = {"negative_eigenvalues": config["linear_allow_neg_eigval"]}
            mixer = {**parts.delta_of(config), **allowed, "norm_eps": LINEAR_EPS}
            return {"mixer": mixer, "channel": channel}
        rope = config["rope_parameters"]
        none = rope is None or rope.get("rope_theta") is None
        mixer = parts.attention_of(
            config,
            rope=None if none else rope_of(rope),
            qk_norm="full",
            bias="all" if config["attention_bias"] else "none",
        )
        return {"mixer": mixer, "channel": channel, "norm_placement": "post"}

    def layer_keys(self, config: Config, index: int) -> Iterator[Key]:
        yield from parts.channel_keys()
        if config["layer_types"][index] == parts.LINEAR:
            yield same("mixer_norm.weight", "attention_layer_norm.weight")
            yield same("channel_norm.weight", "feedforward_layer_norm.weight")
            yield from self._linear(config)
        else:
            yield from parts.post_norm_keys()
            yield from parts.attention_keys(norms=True, biases="all" if config["attention_bias"] else "none")

    def stored_keys(self, config: Config, rows: Mapping[str, int]) -> Iterator[Key]:
        """What its own writer cut is joined as the class joins it: thirds, rounded up, of all rows of a convolution."""
        for key in self.keys(config):
            cut = tuple(rows.get(name, 0) for name in key.theirs)
            whole = sum(sum(sizes) for sizes in key.pieces)
            third = -(-whole // 3)
            yield (
                replace(key, pieces=(cut,))
                if key.middle and cut == (third, third, whole - 2 * third)
                else key
            )

    def _linear(self, config: Config) -> Iterator[Key]:
        rows = parts.delta_rows(config)
        for ours, theirs, middle in (("qkv_proj", "proj", False), ("conv", "conv1d", True)):
            yield Key(
                (f"mixer.{ours}.weight",),
                tuple(f"linear_attn.{one}_{theirs}.weight" for one in ("q", "k", "v")),
                pieces=(rows,),
                made=((0,), (1,), (2,)),
                middle=middle,
            )
        for ours, theirs in (("z_proj", "g_proj"), ("b_proj", "b_proj"), ("a_proj", "a_proj")):
            yield same(f"mixer.{ours}.weight", f"linear_attn.{theirs}.weight")
        yield same("mixer.norm.weight", "linear_attn.o_norm.weight")
        yield same("mixer.o_proj.weight", "linear_attn.o_proj.weight")
        yield from parts.rate_keys("linear_attn", "A_log", "dt_bias")

    def problems(self, model: Model) -> Iterator[Refusal]:
        yield from parts.divides_hidden_size(model)

    def idle(self, config: Config) -> frozenset[str]:
        first = {"a_log_min", "a_log_max", "dt_min", "dt_max", "dt_init_floor"}
        return super().idle(config) | {f"linear_{name}" for name in first}
