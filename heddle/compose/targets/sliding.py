"""SmolLM3ForCausalLM and Gemma3ForCausalLM: full and sliding softmax attention, positions by layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from heddle.compose.targets import parts
from heddle.compose.targets.rope import rope_of, rope_parameters
from heddle.compose.targets.target import Config, Key, Model, Refusal, Target, mixers_of


class SmolLM3(Target):
    """SmolLM3 (Hugging Face, July 2025): each layer has positions or none (arXiv 2501.18795)."""

    name = "smollm3"
    config_class, model_class = "SmolLM3Config", "SmolLM3ForCausalLM"
    holds = "softmax attention, with or without positions by layer, full and sliding layers, dense"
    turns = False
    why: ClassVar = {
        "mixer.window": "all its windows are equal",
        "mixer.rope": "all layers that have positions have the same",
        "mixer.qk_norm": "queries and keys have no norm",
        "mixer.head_dim": "a head is hidden_size / heads",
    }

    def fields(self, model: Model) -> dict[str, Any]:
        found, windows = mixers_of(model, "attention"), parts.window_fields(model)
        sizes = parts.attention_fields(model)
        del sizes["head_dim"]
        turned = [mixer["rope"] for mixer in found if mixer["rope"] is not None]
        return {
            **sizes,
            "intermediate_size": parts.width_of(model),
            "hidden_act": "silu",
            "rope_parameters": rope_parameters(turned[0] if turned else None),
            "no_rope_layers": [int(mixer["rope"] is not None) for mixer in found],
            "use_sliding_window": windows["sliding_window"] is not None,
            "attention_bias": found[0].get("bias") == "all",
            "mlp_bias": False,
            **windows,
        }

    def block(self, config: Config, index: int) -> dict[str, Any]:
        mixer = parts.attention_of(
            config,
            rope=rope_of(config["rope_parameters"]) if config["no_rope_layers"][index] else None,
            bias="all" if config["attention_bias"] else "none",
            window=parts.window_of(config, index) if config["use_sliding_window"] else None,
        )
        return {"mixer": mixer, "channel": parts.swiglu(config)}

    def layer_keys(self, config: Config, index: int) -> Iterator[Key]:  # noqa: ARG002
        yield from parts.pre_norm_keys()
        yield from parts.attention_keys(biases="all" if config["attention_bias"] else "none")
        yield from parts.channel_keys()

    def idle(self, config: Config) -> frozenset[str]:
        found = (
            super().idle(config)
            | parts.idle_windows(config)
            | {"no_rope_layer_interval", "max_window_layers"}
        )
        return found if any(config["no_rope_layers"]) else found | {"rope_parameters"}

    def problems(self, model: Model) -> Iterator[Refusal]:
        yield from parts.divides_hidden_size(model)


class Gemma3(Target):
    """Gemma 3, its text model (arXiv 2503.19786): norms on both sides, which hold their gain less 1."""

    name = "gemma3_text"
    config_class, model_class = "Gemma3TextConfig", "Gemma3ForCausalLM"
    holds = "softmax attention with QK-norm, full and sliding layers with positions of their own, sandwich norms, GeGLU"
    channels = ("geglu",)
    why: ClassVar = {
        "mixer.window": "all its windows are equal",
        "mixer.rope": "all full layers have the same positions, and so have all sliding ones",
        "mixer.qk_norm": "each head's query and key is normed",
        "mixer.softcap": "its attention has none",
        "mixer.scale": "it is an integer to the power of -1/2",
        "norm_placement": "its norms stand before and after the parts",
        "embedding_multiplier": "it is the root of hidden_size",
    }
    less = 1.0

    def fields(self, model: Model) -> dict[str, Any]:
        found, windows = mixers_of(model, "attention"), parts.window_fields(model)
        by_type = dict(zip(reversed(windows["layer_types"]), reversed(found), strict=True))
        ropes = {kind: by_type.get(kind, found[0])["rope"] for kind in (parts.FULL, parts.SLIDING)}
        scale = found[0].get("scale")
        return {
            **parts.attention_fields(model),
            "intermediate_size": parts.width_of(model),
            "hidden_activation": "gelu_pytorch_tanh",
            "rope_parameters": {kind: rope_parameters(rope) for kind, rope in ropes.items()},
            "attention_bias": found[0].get("bias") == "all",
            "query_pre_attn_scalar": found[0]["head_dim"] if scale is None else max(1, round(scale**-2)),
            "final_logit_softcapping": model["logit_softcap"],
            "attn_logit_softcapping": None,
            "use_bidirectional_attention": False,
            **windows,
        }

    def scalars(self, config: Config) -> dict[str, Any]:
        softcap = config["final_logit_softcapping"]
        more = {"embedding_multiplier": config["hidden_size"] ** 0.5, "logit_softcap": softcap}
        return {**super().scalars(config), **more}

    def block(self, config: Config, index: int) -> dict[str, Any]:
        mixer = parts.attention_of(
            config,
            rope=rope_of(config["rope_parameters"][config["layer_types"][index]]),
            qk_norm=True,
            scale=config["query_pre_attn_scalar"] ** -0.5,
            bias="all" if config["attention_bias"] else "none",
            window=parts.window_of(config, index),
        )
        return {"mixer": mixer, "channel": parts.swiglu(config, "geglu"), "norm_placement": "sandwich"}

    def layer_keys(self, config: Config, index: int) -> Iterator[Key]:  # noqa: ARG002
        yield from parts.pre_norm_keys(self.less, "pre_feedforward_layernorm")
        yield from parts.post_norm_keys(self.less)
        biases = "all" if config["attention_bias"] else "none"
        yield from parts.attention_keys(norms=True, biases=biases, less=self.less)
        yield from parts.channel_keys()

    def problems(self, model: Model) -> Iterator[Refusal]:
        yield from parts.divides_hidden_size(model)

    def idle(self, config: Config) -> frozenset[str]:
        return (
            super().idle(config)
            | parts.idle_windows(config)
            | {"sliding_window_pattern", "_sliding_window_pattern"}
        )
