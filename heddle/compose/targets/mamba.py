"""GraniteMoeHybridForCausalLM, BambaForCausalLM and FalconH1ForCausalLM: Mamba-2 and softmax attention."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from heddle.compose.targets import falcon_factors, parts
from heddle.compose.targets.rope import rope_of, rope_parameters
from heddle.compose.targets.target import Config, Factors, Key, Model, Refusal, Target, mixers_of, same


def mamba_fields(mixer: Mapping[str, Any], hidden_size: int) -> dict[str, Any]:
    """Sizes of a Mamba-2 mixer. The classes count its width in hidden sizes."""
    return {
        "mamba_n_heads": mixer["heads"],
        "mamba_d_head": mixer["head_dim"],
        "mamba_d_state": mixer["state_dim"],
        "mamba_n_groups": mixer["groups"],
        "mamba_d_conv": mixer["short_conv"],
        "mamba_expand": max(1, mixer["heads"] * mixer["head_dim"] // hidden_size),
        "mamba_conv_bias": mixer["conv_bias"],
        "mamba_proj_bias": mixer["bias"],
    }


def mamba_of(config: Config, norm: str = "after_gate") -> dict[str, Any]:
    """A Mamba-2 mixer of the sizes of a configuration."""
    return {
        "kind": "mamba2",
        "heads": config["mamba_n_heads"],
        "head_dim": config["mamba_d_head"],
        "state_dim": config["mamba_d_state"],
        "groups": config["mamba_n_groups"],
        "short_conv": config["mamba_d_conv"],
        "conv_bias": config["mamba_conv_bias"],
        "bias": config["mamba_proj_bias"],
        "norm": norm,
    }


def mamba_keys(config: Config, ours: str = "mixer", *, norm: bool = True) -> Iterator[Key]:
    """Weights of a Mamba-2 mixer; the rows of its projection stand in the same order on both sides."""
    biases = ("in_proj", "o_proj") if config["mamba_proj_bias"] else ()
    names = {"in_proj": "in_proj", "o_proj": "out_proj"}
    for one in names:
        yield same(f"{ours}.{one}.weight", f"mamba.{names[one]}.weight")
    for one in biases:
        yield same(f"{ours}.{one}.bias", f"mamba.{names[one]}.bias")
    yield same(f"{ours}.conv.weight", "mamba.conv1d.weight", middle=True)
    if config["mamba_conv_bias"]:
        yield same(f"{ours}.conv.bias", "mamba.conv1d.bias")
    for one in ("A_log", "dt_bias", "D"):
        yield same(f"{ours}.{one}", f"mamba.{one}")
    if norm:
        yield same(f"{ours}.norm.weight", "mamba.norm.weight")


def mamba_problems(model: Model) -> Iterator[Refusal]:
    """For classes whose Mamba-2 is so many hidden sizes wide, and whose norm older readers take over all groups at once.

    transformers 5.23 norms each group by itself; its versions before, and ports of them, do not, and would load the same folder.
    """
    size = model["hidden_size"]
    told: set[str] = set()
    for index, layer in enumerate(model["layers"]):
        mixer = layer["mixer"]
        found: dict[str, str] = {}
        if mixer["kind"] != "mamba2":
            continue
        if mixer["heads"] * mixer["head_dim"] % size:
            width = mixer["heads"] * mixer["head_dim"]
            found["head_dim"] = (
                f"is {mixer['head_dim']}; heads · head_dim, here {width}, is a multiple of {size} there"
            )
        if mixer["groups"] > 1:
            found["groups"] = (
                f"is {mixer['groups']}; readers of this class differ in the norm of several groups, so it is 1"
            )
        for field in [one for one in found if one not in told]:
            told.add(field)
            yield Refusal(f"layers.{index}.mixer.{field}", found[field])


def mamba_warning(model: Model) -> str:
    """What classes do wrong with a Mamba-2 whose projections have a bias."""
    mixers = [one for layer in model["layers"] for one in (layer["mixer"], *layer["mixer"].get("mixers", ()))]
    if not any(one["kind"] == "mamba2" and one["bias"] for one in mixers):
        return ""
    return (
        "right without padding; after padding on the left transformers 5.23 is wrong: the class masks padding before its "
        "projection, whose bias then reaches the convolution"
    )


def reciprocal(factor: float) -> float:
    """The number whose reciprocal is `factor`, where there is one; else one near it."""
    if factor == 0:
        return 1.0
    near = 1.0 / factor
    tried = (near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf))
    return next((one for one in tried if 1.0 / one == factor), near)


_MAMBA_WHY = {
    "mixer.norm": "the norm of its Mamba-2 layers stands after the gate",
    "mixer.window": "it has no windows",
    "mixer.qk_norm": "queries and keys have no norm",
    "mixer.head_dim": "a softmax head is hidden_size / heads, and all Mamba-2 layers have the same",
}


class Granite(Target):
    """Granite 4.0 hybrid (IBM, October 2025), dense or with experts in every layer. A dense block is its "shared" one."""

    name = "granitemoehybrid"
    config_class, model_class = "GraniteMoeHybridConfig", "GraniteMoeHybridForCausalLM"
    holds = "Mamba-2 and softmax attention in any order, with or without positions, fixed factors, dense or all with experts"
    mixers = ("mamba2", "attention")
    channels = ("swiglu", "moe")
    needs = ("attention",)
    turns = False
    why: ClassVar = {
        **_MAMBA_WHY,
        "mixer.rope": "every attention layer has the same positions, or none",
        "residual": "all parts have one factor of their output, and nothing else",
        "channel_residual": "all parts have one factor of their output, and nothing else",
        "logit_multiplier": "it is the reciprocal of a number",
        "channel": "all layers have the same experts, or none has",
        "channel.shared_width": "there is a shared expert",
        "channel.shared_gate": "the shared expert has no gate",
        "channel.normalise": "the weights of a token's experts sum to 1",
        "channel.score": "scores are a softmax",
        "channel.scale": "the experts' sum has no factor",
        "channel.correction_bias": "the choice has no bias",
    }

    def fields(self, model: Model) -> dict[str, Any]:
        first, linear = mixers_of(model, "attention")[0], mixers_of(model, "mamba2")
        sizes = parts.attention_fields(model)
        del sizes["head_dim"]
        return {
            **sizes,
            **(mamba_fields(linear[0], model["hidden_size"]) if linear else {}),
            **_expert_fields(model),
            "hidden_act": "silu",
            "rope_parameters": rope_parameters(first["rope"]),
            "position_embedding_type": None if first["rope"] is None else "rope",
            "attention_bias": first.get("bias") == "all",
            "attention_multiplier": first.get("scale", first["head_dim"] ** -0.5),
            "embedding_multiplier": model["embedding_multiplier"],
            "residual_multiplier": model["layers"][0].get("residual", {}).get("branch", 1.0),
            "logits_scaling": reciprocal(model["logit_multiplier"]),
            "layer_types": parts.placed(model),
        }

    def scalars(self, config: Config) -> dict[str, Any]:
        factors = {"embedding_multiplier": config["embedding_multiplier"]}
        return {**super().scalars(config), **factors, "logit_multiplier": 1.0 / config["logits_scaling"]}

    def block(self, config: Config, index: int) -> dict[str, Any]:
        common = {
            "channel": _channel_of(config),
            "residual": {"branch": config["residual_multiplier"]},
        }
        if config["layer_types"][index] == parts.LINEAR:
            return {"mixer": mamba_of(config), **common}
        mixer = parts.attention_of(
            config,
            rope=rope_of(config["rope_parameters"]) if config["position_embedding_type"] == "rope" else None,
            scale=config["attention_multiplier"],
            bias="all" if config["attention_bias"] else "none",
        )
        return {"mixer": mixer, **common}

    def layer_keys(self, config: Config, index: int) -> Iterator[Key]:
        yield from parts.pre_norm_keys()
        width, shared = config["shared_intermediate_size"], "channel"
        if config["num_local_experts"]:
            shared = "channel.shared_expert"
            yield same("channel.gate.weight", "block_sparse_moe.router.layer.weight")
            yield same("channel.experts.gate_up_proj", "block_sparse_moe.input_linear.weight")
            yield same("channel.experts.down_proj", "block_sparse_moe.output_linear.weight")
        yield Key(
            (f"{shared}.gate_proj.weight", f"{shared}.up_proj.weight"),
            ("shared_mlp.input_linear.weight",),
            pieces=((width,), (width,)),
            made=((0, 1),),
        )
        yield same(f"{shared}.down_proj.weight", "shared_mlp.output_linear.weight")
        if config["layer_types"][index] == parts.LINEAR:
            yield from mamba_keys(config)
        else:
            yield from parts.attention_keys(biases="all" if config["attention_bias"] else "none")

    def problems(self, model: Model) -> Iterator[Refusal]:
        yield from mamba_problems(model)
        yield from parts.divides_hidden_size(model)

    def warning(self, model: Model) -> str:
        return mamba_warning(model)

    def idle(self, config: Config) -> frozenset[str]:
        # Published files tell things that the class does not read, and anything but "rope" means no positions.
        unread = {"init_method", "normalization_function", "position_embedding_type"}
        found = super().idle(config) | parts.idle_linear(config, "mamba_") | unread
        found |= set() if config["num_local_experts"] else {"num_experts_per_tok", "intermediate_size"}
        return found if config["position_embedding_type"] == "rope" else found | {"rope_parameters"}


def _expert_fields(model: Model) -> dict[str, Any]:
    """Widths of Granite's channel blocks and, if it has some, of its experts; of several the first."""
    routed = next((one for layer in model["layers"] if (one := layer["channel"])["kind"] == "moe"), None)
    if routed is None:
        return {"shared_intermediate_size": parts.width_of(model), "num_local_experts": 0}
    return {
        "shared_intermediate_size": routed["shared_width"] or routed["width"],
        "num_local_experts": routed["experts"],
        "num_experts_per_tok": routed["active"],
        "intermediate_size": routed["width"],
        "router_aux_loss_coef": routed["balance"],
    }


