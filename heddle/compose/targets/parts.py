"""Parts that several classes of transformers have: their fields, and the names of their weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from heddle.compose.targets.target import Config, Key, Model, Refusal, mixers_of, same

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
BIASES: Mapping[str, tuple[str, ...]] = {"none": (), "qkv": ("q", "k", "v"), "all": ("q", "k", "v", "o")}


def attention_fields(model: Model) -> dict[str, Any]:
    """Heads and window of the attention layers; of several sizes the first."""
    found = mixers_of(model, "attention")
    if not found:
        return {}
    return {
        "num_attention_heads": found[0]["heads"],
        "num_key_value_heads": found[0]["kv_heads"],
        "head_dim": found[0]["head_dim"],
    }


def attention_of(config: Config, **more: Any) -> dict[str, Any]:
    """A softmax mixer of the sizes of a configuration; without a field of its own a head is hidden_size / heads."""
    heads = config["num_attention_heads"]
    return {
        "kind": "attention",
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        **more,
    }


def window_fields(model: Model) -> dict[str, Any]:
    """`layer_types` and the window of full and sliding layers."""
    windows = [layer["mixer"]["window"] for layer in model["layers"]]
    return {
        "layer_types": [FULL if window is None else SLIDING for window in windows],
        "sliding_window": next((window for window in windows if window is not None), None),
    }


def idle_windows(config: Config) -> frozenset[str]:
    """Fields of windows and of positions by type that no layer of a configuration reads."""
    absent = {FULL, SLIDING} - {*config["layer_types"]}
    found = {f"rope_parameters.{kind}" for kind in absent}
    return frozenset(found | ({"sliding_window", "use_sliding_window"} if SLIDING in absent else set()))


def window_of(config: Config, index: int) -> int | None:
    """The window of a layer by its type."""
    window: int | None = config["sliding_window"] if config["layer_types"][index] == SLIDING else None
    return window


def swiglu(config: Config, kind: str = "swiglu") -> dict[str, Any]:
    """The dense channel block."""
    return {"kind": kind, "width": config["intermediate_size"]}


def width_of(model: Model) -> int:
    """The inner width of the dense channel blocks; of several the first, of none that of the experts."""
    channels = [layer["channel"] for layer in model["layers"]]
    dense = [channel for channel in channels if channel["kind"] != "moe"]
    width: int = (dense or channels)[0]["width"]
    return width


def attention_keys(
    *, ours: str = "mixer", norms: bool = False, biases: str = "none", less: float = 0.0
) -> Iterator[Key]:
    """Projections, their biases, and the norms of queries and keys."""
    theirs = "self_attn"
    for one in ("q", "k", "v", "o"):
        yield same(f"{ours}.{one}_proj.weight", f"{theirs}.{one}_proj.weight")
    for one in BIASES[biases]:
        yield same(f"{ours}.{one}_proj.bias", f"{theirs}.{one}_proj.bias")
    for one in ("q", "k") if norms else ():
        yield same(f"{ours}.{one}_norm.weight", f"{theirs}.{one}_norm.weight", less=less)


def channel_keys(theirs: str = "mlp") -> Iterator[Key]:
    """The three matrices of a gated channel block."""
    for one in ("gate", "up", "down"):
        yield same(f"channel.{one}_proj.weight", f"{theirs}.{one}_proj.weight")


def stacked_keys(count: int, width: int, hidden_size: int) -> Iterator[Key]:
    """Experts under the names of Mixtral: on disk each has three matrices of its own, w1 the gate, w3 up, w2 down."""
    for ours, theirs, rows in (("gate_up_proj", ("w1", "w3"), width), ("down_proj", ("w2",), hidden_size)):
        names = tuple(
            f"block_sparse_moe.experts.{expert}.{one}.weight" for expert in range(count) for one in theirs
        )
        cut, made = ((rows,) * len(names),), tuple((number,) for number in range(len(names)))
        yield Key((f"channel.experts.{ours}",), names, pieces=cut, made=made, stacked=count)


def pre_norm_keys(less: float = 0.0, channel: str = "post_attention_layernorm") -> Iterator[Key]:
    """The norms of a plain pre-norm layer, as they are usually called."""
    yield same("mixer_norm.weight", "input_layernorm.weight", less=less)
    yield same("channel_norm.weight", f"{channel}.weight", less=less)


def post_norm_keys(less: float = 0.0) -> Iterator[Key]:
    """The norms of a layer that norms what its parts give."""
    yield same("mixer_post_norm.weight", "post_attention_layernorm.weight", less=less)
    yield same("channel_post_norm.weight", "post_feedforward_layernorm.weight", less=less)


def delta_fields(model: Model) -> dict[str, Any]:
    """Sizes of the Gated DeltaNet layers; of several the first."""
    found = mixers_of(model, "gated_deltanet")
    if not found:
        return {}
    return {
        "linear_num_key_heads": found[0]["heads"],
        "linear_num_value_heads": found[0]["value_heads"],
        "linear_key_head_dim": found[0]["head_dim"],
        "linear_value_head_dim": found[0]["value_dim"],
        "linear_conv_kernel_dim": found[0]["short_conv"],
    }


def delta_of(config: Config) -> dict[str, Any]:
    """A Gated DeltaNet mixer of the sizes of a configuration."""
    return {
        "kind": "gated_deltanet",
        "heads": config["linear_num_key_heads"],
        "value_heads": config["linear_num_value_heads"],
        "head_dim": config["linear_key_head_dim"],
        "value_dim": config["linear_value_head_dim"],
        "short_conv": config["linear_conv_kernel_dim"],
    }


def delta_rows(config: Config) -> tuple[int, int, int]:
    """Rows of q, k and v in a projection of all three."""
    keys = config["linear_num_key_heads"] * config["linear_key_head_dim"]
    return keys, keys, config["linear_num_value_heads"] * config["linear_value_head_dim"]


def idle_linear(config: Config, prefix: str) -> frozenset[str]:
    """Sizes of linear layers where there are none."""
    absent = LINEAR not in config["layer_types"]
    return frozenset(name for name in config if name.startswith(prefix)) if absent else frozenset()


def rate_keys(theirs: str, *names: str) -> Iterator[Key]:
    """Parameters of a recurrence that both sides call the same."""
    for name in names:
        yield same(f"mixer.{name}", f"{theirs}.{name}")


def placed(model: Model) -> list[str]:
    """`layer_types` of a stack of linear and full layers."""
    return [FULL if layer["mixer"]["kind"] == "attention" else LINEAR for layer in model["layers"]]


def interval_of(types: list[str]) -> int | None:
    """n, if every n-th layer is a full one and no other; else None."""
    interval = types.index(FULL) + 1
    periodic = [LINEAR if (index + 1) % interval else FULL for index in range(len(types))]
    return interval if types == periodic else None


def divides_hidden_size(model: Model) -> Iterator[Refusal]:
    """For classes that refuse softmax heads that do not divide hidden_size."""
    for index, layer in enumerate(model["layers"]):
        heads, size = layer["mixer"]["heads"], model["hidden_size"]
        if layer["mixer"]["kind"] == "attention" and size % heads:
            yield Refusal(f"layers.{index}.mixer.heads", f"is {heads}; there it divides hidden_size, {size}")
            return
