"""KimiLinearForCausalLM: Kimi Delta Attention and latent attention without positions, in any order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from heddle.compose.targets import parts
from heddle.compose.targets.target import Config, Key, Model, Refusal, Target, mixers_of, same

# What its norms inside of latent attention add under their root, whatever the configuration says.
LATENT_EPS = 1e-6
DENSE, SPARSE = "dense", "sparse"
# Fields that servers read and the class does not, with the only value of each that means what the class computes.
FIXED: Mapping[str, Any] = {
    "mla_use_nope": True,
    "moe_router_activation_func": "sigmoid",
    "moe_layer_freq": 1,
    "use_grouped_topk": True,
    "topk_method": "noaux_tc",
    "num_nextn_predict_layers": 0,
}


class KimiLinear(Target):
    """Kimi Linear (arXiv 2510.26692), dense or with experts by layer.

    The configuration is spelled as the published one, which is also what servers read. The class has no load-balance loss: the
    factor of ours travels in a field that it does not read.
    """

    name = "kimi_linear"
    config_class, model_class = "KimiLinearConfig", "KimiLinearForCausalLM"
    holds = "KDA and latent attention without positions in any order, dense or with experts by layer"
    mixers = ("kda", "mla")
    channels = ("swiglu", "moe")
    # A cache without an attention layer cannot count tokens in transformers.
    needs = ("mla",)
    turns = False
    why: ClassVar = {
        "tie_embeddings": "its head is never the embedding",
        "mixer.value_dim": "keys and values have one size",
        "mixer.gate_rank": "gates have the rank of a head",
        "mixer.lower_bound": "its decay has no bound",
        "mixer.rope": "it has no positions",
        "mixer.window": "it has no windows",
        "mixer.scale": "the factor of q · k is that of a head's size",
        "mixer.norm_eps": f"the norms inside have {LATENT_EPS:g} whatever the rest has",
        "channel.shared_width": "shared experts are a whole number of experts, at least one",
        "channel.shared_gate": "the shared expert has no gate",
        "channel.score": "scores are sigmoids",
        "channel.correction_bias": "the choice has a bias",
    }
    # Its own writer renames dense blocks as if they were experts; published files do not.
    written: ClassVar = {".mlp.": ".block_sparse_moe."}

    def fields(self, model: Model) -> dict[str, Any]:
        full, linear, types = mixers_of(model, "mla")[0], mixers_of(model, "kda"), placed(model)
        names = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        return {
            "model_max_length": model["context_length"],
            "num_attention_heads": full["heads"],
            "num_key_value_heads": full["heads"],
            **{name: full[name] for name in names},
            "attention_bias": False,
            "hidden_act": "silu",
            "intermediate_size": parts.width_of(model),
            "layer_types": types,
            **_linear_fields(linear, types),
            **_expert_fields(model),
            **FIXED,
        }

    def config(self, model: Model) -> dict[str, Any]:
        made = super().config(model)
        del made["max_position_embeddings"]
        return {**made, "tie_word_embeddings": False}

    def scalars(self, config: Config) -> dict[str, Any]:
        return super().scalars({**config, "max_position_embeddings": config["model_max_length"]})

    def block(self, config: Config, index: int) -> dict[str, Any]:
        channel = _routed(config) if _is_routed(config, index) else parts.swiglu(config)
        if config["layer_types"][index] == parts.LINEAR:
            mixer = {
                "kind": "kda",
                "heads": config["linear_num_heads"],
                "head_dim": config["linear_head_dim"],
                "short_conv": config["linear_conv_kernel_dim"],
            }
            return {"mixer": mixer, "channel": channel}
        names = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        sizes = {name: config[name] for name in names}
        mixer = {
            "kind": "mla",
            "heads": config["num_attention_heads"],
            **sizes,
            "rope": None,
            "norm_eps": LATENT_EPS,
        }
        return {"mixer": mixer, "channel": channel}

    def layer_keys(self, config: Config, index: int) -> Iterator[Key]:
        yield from parts.pre_norm_keys()
        if _is_routed(config, index):
            yield from _expert_keys(config)
        else:
            yield from parts.channel_keys()
        if config["layer_types"][index] == parts.LINEAR:
            yield from _linear_keys(config)
        else:
            yield from _latent_keys(config)

    def problems(self, model: Model) -> Iterator[Refusal]:
        """What the comparison does not tell: it calls what is absent false."""
        if model["tie_embeddings"]:
            yield Refusal("tie_embeddings", f"is true; there it is false: {self.why['tie_embeddings']}")

    def idle(self, config: Config) -> frozenset[str]:
        # The class has put these into fields of its own, which are compared, and has no positions.
        found = super().idle(config) | {
            "linear_attn_config",
            "first_k_dense_replace",
            "head_dim",
            "qk_head_dim",
        }
        found |= {"rope_theta", "rope_scaling", "rope_parameters"} | parts.idle_linear(config, "linear_")
        routed = [_is_routed(config, index) for index in range(config["num_hidden_layers"])]
        if all(routed):
            found |= {"intermediate_size"}
        experts = {
            "num_experts", "num_experts_per_token", "moe_intermediate_size", "num_shared_experts", "moe_renormalize",
            "routed_scaling_factor", "num_expert_group", "topk_group", *FIXED,
        }  # fmt: skip
        return found if any(routed) else found | (experts - {"mla_use_nope", "num_nextn_predict_layers"})


def placed(model: Model) -> list[str]:
    """`layer_types` of a stack of linear and latent layers."""
    return [parts.FULL if layer["mixer"]["kind"] == "mla" else parts.LINEAR for layer in model["layers"]]


def _is_routed(config: Config, index: int) -> bool:
    return bool(config["mlp_layer_types"][index] == SPARSE)


def _linear_fields(linear: list[Mapping[str, Any]], types: list[str]) -> dict[str, Any]:
    """Sizes of the KDA layers, of several the first, for the class and, with layers counted from 1, for servers."""
    counted = {kind: [at + 1 for at, one in enumerate(types) if one == kind] for kind in {*types}}
    placed_at = {"full_attn_layers": counted.get(parts.FULL, []), "kda_layers": counted.get(parts.LINEAR, [])}
    if not linear:
        return {}
    sizes = {name: linear[0][name] for name in ("heads", "head_dim", "short_conv")}
    return {
        "linear_num_heads": sizes["heads"],
        "linear_head_dim": sizes["head_dim"],
        "linear_conv_kernel_dim": sizes["short_conv"],
        "linear_attn_config": {
            **placed_at,
            "num_heads": sizes["heads"],
            "head_dim": sizes["head_dim"],
            "short_conv_kernel_size": sizes["short_conv"],
        },
    }


def _expert_fields(model: Model) -> dict[str, Any]:
    """Which layers have experts, and their sizes; of several the first."""
    channels = [layer["channel"] for layer in model["layers"]]
    types = [SPARSE if channel["kind"] == "moe" else DENSE for channel in channels]
    found: dict[str, Any] = {"mlp_layer_types": types}
    first_sparse = types.index(SPARSE) if SPARSE in types else len(types)
    if DENSE not in types[first_sparse:]:
        # Servers read the placement from this alone.
        found["first_k_dense_replace"] = first_sparse
    routed = next((channel for channel in channels if channel["kind"] == "moe"), None)
    if routed is None:
        return found
    return found | {
        "num_experts": routed["experts"],
        "num_experts_per_token": routed["active"],
        "moe_intermediate_size": routed["width"],
        "num_shared_experts": max(1, (routed["shared_width"] or 0) // routed["width"]),
        "moe_renormalize": routed["normalise"],
        "routed_scaling_factor": routed["scale"],
        "num_expert_group": 1,
        "topk_group": 1,
        "router_aux_loss_coef": routed["balance"],
    }


def _routed(config: Config) -> dict[str, Any]:
    """The channel block of a layer with experts."""
    return {
        "kind": "moe",
        "experts": config["num_experts"],
        "active": config["num_experts_per_token"],
        "width": config["moe_intermediate_size"],
        "shared_width": config["moe_intermediate_size"] * config["num_shared_experts"],
        "normalise": config["moe_renormalize"],
        "scale": config["routed_scaling_factor"],
        "score": "sigmoid",
        "correction_bias": True,
        "balance": config.get("router_aux_loss_coef", 0.0),
    }


def _linear_keys(config: Config) -> Iterator[Key]:
    size = config["linear_num_heads"] * config["linear_head_dim"]
    for ours, theirs, middle in (("qkv_proj", "proj", False), ("conv", "conv1d", True)):
        yield Key(
            (f"mixer.{ours}.weight",),
            tuple(f"self_attn.{one}_{theirs}.weight" for one in ("q", "k", "v")),
            pieces=((size, size, size),),
            made=((0,), (1,), (2,)),
            middle=middle,
        )
    names = {"decay_down": "f_a_proj", "decay_up": "f_b_proj", "z_down": "g_a_proj", "z_up": "g_b_proj"}
    names |= {"b_proj": "b_proj", "norm": "o_norm", "o_proj": "o_proj"}
    for ours, theirs in names.items():
        yield same(f"mixer.{ours}.weight", f"self_attn.{theirs}.weight")
    yield same("mixer.dt_bias", "self_attn.dt_bias")
    yield Key(("mixer.A_log",), ("self_attn.A_log",), around=(2, 1))


def _latent_keys(config: Config) -> Iterator[Key]:
    if config["q_lora_rank"] is None:
        names = {"q_proj": "q_proj"}
    else:
        names = {"q_down": "q_a_proj", "q_norm": "q_a_layernorm", "q_proj": "q_b_proj"}
    names |= {"kv_down": "kv_a_proj_with_mqa", "kv_norm": "kv_a_layernorm", "kv_up": "kv_b_proj"}
    for ours, theirs in {**names, "o_proj": "o_proj"}.items():
        yield same(f"mixer.{ours}.weight", f"self_attn.{theirs}.weight")


def _expert_keys(config: Config) -> Iterator[Key]:
    there = "block_sparse_moe"
    yield from parts.stacked_keys(
        config["num_experts"], config["moe_intermediate_size"], config["hidden_size"]
    )
    yield same("channel.gate.weight", f"{there}.gate.weight")
    yield same("channel.correction.bias", f"{there}.gate.e_score_correction_bias")
    for one in ("gate", "up", "down"):
        yield same(f"channel.shared_expert.{one}_proj.weight", f"{there}.shared_experts.{one}_proj.weight")
