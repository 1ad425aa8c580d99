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
        if config["layer_types"][index] == parts.LINEAR:
            return {"mixer": parts.delta_of(config), "channel": parts.swiglu(config)}
        mixer = parts.attention_of(
            config,
            rope=rope_of(config["rope_parameters"], partial=True),
            qk_norm=True,
            gate=True,
            bias="all" if config["attention_bias"] else "none",
        )
        return {"mixer": mixer, "channel": parts.swiglu(config)}

    def layer_keys(self, config: Config, index: int) -> Iterator[Key]:
        yield from parts.pre_norm_keys(self.less)
        yield from parts.channel_keys()
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
    """Qwen3-Next without experts: q, k, v and z of a key head stand together in one matrix, b and a in another."""

    name = "qwen3_next"
    config_class, model_class = "Qwen3NextConfig", "Qwen3NextForCausalLM"

    def fields(self, model: Model) -> dict[str, Any]:
        return {**super().fields(model), "num_experts": 0}

    def idle(self, config: Config) -> frozenset[str]:
        experts = {
            "decoder_sparse_step", "moe_intermediate_size", "shared_expert_intermediate_size", "num_experts_per_tok",
            "norm_topk_prob", "mlp_only_layers",
        }  # fmt: skip
        return super().idle(config) | (experts if config["num_experts"] == 0 else set())

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
