"""Qwen3_5ForCausalLM and Qwen3NextForCausalLM: Gated DeltaNet and gated softmax attention, in any order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from heddle.compose.targets import parts
from heddle.compose.targets.rope import rope_of, rope_parameters
from heddle.compose.targets.target import Config, Key, Model, Target, mixers_of, same


class Qwen3_5(Target):  # noqa: N801 - the class's own name
    """Qwen3.5, its text model: norms hold their gain less 1."""

    name = "qwen3_5_text"
    config_class, model_class = "Qwen3_5TextConfig", "Qwen3_5ForCausalLM"
    holds = "Gated DeltaNet and gated softmax attention with QK-norm in any order, dense"
    mixers = ("gated_deltanet", "attention")
    # A cache without an attention layer cannot count tokens in transformers.
    needs = ("attention",)
    why: ClassVar = {
        "mixer.window": "it has no windows",
        "mixer.qk_norm": "each head's query and key is normed",
        "mixer.gate": "the output is gated",
        "mixer.rope": "every attention layer has the same positions",
        "mixer.negative_eigenvalues": "its write strength is at most 1",
    }
    less = 1.0

    def fields(self, model: Model) -> dict[str, Any]:
        first, types = mixers_of(model, "attention")[0], parts.placed(model)
        interval = parts.interval_of(types)
        return {
            **parts.attention_fields(model),
            **parts.delta_fields(model),
            "intermediate_size": parts.width_of(model),
            "hidden_act": "silu",
            "rope_parameters": rope_parameters(first["rope"], partial=True),
            "attention_bias": first.get("bias") == "all",
            "layer_types": types,
            # SGLang reads the placement from this alone.
            **({} if interval is None else {"full_attention_interval": interval}),
        }

    def block(self, config: Config, index: int) -> dict[str, Any]:
        channel = self._channel(config, index)
        if config["layer_types"][index] == parts.LINEAR:
            return {"mixer": parts.delta_of(config), "channel": channel}
        mixer = parts.attention_of(
            config,
            rope=rope_of(config["rope_parameters"], partial=True),
            qk_norm=True,
            gate=True,
            bias="all" if config["attention_bias"] else "none",
        )
        return {"mixer": mixer, "channel": channel}

    def _channel(self, config: Config, index: int) -> dict[str, Any]:  # noqa: ARG002
        return parts.swiglu(config)

    def layer_keys(self, config: Config, index: int) -> Iterator[Key]:
        yield from parts.pre_norm_keys(self.less)
        yield from self._channel_keys(config, index)
        if config["layer_types"][index] == parts.LINEAR:
            yield from self._linear(config)
        else:
            biases = "all" if config["attention_bias"] else "none"
            yield from parts.attention_keys(norms=True, biases=biases, less=self.less)

    def idle(self, config: Config) -> frozenset[str]:
        # Of text all three positions of M-RoPE are the same.
        mrope = {"rope_parameters.mrope_section", "rope_parameters.mrope_interleaved"}
        return (
            super().idle(config) | mrope | {"full_attention_interval"} | parts.idle_linear(config, "linear_")
        )

    def _channel_keys(self, config: Config, index: int) -> Iterator[Key]:  # noqa: ARG002
        yield from parts.channel_keys()

    def _linear(self, config: Config) -> Iterator[Key]:
        yield from self._projections(config)
        yield same("mixer.conv.weight", "linear_attn.conv1d.weight", middle=True)
        yield same("mixer.norm.weight", "linear_attn.norm.weight")
        yield same("mixer.o_proj.weight", "linear_attn.out_proj.weight")
        yield from parts.rate_keys("linear_attn", "A_log", "dt_bias")

    def _projections(self, config: Config) -> Iterator[Key]:  # noqa: ARG002
        for one in ("qkv", "z", "b", "a"):
            yield same(f"mixer.{one}_proj.weight", f"linear_attn.in_proj_{one}.weight")


class Qwen3Next(Qwen3_5):
    """Qwen3-Next: q, k, v and z of a key head stand together in one matrix, b and a in another; experts in any of the layers."""

    name = "qwen3_next"
    config_class, model_class = "Qwen3NextConfig", "Qwen3NextForCausalLM"
    holds = (
        "Gated DeltaNet and gated softmax attention with QK-norm in any order, dense or with experts by layer"
    )
    channels = ("swiglu", "moe")
    why: ClassVar = {
        **Qwen3_5.why,
        "channel.shared_width": "there is a shared expert, of one size in all layers",
        "channel.shared_gate": "the shared expert has a gate",
        "channel.score": "scores are a softmax",
        "channel.scale": "the experts' sum has no factor",
        "channel.correction_bias": "the choice has no bias",
    }

    def fields(self, model: Model) -> dict[str, Any]:
        routed = [layer["channel"] for layer in model["layers"] if layer["channel"]["kind"] == "moe"]
        found = {**super().fields(model), "num_experts": 0}
        if not routed:
            return found
        first, layers = routed[0], model["layers"]
        return found | {
            "num_experts": first["experts"],
            "num_experts_per_tok": first["active"],
            "moe_intermediate_size": first["width"],
            "shared_expert_intermediate_size": first["shared_width"] or first["width"],
            "norm_topk_prob": first["normalise"],
            "router_aux_loss_coef": first["balance"],
            "decoder_sparse_step": 1,
            "mlp_only_layers": [at for at, layer in enumerate(layers) if layer["channel"]["kind"] != "moe"],
        }

    def _channel(self, config: Config, index: int) -> dict[str, Any]:
        if not _is_routed(config, index):
            return parts.swiglu(config)
        return {
            "kind": "moe",
            "experts": config["num_experts"],
            "active": config["num_experts_per_tok"],
            "width": config["moe_intermediate_size"],
            "shared_width": config["shared_expert_intermediate_size"],
            "shared_gate": True,
            "normalise": config["norm_topk_prob"],
            "balance": config["router_aux_loss_coef"],
        }

    def _channel_keys(self, config: Config, index: int) -> Iterator[Key]:
        if not _is_routed(config, index):
            yield from parts.channel_keys()
            return
        # On disk, where servers read it, each expert has three matrices of its own.
        count, width = config["num_experts"], config["moe_intermediate_size"]
        for ours, theirs, rows in (
            ("gate_up_proj", ("gate_proj", "up_proj"), width),
            ("down_proj", ("down_proj",), config["hidden_size"]),
        ):
            names = tuple(f"mlp.experts.{expert}.{one}.weight" for expert in range(count) for one in theirs)
            cut, made = ((rows,) * len(names),), tuple((number,) for number in range(len(names)))
            yield Key((f"channel.experts.{ours}",), names, pieces=cut, made=made, stacked=count)
        own = [f"shared_expert.{one}_proj" for one in ("gate", "up", "down")]
        for one in ("gate", "shared_expert_gate", *own):
            yield same(f"channel.{one}.weight", f"mlp.{one}.weight")

    def idle(self, config: Config) -> frozenset[str]:
        # `block` reads these two layer by layer.
        found = super().idle(config) | {"decoder_sparse_step", "mlp_only_layers"}
        routed = [_is_routed(config, index) for index in range(config["num_hidden_layers"])]
        if all(routed):
            found |= {"intermediate_size"}
        experts = (
            "num_experts_per_tok",
            "moe_intermediate_size",
            "shared_expert_intermediate_size",
            "norm_topk_prob",
        )
        return found if any(routed) else found | {*experts, "num_experts"}

    def _projections(self, config: Config) -> Iterator[Key]:
        queries, keys, values = parts.delta_rows(config)
        heads, groups = config["linear_num_value_heads"], config["linear_num_key_heads"]
        yield Key(
            ("mixer.qkv_proj.weight", "mixer.z_proj.weight"),
            ("linear_attn.in_proj_qkvz.weight",),
            pieces=((queries, keys, values), (values,)),
            made=((0, 1, 2, 3),),
            groups=groups,
        )
        yield Key(
            ("mixer.b_proj.weight", "mixer.a_proj.weight"),
            ("linear_attn.in_proj_ba.weight",),
            pieces=((heads,), (heads,)),
            made=((0, 1),),
            groups=groups,
        )


def _is_routed(config: Config, index: int) -> bool:
    """Whether a layer of Qwen3-Next has experts."""
    if not config["num_experts"] or index in config["mlp_only_layers"]:
        return False
    return bool((index + 1) % config["decoder_sparse_step"] == 0)
