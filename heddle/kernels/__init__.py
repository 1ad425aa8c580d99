"""Tensor functions that run fast where they can: each an `Op` with a reference beside it."""

from typing import Any

from heddle.kernels.causal_conv1d import causal_conv1d, causal_conv1d_reference
from heddle.kernels.decay_attention import decay_attention, decay_attention_reference, decay_attention_step
from heddle.kernels.delta_rule import delta_rule, delta_rule_reference, delta_rule_step
from heddle.kernels.gated_delta_rule import (
    gated_delta_rule,
    gated_delta_rule_reference,
    gated_delta_rule_step,
)
from heddle.kernels.gla import gla, gla_reference, gla_step
from heddle.kernels.kda import kda, kda_reference, kda_step
from heddle.kernels.op import Op, force_path, watch_paths
from heddle.kernels.simple_gla import simple_gla, simple_gla_reference, simple_gla_step
from heddle.kernels.taylor_attention import (
    taylor_attention,
    taylor_attention_reference,
    taylor_attention_step,
)
from heddle.kernels.ttt import ttt, ttt_reference

OPS: tuple[Op[Any, Any], ...] = (
    decay_attention,
    simple_gla,
    gla,
    gated_delta_rule,
    delta_rule,
    kda,
    ttt,
    causal_conv1d,
    taylor_attention,
)

__all__ = [
    "OPS",
    "Op",
    "causal_conv1d",
    "causal_conv1d_reference",
    "decay_attention",
    "decay_attention_reference",
    "decay_attention_step",
    "delta_rule",
    "delta_rule_reference",
    "delta_rule_step",
    "force_path",
    "gated_delta_rule",
    "gated_delta_rule_reference",
    "gated_delta_rule_step",
    "gla",
    "gla_reference",
    "gla_step",
    "kda",
    "kda_reference",
    "kda_step",
    "simple_gla",
    "simple_gla_reference",
    "simple_gla_step",
    "taylor_attention",
    "taylor_attention_reference",
    "taylor_attention_step",
    "ttt",
    "ttt_reference",
    "watch_paths",
]
