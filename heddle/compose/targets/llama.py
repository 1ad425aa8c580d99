"""LlamaForCausalLM: dense softmax attention, pre-norm, without windows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from heddle.compose.targets import parts
from heddle.compose.targets.rope import rope_of, rope_parameters
from heddle.compose.targets.target import Config, Key, Model, Refusal, Target, mixers_of


class Llama(Target):
    """Llama (arXiv 2302.13971, 2407.21783). It reads `layer_types` with windows and ignores them, so windows are refused."""

    name = "llama"
    config_class, model_class = "LlamaConfig", "LlamaForCausalLM"
    holds = "softmax attention, dense"
    why: ClassVar = {
        "mixer.window": "its mask has no windows",
        "mixer.rope": "every layer has the same positions",
        "mixer.qk_norm": "queries and keys have no norm",
    }

    def fields(self, model: Model) -> dict[str, Any]:
        first = mixers_of(model, "attention")[0]
        return {
            **parts.attention_fields(model),
            "intermediate_size": parts.width_of(model),
            "hidden_act": "silu",
            "rope_parameters": rope_parameters(first["rope"]),
            "attention_bias": first.get("bias") == "all",
            "mlp_bias": False,
        }

    def block(self, config: Config, index: int) -> dict[str, Any]:  # noqa: ARG002
        bias = "all" if config["attention_bias"] else "none"
        mixer = parts.attention_of(config, rope=rope_of(config["rope_parameters"]), bias=bias)
        return {"mixer": mixer, "channel": parts.swiglu(config)}

    def layer_keys(self, config: Config, index: int) -> Iterator[Key]:  # noqa: ARG002
        yield from parts.pre_norm_keys()
        yield from parts.attention_keys(biases="all" if config["attention_bias"] else "none")
        yield from parts.channel_keys()

    def problems(self, model: Model) -> Iterator[Refusal]:
        yield from parts.divides_hidden_size(model)


class Mistral(Target):
    """Mistral (arXiv 2310.06825): all layers have one window, or none."""

    name = "mistral"
    config_class, model_class = "MistralConfig", "MistralForCausalLM"
    holds = "softmax attention, one window or none for all layers, dense"
    why: ClassVar = {
        "mixer.window": "all its layers have the same window",
        "mixer.rope": "every layer has the same positions",
        "mixer.qk_norm": "queries and keys have no norm",
        "mixer.bias": "its projections have no bias",
    }

    def fields(self, model: Model) -> dict[str, Any]:
        first = mixers_of(model, "attention")[0]
        return {
            **parts.attention_fields(model),
            "intermediate_size": parts.width_of(model),
            "hidden_act": "silu",
            "rope_parameters": rope_parameters(first["rope"]),
            "sliding_window": first["window"],
        }

    def block(self, config: Config, index: int) -> dict[str, Any]:  # noqa: ARG002
        rope = rope_of(config["rope_parameters"])
        mixer = parts.attention_of(config, rope=rope, window=config["sliding_window"])
        return {"mixer": mixer, "channel": parts.swiglu(config)}

    def layer_keys(self, config: Config, index: int) -> Iterator[Key]:  # noqa: ARG002
        yield from parts.pre_norm_keys()
        yield from parts.attention_keys()
        yield from parts.channel_keys()