def _channel_of(config: Config) -> dict[str, Any]:
    """The channel block of every layer of Granite."""
    if not config["num_local_experts"]:
        return {"kind": "swiglu", "width": config["shared_intermediate_size"]}
    return {
        "kind": "moe",
        "experts": config["num_local_experts"],
        "active": config["num_experts_per_tok"],
        "width": config["intermediate_size"],
        "shared_width": config["shared_intermediate_size"],
        "balance": config["router_aux_loss_coef"],
    }


class Bamba(Target):
    """Bamba (IBM, December 2024): half of each head turns."""

    name = "bamba"
    config_class, model_class = "BambaConfig", "BambaForCausalLM"
    holds = "Mamba-2 and softmax attention in any order, half of each head turned, dense"
    mixers = ("mamba2", "attention")
    needs = ("attention",)
    why: ClassVar = {
        **_MAMBA_WHY,
        "mixer.rope": "half of each head turns, by the same positions in all layers",
    }
    last_norm = "model.final_layernorm.weight"

    def fields(self, model: Model) -> dict[str, Any]:
        first, linear = mixers_of(model, "attention")[0], mixers_of(model, "mamba2")
        sizes = parts.attention_fields(model)
        del sizes["head_dim"]
        types = parts.placed(model)
        half = None if first["rope"] is None else {**first["rope"], "fraction": 0.5}
        return {
            **sizes,
            **(mamba_fields(linear[0], model["hidden_size"]) if linear else {}),
            "intermediate_size": parts.width_of(model),
            "hidden_act": "silu",
            "rope_parameters": rope_parameters(half, partial=True) | {"partial_rotary_factor": 0.5},
            "attention_bias": first.get("bias") == "all",
            "mlp_bias": False,
            "attn_layer_indices": [index for index, kind in enumerate(types) if kind == parts.FULL],
        }

    def block(self, config: Config, index: int) -> dict[str, Any]:
        channel = parts.swiglu(config)
        if index not in config["attn_layer_indices"]:
            return {"mixer": mamba_of(config), "channel": channel}
        mixer = parts.attention_of(
            config,
            rope=rope_of(config["rope_parameters"], partial=True),
            bias="all" if config["attention_bias"] else "none",
        )
        return {"mixer": mixer, "channel": channel}

    def layer_keys(self, config: Config, index: int) -> Iterator[Key]:
        yield from parts.pre_norm_keys(channel="pre_ff_layernorm")
        yield from parts.channel_keys("feed_forward")
        if index in config["attn_layer_indices"]:
            yield from parts.attention_keys(biases="all" if config["attention_bias"] else "none")
        else:
            yield from mamba_keys(config)

    def problems(self, model: Model) -> Iterator[Refusal]:
        yield from mamba_problems(model)
        yield from parts.divides_hidden_size(model)

    def warning(self, model: Model) -> str:
        told = "where a call goes on from a cache, transformers 5.23 is right with position_ids alone"
        return "; ".join(one for one in (told, mamba_warning(model)) if one)


