"""Falcon-H1's factors of projections, which a spec has as factors of weights. No torch."""

from __future__ import annotations

from typing import Any

from heddle.compose.targets.target import ALL_ROWS, Config, Factors


def folded(config: Config) -> tuple[dict[str, Any], Factors]:
    """The configuration with the factors of projections at 1, and the tensors of each layer that they are factors of instead.

    With x the normed stream, m, s, g and d fixed numbers, and r one for each part (z, x, B, C, dt) of what Mamba-2 projects:

        W (m x) = (m W) x,   r (W (s x) + b) = (s r W) x + r b
        d W_d (W_u x · silu(g W_g x)) = (d W_d) (W_u x · silu((g W_g) x))

    A factor of attention_in is none of its biases. Nothing is approximated but the last digit of each product.
    """
    attention, entry = config["attention_in_multiplier"], config["ssm_in_multiplier"]
    gate, down = config["mlp_multipliers"]
    inner, state = config["mamba_d_ssm"], config["mamba_n_groups"] * config["mamba_d_state"]
    inner = int(config["mamba_expand"] * config["hidden_size"]) if inner is None else inner
    rows = (inner, inner, state, state, config["mamba_n_heads"])
    parts = [*zip(rows, config["ssm_multipliers"], strict=True)]
    found: dict[str, tuple[tuple[int, float], ...]] = {
        **{f"self_attn.{one}_proj.weight": ((ALL_ROWS, attention),) for one in ("q", "k", "v")},
        "feed_forward.gate_proj.weight": ((ALL_ROWS, gate),),
        "feed_forward.down_proj.weight": ((ALL_ROWS, down),),
        "mamba.in_proj.weight": tuple((count, entry * factor) for count, factor in parts),
        "mamba.in_proj.bias": tuple(parts),
    }
    plain: dict[str, Any] = {"attention_in_multiplier": 1.0, "ssm_in_multiplier": 1.0}
    plain |= {"mlp_multipliers": [1.0] * 2, "ssm_multipliers": [1.0] * 5}
    kept = {name: pieces for name, pieces in found.items() if any(factor != 1.0 for _, factor in pieces)}
    return {**config, **plain}, kept
