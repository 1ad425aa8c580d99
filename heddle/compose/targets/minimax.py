"""MiniMaxForCausalLM: lightning attention and softmax attention in any order, experts in every layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from heddle.compose.targets import parts
from heddle.compose.targets.rope import rope_of, rope_parameters
from heddle.compose.targets.target import Config, Key, Model, Target, mixers_of, same

# What the output norm of a linear layer adds under its root, whatever the configuration says.
LINEAR_EPS = 1e-6


class MiniMax(Target):
    """MiniMax-Text-01 (arXiv 2501.08313): what goes past a part is the normed stream.

    The class asks its first layer how many tokens there were. A folder whose first layer is linear is exact without a cache; with
    one, single steps with positions are right, as `generate` makes them of a prompt without padding, up to the end of a window;
    the rest is not. Wherever the linear layers stand, beams are wrong with a cache: it is sorted anew without their states.
    """

    name = "minimax"
    config_class, model_class = "MiniMaxConfig", "MiniMaxForCausalLM"
    holds = "lightning attention and softmax attention in any order, normed residual, experts in every layer"
    mixers = ("lightning", "attention")
    channels = ("moe",)
    needs = ("attention",)
    why: ClassVar = {
        "mixer.heads": "linear and softmax layers have as many",
        "mixer.head_dim": "linear and softmax layers have one size",
        "mixer.window": "all softmax layers have one window, or none",
        "mixer.rope": "every softmax layer has the same positions, and the whole of a head turns",
        "mixer.slopes": "its decays are the geometric ones",
        "mixer.short_conv": "it has no convolution",
        "mixer.norm_eps": f"the norm of linear layers has {LINEAR_EPS:g} whatever the rest has",
        "residual": "the normed stream goes past a part, and layers of a kind have the same factors",
        "channel_residual": "the normed stream goes past a part, and all layers have the same factors",
        "channel.shared_width": "there is no shared expert",
        "channel.normalise": "the weights of a token's experts sum to 1",
        "channel.score": "scores are a softmax",
        "channel.scale": "the experts' sum has no factor",
        "channel.correction_bias": "the choice has no bias",
    }

    def fields(self, model: Model) -> dict[str, Any]:
        first, experts = mixers_of(model, "attention")[0], model["layers"][0]["channel"]
        factors = {
            f"{name}_{factor}_factor": residual[of]
            for name, residual in _residuals(model).items()
            for factor, of in (("alpha", "stream"), ("beta", "branch"))
        }
        return {
            **parts.attention_fields(model),
            "hidden_act": "silu",
            "rope_parameters": rope_parameters(first["rope"]),
            "sliding_window": first["window"],
            "layer_types": parts.placed(model),
            "intermediate_size": experts["width"],
            "num_local_experts": experts["experts"],
            "num_experts_per_tok": experts["active"],
            "router_aux_loss_coef": experts["balance"],
            **factors,
        }

    def block(self, config: Config, index: int) -> dict[str, Any]:
        linear = config["layer_types"][index] == parts.LINEAR
        if linear:
            mixer = {**parts.attention_of(config), "kind": "lightning", "norm_eps": LINEAR_EPS}
            del mixer["kv_heads"]
        else:
            rope = rope_of(config["rope_parameters"])
            mixer = parts.attention_of(config, rope=rope, window=config["sliding_window"])
        channel = {
            "kind": "moe",
            "experts": config["num_local_experts"],
            "active": config["num_experts_per_tok"],
            "width": config["intermediate_size"],
            "balance": config["router_aux_loss_coef"],
        }
        part = "linear_attn" if linear else "full_attn"
        return {
            "mixer": mixer,
            "channel": channel,
            "residual": _residual(config, part),
            "channel_residual": _residual(config, "mlp"),
        }

    def layer_keys(self, config: Config, index: int) -> Iterator[Key]:
        yield from parts.pre_norm_keys()
        yield from parts.stacked_keys(
            config["num_local_experts"], config["intermediate_size"], config["hidden_size"]
        )
        yield same("channel.gate.weight", "block_sparse_moe.gate.weight")
        if config["layer_types"][index] == parts.LINEAR:
            names = {"qkv_proj": "qkv_proj", "gate_proj": "output_gate", "norm": "norm", "o_proj": "out_proj"}
            for ours, theirs in names.items():
                yield same(f"mixer.{ours}.weight", f"self_attn.{theirs}.weight")
        else:
            yield from parts.attention_keys()

    def miscounts(self, model: Model) -> bool:
        windowed = any(mixer["window"] is not None for mixer in mixers_of(model, "attention"))
        return windowed and bool(model["layers"][0]["mixer"]["kind"] == "lightning")

    def loses_beams(self, model: Model) -> bool:
        return bool(mixers_of(model, "lightning"))

    def warning(self, model: Model) -> str:
        if not self.loses_beams(model):
            return ""
        beams = (
            "right without a cache; with one transformers 5.23 finds other beams, as the class leaves the states of linear "
            "layers where they are while beams change places"
        )
        if model["layers"][0]["mixer"]["kind"] != "lightning":
            return beams
        where = "past its window, " if self.miscounts(model) else ""
        return (
            f"{beams}, and is wrong {where}after padding, and where a call goes on with several tokens or without position_ids, "
            "as it asks its first layer for the number of tokens, and a linear one has none"
        )

    def idle(self, config: Config) -> frozenset[str]:
        # Noise that only training has, and how many tokens are computed together.
        found = super().idle(config) | {"router_jitter_noise", "block_size"}
        if parts.LINEAR not in config["layer_types"]:
            found |= {"linear_attn_alpha_factor", "linear_attn_beta_factor"}
        return found


def _residuals(model: Model) -> dict[str, Any]:
    """How the parts of each kind go past, of several the first; of a kind that is not there plainly."""
    plain = {"stream": 1.0, "branch": 1.0}
    layers = model["layers"]
    found = {"mlp": layers[0].get("channel_residual", plain)}
    for name, kind in (("linear_attn", "lightning"), ("full_attn", "attention")):
        of_kind = [layer for layer in layers if layer["mixer"]["kind"] == kind]
        found[name] = of_kind[0].get("residual", plain) if of_kind else plain
    return found


def _residual(config: Config, part: str) -> dict[str, Any]:
    return {
        "of": "normed",
        "stream": float(config[f"{part}_alpha_factor"]),
        "branch": float(config[f"{part}_beta_factor"]),
    }