class FalconH1(Target):
    """Falcon-H1 (arXiv 2507.22448): softmax attention and Mamba-2 side by side in every layer.

    The factors of projections are 1 in what is written: in a spec they are factors of weights, and an import makes them so.
    """

    name = "falcon_h1"
    config_class, model_class = "FalconH1Config", "FalconH1ForCausalLM"
    holds = "softmax attention and Mamba-2 in parallel in every layer, fixed factors, dense"
    mixers = ("parallel",)
    needs = mixers
    why: ClassVar = {
        "mixer.merge": "the outputs are added",
        "mixer.norm": "the outputs are not normed",
        "mixer.weights": "all layers have the same factors",
    }
    last_norm = "model.final_layernorm.weight"

    def fields(self, model: Model) -> dict[str, Any]:
        both = mixers_of(model, "parallel")[0]
        attention, mamba = both["mixers"]
        weights = both["weights"] or [1.0, 1.0]
        return {
            "num_attention_heads": attention["heads"],
            "num_key_value_heads": attention["kv_heads"],
            "head_dim": attention["head_dim"],
            **mamba_fields(mamba, model["hidden_size"]),
            "mamba_d_ssm": mamba["heads"] * mamba["head_dim"],
            "projectors_bias": mamba["bias"],
            "mamba_rms_norm": mamba["norm"] != "none",
            "mamba_norm_before_gate": mamba["norm"] != "after_gate",
            "intermediate_size": parts.width_of(model),
            "hidden_act": "silu",
            "rope_parameters": rope_parameters(attention["rope"]),
            "attention_bias": attention.get("bias") == "all",
            "mlp_bias": False,
            "embedding_multiplier": model["embedding_multiplier"],
            "lm_head_multiplier": model["logit_multiplier"],
            "key_multiplier": attention.get("key_multiplier", 1.0),
            "attention_out_multiplier": weights[0],
            "ssm_out_multiplier": weights[1],
            "attention_in_multiplier": 1.0,
            "ssm_in_multiplier": 1.0,
            "mlp_multipliers": [1.0, 1.0],
            "ssm_multipliers": [1.0] * 5,
        }

    def folded(self, config: Config) -> tuple[Config, Factors]:
        return falcon_factors.folded(config)

    def scalars(self, config: Config) -> dict[str, Any]:
        factors = {"embedding_multiplier": config["embedding_multiplier"]}
        return {**super().scalars(config), **factors, "logit_multiplier": config["lm_head_multiplier"]}

    def block(self, config: Config, index: int) -> dict[str, Any]:  # noqa: ARG002
        attention = parts.attention_of(
            config,
            rope=rope_of(config["rope_parameters"]),
            key_multiplier=config["key_multiplier"],
            bias="all" if config["attention_bias"] else "none",
        )
        before = "before_gate" if config["mamba_norm_before_gate"] else "after_gate"
        mamba = mamba_of(config, before if config["mamba_rms_norm"] else "none")
        weights = [config["attention_out_multiplier"], config["ssm_out_multiplier"]]
        both: dict[str, Any] = {"kind": "parallel", "mixers": [attention, mamba]}
        if weights != [1.0, 1.0]:
            both["weights"] = weights
        return {"mixer": both, "channel": parts.swiglu(config)}

    def layer_keys(self, config: Config, index: int) -> Iterator[Key]:  # noqa: ARG002
        yield from parts.pre_norm_keys(channel="pre_ff_layernorm")
        yield from parts.channel_keys("feed_forward")
        biases = "all" if config["attention_bias"] else "none"
        yield from parts.attention_keys(ours="mixer.mixers.0", biases=biases)
        yield from mamba_keys(config, "mixer.mixers.1", norm=config["mamba_rms_norm"])

    def kinds(self, model: Model) -> Iterator[Refusal]:
        yield from super().kinds(model)
        for index, layer in enumerate(model["layers"]):
            kinds = [one["kind"] for one in layer["mixer"].get("mixers", ())]
            if layer["mixer"]["kind"] == "parallel" and kinds != ["attention", "mamba2"]:
                what = f"are {' and '.join(kinds)}; there it is attention, then mamba2"
                yield Refusal(f"layers.{index}.mixer.mixers", what)
                return

    def warning(self, model: Model) -> str:
        return mamba_warning(model)

    def idle(self, config: Config) -> frozenset[str]:
        found = super().idle(config) | {"mamba_expand"}
        return found if config["mamba_rms_norm"] else found | {"mamba_norm_before_gate"}
