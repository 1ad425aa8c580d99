"""Qwen2ForCausalLM and Qwen3ForCausalLM: softmax attention, full and sliding layers in any order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from heddle.compose.targets import parts
from heddle.compose.targets.rope import rope_of, rope_parameters
from heddle.compose.targets.target import Config, Key, Model, Refusal, Target, mixers_of


class Qwen3(Target):
    """Qwen3 (arXiv 2505.09388): each head of q and k is normed."""

    name = "qwen3"
    config_class, model_class = "Qwen3Config", "Qwen3ForCausalLM"
    holds = "softmax attention with QK-norm, full and sliding layers, dense"
    why: ClassVar = {
        "mixer.window": "all its windows are equal",
        "mixer.rope": "every layer has the same positions",
        "mixer.qk_norm": "each head's query and key is normed",
    }
    normed: ClassVar[bool] = True

    def fields(self, model: Model) -> dict[str, Any]:
        first, windows = mixers_of(model, "attention")[0], parts.window_fields(model)
        return {
            **parts.attention_fields(model),
            "intermediate_size": parts.width_of(model),
            "hidden_act": "silu",
            "rope_parameters": rope_parameters(first["rope"]),
            "attention_bias": first.get("bias") == "all",
            "use_sliding_window": windows["sliding_window"] is not None,
            **windows,
        }

    def block(self, config: Config, index: int) -> dict[str, Any]:
        mixer = parts.attention_of(
            config,
            rope=rope_of(config["rope_parameters"]),
            qk_norm=self.normed,
            bias=self._biases(config),
            window=parts.window_of(config, index),
        )
        return {"mixer": mixer, "channel": parts.swiglu(config)}

    def layer_keys(self, config: Config, index: int) -> Iterator[Key]:  # noqa: ARG002
        yield from parts.pre_norm_keys()
        yield from parts.attention_keys(norms=self.normed, biases=self._biases(config))
        yield from parts.channel_keys()

    def idle(self, config: Config) -> frozenset[str]:
        # It only says which layers slide where `layer_types` does not.
        return super().idle(config) | parts.idle_windows(config) | {"max_window_layers"}

    def _biases(self, config: Config) -> str:
        return "all" if config["attention_bias"] else "none"


class Qwen2(Qwen3):
    """Qwen2 (arXiv 2407.10671): biases of q, k and v, no norm of them; a head is hidden_size / heads."""

    name = "qwen2"
    config_class, model_class = "Qwen2Config", "Qwen2ForCausalLM"
    holds = "softmax attention with biases of q, k and v, full and sliding layers, dense"
    why: ClassVar = {
        **Qwen3.why,
        "mixer.qk_norm": "queries and keys have no norm",
        "mixer.bias": "q, k and v have a bias, and the output has none",
        "mixer.head_dim": "a head is hidden_size / heads",
    }
    normed = False

    def fields(self, model: Model) -> dict[str, Any]:
        found = super().fields(model)
        return {name: value for name, value in found.items() if name not in ("attention_bias", "head_dim")}

    def problems(self, model: Model) -> Iterator[Refusal]:
        yield from parts.divides_hidden_size(model)

    def _biases(self, config: Config) -> str:  # noqa: ARG002
        return "qkv"
