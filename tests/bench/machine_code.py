"""Are our kernels kept away from what ptxas 12.8 gets wrong? Compiles them for Hopper; needs no GPU.

    python tests/bench/machine_code.py --quick [--drawn SEED]
    python tests/bench/machine_code.py --commit "$(git rev-parse --short=12 HEAD)" --append

At risk is a kernel in whose PTX two descriptors of matrix operands with different layouts are built from one address
(docs/decisions/0005-ragged-heads.md). Compiles the launches of the table with strides that are multiples of 16, as the
launcher makes them, and without `--quick` also with others. Exits with 1 if one of the former is at risk.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
import secrets
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from heddle.kernels import (
    _block_attention_bwd,
    _block_attention_fwd,
    _block_choice_kernels,
    _decay_attention_sweep,
    _dynamic_conv_kernels,
    _gated_delta_rule_bwd,
    _gated_delta_rule_bwd_split,
    _gated_delta_rule_fwd,
    _gla_bwd,
    _gla_fwd,
    _grid_window_attention_bwd,
    _grid_window_attention_fwd,
    _head_sparse_attention_bwd,
    _head_sparse_attention_fwd,
    _kda_bwd,
    _kda_bwd_split,
    _kda_fwd,
    _landmark_attention_bwd,
    _landmark_attention_fwd,
    _landmark_attention_step,
    _local_linear_bwd,
    _local_linear_fwd,
    _rat_attention_bwd,
    _rat_attention_fwd,
    _rat_scan_bwd,
    _rat_scan_fwd,
    _simple_gla_bwd_role,
    _simple_gla_sweep,
    _sliding_window_attention_bwd,
    _sliding_window_attention_fwd,
    _span_attention_bwd,
    _span_attention_fwd,
    _taylor_attention_bwd,
    _taylor_attention_fwd,
    _token_split_attention_bwd,
    _token_split_attention_fwd,
    _ttt_bwd,
    _ttt_fwd,
)
from heddle.kernels._block_attention_launch import queries_of
from heddle.kernels._block_attention_lists import MOST_QUERIES
from heddle.kernels._dynamic_conv_op import sizes as conv_sizes
from heddle.kernels._gla_launch import KEY_TILE
from heddle.kernels._landmark_attention_launch import ROWS
from heddle.kernels._ttt_launch import ROW_TILE
from heddle.kernels.common.layout import ALIGNMENT, LEAST_HEAD, block
from heddle.kernels.configs import (
    block_attention,
    block_choice,
    decay_attention,
    dynamic_conv,
    gated_delta_rule,
    gla,
    grid_window_attention,
    head_sparse_attention,
    kda,
    landmark_attention,
    local_linear_attention,
    rat_attention,
    rat_scan,
    simple_gla,
    sliding_window_attention,
    span_attention,
    taylor_attention,
    token_split_attention,
    ttt,
)
from heddle.kernels.configs.launch import Launch

RESULTS = Path(__file__).parent / "results"
TARGET = GPUTarget("cuda", 90, 32)
KERNELS = {
    ("decay_attention", "output"): _decay_attention_sweep._decay_attention_sweep_output_kernel,
    ("decay_attention", "state"): _decay_attention_sweep._decay_attention_sweep_state_kernel,
    ("simple_gla", "output"): _simple_gla_sweep._simple_gla_output_kernel,
    ("simple_gla", "state"): _simple_gla_sweep._simple_gla_state_kernel,
    ("simple_gla", "queries"): _simple_gla_bwd_role._simple_gla_bwd_role_kernel,
    ("simple_gla", "keys"): _simple_gla_bwd_role._simple_gla_bwd_role_kernel,
    ("simple_gla", "values"): _simple_gla_bwd_role._simple_gla_bwd_role_kernel,
    ("gated_delta_rule", "solve"): _gated_delta_rule_fwd._gated_delta_rule_fwd_solve_kernel,
    ("gated_delta_rule", "forward"): _gated_delta_rule_fwd._gated_delta_rule_fwd_state_kernel,
    ("gated_delta_rule", "keep"): _gated_delta_rule_fwd._gated_delta_rule_fwd_state_kernel,
    ("gated_delta_rule", "backward"): _gated_delta_rule_bwd._gated_delta_rule_bwd_state_kernel,
    ("gated_delta_rule", "gradient"): _gated_delta_rule_bwd._gated_delta_rule_bwd_gradient_kernel,
    ("gated_delta_rule", "pairs"): _gated_delta_rule_bwd_split._gated_delta_rule_bwd_pair_kernel,
    ("gated_delta_rule", "tokens"): _gated_delta_rule_bwd_split._gated_delta_rule_bwd_token_kernel,
    ("gla", "prepare"): _gla_fwd._gla_prepare_kernel,
    ("gla", "forward"): _gla_fwd._gla_sweep_kernel,
    ("gla", "keep"): _gla_fwd._gla_sweep_kernel,
    ("gla", "backward"): _gla_fwd._gla_sweep_kernel,
    ("gla", "gradient"): _gla_bwd._gla_gradient_kernel,
    ("block_attention", "forward"): _block_attention_fwd._block_attention_fwd_kernel,
    ("block_attention", "gated"): _block_attention_fwd._block_attention_fwd_kernel,
    ("block_attention", "queries"): _block_attention_bwd._block_attention_bwd_query_kernel,
    ("block_attention", "keys"): _block_attention_bwd._block_attention_bwd_key_kernel,
    ("block_attention", "gated queries"): _block_attention_bwd._block_attention_bwd_query_kernel,
    ("block_attention", "gated keys"): _block_attention_bwd._block_attention_bwd_key_kernel,
    ("block_choice", "mean"): _block_choice_kernels._block_choice_mean_kernel,
    ("block_choice", "logit"): _block_choice_kernels._block_choice_logit_kernel,
    ("block_choice", "pool"): _block_choice_kernels._block_choice_pool_kernel,
    ("block_choice", "sum"): _block_choice_kernels._block_choice_sum_kernel,
    ("block_choice", "share"): _block_choice_kernels._block_choice_share_kernel,
    (
        "sliding_window_attention",
        "forward",
    ): _sliding_window_attention_fwd._sliding_window_attention_fwd_kernel,
    ("sliding_window_attention", "step"): _sliding_window_attention_fwd._sliding_window_attention_fwd_kernel,
    (
        "sliding_window_attention",
        "queries",
    ): _sliding_window_attention_bwd._sliding_window_attention_bwd_query_kernel,
    (
        "sliding_window_attention",
        "keys",
    ): _sliding_window_attention_bwd._sliding_window_attention_bwd_key_kernel,
    ("landmark_attention", "forward"): _landmark_attention_fwd._landmark_attention_fwd_kernel,
    ("landmark_attention", "queries"): _landmark_attention_bwd._landmark_attention_bwd_query_kernel,
    ("landmark_attention", "keys"): _landmark_attention_bwd._landmark_attention_bwd_key_kernel,
    ("landmark_attention", "score"): _landmark_attention_step._landmark_attention_score_kernel,
    ("landmark_attention", "step"): _landmark_attention_step._landmark_attention_step_kernel,
    ("landmark_attention", "read"): _landmark_attention_step._landmark_attention_read_kernel,
    ("head_sparse_attention", "forward"): _head_sparse_attention_fwd._head_sparse_attention_fwd_kernel,
    ("head_sparse_attention", "step"): _head_sparse_attention_fwd._head_sparse_attention_fwd_kernel,
    ("head_sparse_attention", "queries"): _head_sparse_attention_bwd._head_sparse_attention_bwd_query_kernel,
    ("head_sparse_attention", "keys"): _head_sparse_attention_bwd._head_sparse_attention_bwd_key_kernel,
    ("span_attention", "forward"): _span_attention_fwd._span_attention_fwd_kernel,
    ("span_attention", "step"): _span_attention_fwd._span_attention_fwd_kernel,
    ("span_attention", "queries"): _span_attention_bwd._span_attention_bwd_query_kernel,
    ("span_attention", "keys"): _span_attention_bwd._span_attention_bwd_key_kernel,
    ("grid_window_attention", "forward"): _grid_window_attention_fwd._grid_window_attention_fwd_kernel,
    ("grid_window_attention", "queries"): _grid_window_attention_bwd._grid_window_attention_bwd_query_kernel,
    ("grid_window_attention", "keys"): _grid_window_attention_bwd._grid_window_attention_bwd_key_kernel,
    ("token_split_attention", "forward"): _token_split_attention_fwd._token_split_attention_fwd_kernel,
    ("token_split_attention", "queries"): _token_split_attention_bwd._token_split_attention_bwd_query_kernel,
    ("token_split_attention", "near"): _token_split_attention_bwd._token_split_attention_bwd_key_kernel,
    ("token_split_attention", "far"): _token_split_attention_bwd._token_split_attention_bwd_key_kernel,
    ("kda", "prepare"): _kda_fwd._kda_prepare_kernel,
    ("kda", "forward"): _kda_fwd._kda_sweep_kernel,
    ("kda", "keep"): _kda_fwd._kda_sweep_kernel,
    ("kda", "backward"): _kda_bwd._kda_backward_kernel,
    ("kda", "gradient"): _kda_bwd._kda_gradient_kernel,
    ("kda", "pairs"): _kda_bwd_split._kda_pair_kernel,
    ("kda", "near"): _kda_bwd_split._kda_near_kernel,
    ("kda", "far"): _kda_bwd_split._kda_far_kernel,
    ("rat_attention", "forward"): _rat_attention_fwd._rat_attention_fwd_kernel,
    ("rat_attention", "step"): _rat_attention_fwd._rat_attention_fwd_kernel,
    ("rat_attention", "queries"): _rat_attention_bwd._rat_attention_bwd_query_kernel,
    ("rat_attention", "keys"): _rat_attention_bwd._rat_attention_bwd_key_kernel,
    ("taylor_attention", "state"): _taylor_attention_fwd._taylor_attention_state_kernel,
    ("taylor_attention", "forward"): _taylor_attention_fwd._taylor_attention_fwd_kernel,
    ("taylor_attention", "queries"): _taylor_attention_bwd._taylor_attention_bwd_query_kernel,
    ("taylor_attention", "keys"): _taylor_attention_bwd._taylor_attention_bwd_key_kernel,
    ("rat_scan", "forward"): _rat_scan_fwd._rat_scan_fwd_kernel,
    ("rat_scan", "backward"): _rat_scan_bwd._rat_scan_bwd_kernel,
    ("ttt", "forward"): _ttt_fwd._ttt_sweep_kernel,
    ("ttt", "keep"): _ttt_fwd._ttt_sweep_kernel,
    ("ttt", "backward"): _ttt_bwd._ttt_backward_kernel,
    ("ttt", "tokens"): _ttt_bwd._ttt_token_kernel,
    ("ttt", "step"): _ttt_fwd._ttt_sweep_kernel,
    ("local_linear_attention", "mean"): _local_linear_fwd._local_linear_fwd_mean_kernel,
    ("local_linear_attention", "solve"): _local_linear_fwd._local_linear_solve_kernel,
    ("local_linear_attention", "middle"): _local_linear_fwd._local_linear_middle_kernel,
    ("local_linear_attention", "output"): _local_linear_fwd._local_linear_fwd_output_kernel,
    ("local_linear_attention", "right"): _local_linear_bwd._local_linear_bwd_right_kernel,
    ("local_linear_attention", "queries"): _local_linear_bwd._local_linear_bwd_query_kernel,
    ("local_linear_attention", "keys"): _local_linear_bwd._local_linear_bwd_key_kernel,
    ("dynamic_conv", "forward"): _dynamic_conv_kernels._dynamic_conv_fwd_kernel,
    ("dynamic_conv", "inputs"): _dynamic_conv_kernels._dynamic_conv_fwd_kernel,
    ("dynamic_conv", "taps"): _dynamic_conv_kernels._dynamic_conv_bwd_kernel,
}
# Their launches share a chunk, and their kernels what they are told.
PLANS = {"gated_delta_rule": gated_delta_rule.HOPPER, "gla": gla.HOPPER, "kda": kda.HOPPER}
# The backward roles of simple_gla that are launched apart, by whose gradient they make.
APART = ("queries", "keys", "values")
ELEMENTS = {"bf16": 2, "fp16": 2, "fp32": 4}
FLOATS = (
    "log_decay_ptr", "final_ptr", "states_ptr", "initial_ptr", "d_final_ptr", "d_final_t_ptr",
    "gates_ptr", "logs_ptr", "rows_ptr", "ends_ptr", "beta_ptr", "last_ptr", "summary_ptr", "starts_ptr", "outside_ptr",
    "d_initial_ptr", "d_log_decay_ptr", "d_beta_ptr", "totals_ptr", "reach_ptr",
    "lse_ptr", "delta_ptr", "most_ptr", "d_bias_ptr", "d_gates_ptr", "logits_ptr",
    "weights_ptr", "d_weights_ptr", "lse_rows_ptr", "delta_rows_ptr",
    "rates_ptr", "weight_ptr", "means_ptr", "d_rates_ptr", "d_before_ptr", "d_had_ptr", "d_means_ptr",
    "pair_sums_ptr", "tile_sums_ptr", "passed_ptr", "routes_ptr", "d_routes_ptr",
    "same_ptr", "mean_ptr", "right_ptr", "norm_ptr", "of_x_ptr", "of_y_ptr", "middle_ptr", "d_seen_ptr",
)  # fmt: skip
DOUBLES = ("sums_ptr",)
INTEGERS = (
    "table_ptr", "offsets_ptr", "cu_seqlens_ptr", "start_ptr", "entries_ptr", "before_ptr", "begins_ptr", "bits_ptr",
    "lines_ptr", "begin_ptr", "count_ptr", "order_ptr", "queries_ptr", "first_ptr", "from_ptr", "to_ptr", "arrived_ptr",
    "listed_ptr",
)  # fmt: skip
# Where a name stands for something else than in the other ops.
BLOCK_TYPES = {
    "sums_ptr": "*fp32", "total_ptr": "*fp32", "worth_ptr": "*fp32", "share_ptr": "*fp32", "seen_ptr": "*u8",
    "held_ptr": "*u8", "ends_ptr": "*i32",
}  # fmt: skip
SPAN_TYPES = {"last_ptr": "*i32"}
SPLIT_TYPES = {
    "since_ptr": "*i32", "peak_ptr": "*i32", "total_ptr": "*fp32", "told_ptr": "*fp32", "d_told_ptr": "*fp32",
    "gate_ptr": "*fp32", "d_gate_ptr": "*fp32", "d_most_ptr": "*fp32", "dk_ptr": "*fp32", "dv_ptr": "*fp32",
}  # fmt: skip
TAYLOR_TYPES = {"r_ptr": "*fp32", "g_ptr": "*fp32", "total_ptr": "*fp32", "own_ptr": "*fp32"}
CONV_TYPES = {"d_weight_ptr": "*fp32", "sums_ptr": "*fp32"}
# Attention that reads some keys has plans by the larger head size.
SPARSE = {
    "block_attention": block_attention.HOPPER,
    "block_choice": block_choice.HOPPER,
    "grid_window_attention": grid_window_attention.HOPPER,
    "head_sparse_attention": head_sparse_attention.HOPPER,
    "landmark_attention": landmark_attention.HOPPER,
    "sliding_window_attention": sliding_window_attention.HOPPER,
    "span_attention": span_attention.HOPPER,
    "taylor_attention": taylor_attention.HOPPER,
    "token_split_attention": token_split_attention.HOPPER,
    "local_linear_attention": local_linear_attention.HOPPER,
}
# Of rat_scan and rat_attention, whose heads have one size.
RAT_FLOATS = (
    "bias_ptr", "cos_ptr", "sin_ptr", "past_ptr", "running_ptr", "inner_ptr", "d_running_ptr", "d_past_ptr", "sums_ptr",
)  # fmt: skip
# Of block_attention and block_choice: heads of a group (of a step of sliding_window_attention, too), and keys of a block.
GROUP, BLOCK_KEYS = 16, 64
# Of landmark_attention: heads of a group, and blocks of which a step finds the best.
LANDMARK_GROUP, LANDMARKS = 4, 2048
# Tiles of each height and width, full and partly empty.
SIZES = (16, 32, 48, 64, 96, 128, 160, 256)
QUICK = ((16, 16), (32, 48), (48, 32), (64, 64), (128, 32), (256, 64))
DESCRIPTOR = re.compile(r"(?:or\.b64|add\.s64)\s+%rd\d+, (%rd\d+), (-?\d+);")


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel of an op at the launch of the table; K and V are those of a, b and of c.

    `aligned`: strides are multiples of 16;  `many`: so is the number of heads, which Triton looks at as well
    `halved`: the longer way through a chunk of gla or kda, and the loss of ttt that measures a distance
    """

    op: str
    kernel: str
    dtype: str
    K: int
    V: int
    aligned: bool
    many: bool
    backward: bool
    halved: bool = False


def cases(*, quick: bool) -> Iterator[Case]:
    """What is compiled."""
    sizes = QUICK if quick else [(K, V) for K in SIZES for V in SIZES]
    yield from planned_cases(quick=quick)
    yield from block_cases(quick=quick)
    yield from choice_cases(quick=quick)
    yield from window_cases("sliding_window_attention", quick=quick)
    yield from window_cases("head_sparse_attention", quick=quick)
    yield from window_cases("span_attention", quick=quick)
    yield from window_cases("grid_window_attention", quick=quick)
    yield from window_cases("token_split_attention", quick=quick)
    yield from taylor_cases(quick=quick)
    yield from rat_cases(quick=quick)
    yield from landmark_cases(quick=quick)
    yield from memory_cases(quick=quick)
    yield from local_cases(quick=quick)
    yield from conv_cases(quick=quick)
    for op, (K, V) in itertools.product(("decay_attention", "simple_gla"), sizes):
        first = Case(op, "output", "bf16", K, V, aligned=True, many=False, backward=False)
        both = (first, replace(first, backward=True, many=True))
        yield from both
        yield replace(first, kernel="state")
        if op == "simple_gla":
            yield replace(first, kernel="state", backward=True)
            apart = [replace(both[1], kernel=name) for name in APART]
            yield from apart
            for case in apart if K == V and not quick else ():
                yield from (replace(case, dtype=dtype) for dtype in ("fp16", "fp32"))
        if quick:
            continue
        yield from (replace(case, many=not case.many) for case in both)
        yield from (replace(case, aligned=False) for case in both)
        if K == V:
            yield from (replace(case, dtype="fp32") for case in both)
            yield from (replace(case, dtype="fp16") for case in both)


def drawn_cases(found: Iterable[Case], seed: int) -> list[Case]:
    """A third of the cases of each kernel, at least one, in either direction."""
    groups = defaultdict[tuple[str, str, bool], list[Case]](list)
    for case in found:
        groups[case.op, case.kernel, case.backward].append(case)
    dice = random.Random(seed)
    return [case for group in groups.values() for case in dice.sample(group, -(-len(group) // 3))]


def planned_cases(*, quick: bool) -> Iterator[Case]:
    """The kernels of the delta rules, of gla and of kda, which take no head sizes below LEAST_HEAD, but for narrow heads."""
    for (K, V), kernel in itertools.product(
        [(16, 32), gated_delta_rule.NARROW], ("solve", "forward", "keep", "backward", "gradient")
    ):
        yield Case(
            "gated_delta_rule", kernel, "bf16", K, V, aligned=True, many=False, backward=kernel == "backward"
        )
    sizes = [size for size in SIZES if size >= LEAST_HEAD]
    for K, V in [(128, LEAST_HEAD)] if quick else itertools.product(sizes, sizes):
        for op, kernel in ((op, kernel) for op, kernel in KERNELS if op in PLANS):
            case = Case(op, kernel, "bf16", K, V, aligned=True, many=False, backward=kernel == "backward")
            yield case
            if op == "kda" and kernel in ("prepare", "gradient") and not quick:
                yield replace(case, halved=True)


def _plan(case: Case) -> Any:
    """The launches of a case of the ops whose launches share a chunk."""
    element, sizes = ELEMENTS[case.dtype], (block(case.K), block(case.V))
    if case.op == "gated_delta_rule":
        return gated_delta_rule.HOPPER.of_heads(element, *sizes)
    return PLANS[case.op].plan(element, max(sizes))


def _largest(case: Case) -> int:
    """The head size that a plan is chosen by."""
    return max(block(case.K), block(case.V))


def block_cases(*, quick: bool) -> Iterator[Case]:
    """The kernels of block_attention; `many`: a token alone, its list split."""
    sizes = [size for size in SIZES if size >= LEAST_HEAD]
    kernels = ("forward", "gated", "queries", "keys", "gated queries", "gated keys")
    for (K, V), kernel in itertools.product(
        [(128, 128)] if quick else itertools.product(sizes, sizes), kernels
    ):
        backward = kernel.endswith(("queries", "keys"))
        first = Case("block_attention", kernel, "bf16", K, V, aligned=True, many=False, backward=backward)
        yield first
        if kernel == "forward":
            yield replace(first, many=True)
        if K == V and not quick:
            yield replace(first, dtype="fp32")
            yield replace(first, dtype="fp16")


def choice_cases(*, quick: bool) -> Iterator[Case]:
    """The kernels of block_choice; `many`: with kernels that do not count."""
    sizes = [128] if quick else [size for size in SIZES if size >= LEAST_HEAD]
    for K, kernel in itertools.product(sizes, [name for op, name in KERNELS if op == "block_choice"]):
        first = Case("block_choice", kernel, "bf16", K, K, aligned=True, many=False, backward=False)
        yield first
        if not quick:
            yield from (replace(first, many=True), replace(first, dtype="fp32"), replace(first, dtype="fp16"))


def window_cases(op: str, *, quick: bool) -> Iterator[Case]:
    """The kernels of attention that reads by descriptors; `many`: with sinks, limits and packed sequences, or a bias."""
    sizes = [size for size in SIZES if size >= LEAST_HEAD]
    kernels = [kernel for name, kernel in KERNELS if name == op]
    for (K, V), kernel in itertools.product(
        [(128, 128)] if quick else itertools.product(sizes, sizes), kernels
    ):
        backward = kernel in ("queries", "keys", "near", "far")
        first = Case(op, kernel, "bf16", K, V, aligned=True, many=False, backward=backward)
        yield first
        if K == V and not quick:
            yield from (replace(first, many=True), replace(first, dtype="fp32"), replace(first, dtype="fp16"))


def taylor_cases(*, quick: bool) -> Iterator[Case]:
    """The kernels of taylor_attention, whose queries have 16 dimensions; `many`: packed sequences, and weights of tokens."""
    kernels = [name for op, name in KERNELS if op == "taylor_attention"]
    sizes = (128,) if quick else [size for size in SIZES if size >= LEAST_HEAD]
    for V, kernel in itertools.product(sizes, kernels):
        backward = kernel in ("queries", "keys")
        first = Case("taylor_attention", kernel, "bf16", 16, V, aligned=True, many=False, backward=backward)
        yield first
        if not quick:
            yield from (replace(first, many=True), replace(first, dtype="fp32"), replace(first, dtype="fp16"))


def _taylor_constants(case: Case, launch: Launch) -> dict[str, Any]:
    is_wide = case.dtype == "fp16"
    constants = {
        "V": case.V, "ROWS_V": block(case.V), "COLUMNS": launch.columns, "C": launch.chunk, "ROWS": launch.chunk,
        "KEYS": launch.columns, "WEIGHTED": case.many, "VARLEN": case.many, "WIDE": is_wide, "BEFORE": True, "AFTER": True,
        "SPLIT": case.dtype == "bf16", "PRECISION": "tf32x3",
    }  # fmt: skip
    names = KERNELS[case.op, case.kernel].arg_names
    return {name: value for name, value in constants.items() if name in names}


def rat_cases(*, quick: bool) -> Iterator[Case]:
    """The kernels of rat_scan and rat_attention; `many`: packed sequences, and chunks of one part."""
    sizes = (128,) if quick else [size for size in SIZES if size >= LEAST_HEAD]
    for size, (op, kernel) in itertools.product(sizes, [one for one in KERNELS if one[0].startswith("rat_")]):
        backward = kernel in ("queries", "keys", "backward")
        first = Case(op, kernel, "bf16", size, size, aligned=True, many=False, backward=backward)
        yield first
        if not quick:
            yield from (replace(first, many=True), replace(first, dtype="fp32"), replace(first, dtype="fp16"))


def memory_cases(*, quick: bool) -> Iterator[Case]:
    """The kernels of ttt, whose heads are as large as their memory."""
    kernels = ["forward", "backward", "tokens"] if quick else [name for op, name in KERNELS if op == "ttt"]
    for K, kernel in itertools.product([128] if quick else SIZES, kernels):
        first = Case("ttt", kernel, "bf16", K, K, aligned=True, many=False, backward=False, halved=True)
        yield first
        if not quick:
            yield replace(first, halved=False)
            yield from (replace(first, dtype=dtype) for dtype in ("fp32", "fp16"))


def _memory_constants(case: Case, launch: Launch) -> dict[str, Any]:
    constants = {
        "D": case.K, "C": launch.chunk, "ROWS": block(case.K), "COLUMNS": launch.columns, "MOMENTUM": True,
        "L2": case.halved, "NORMALISE": 1, "VARLEN": False, "KEEP": case.kernel == "keep", "PARTS": 4,
        "PRECISION": "tf32x3",
    }  # fmt: skip
    if case.kernel == "tokens":
        constants["ROWS"] = min(ROW_TILE, block(case.K))
    names = KERNELS[case.op, case.kernel].arg_names
    return {name: value for name, value in constants.items() if name in names}


def local_cases(*, quick: bool) -> Iterator[Case]:
    """The kernels of local_linear_attention; `many`: with keys that are not seen."""
    sizes = [128] if quick else [size for size in SIZES if size >= LEAST_HEAD]
    every = [name for op, name in KERNELS if op == "local_linear_attention"]
    kernels = ["solve", "keys"] if quick else every
    for K, kernel in itertools.product(sizes, kernels):
        first = Case("local_linear_attention", kernel, "bf16", K, K, aligned=True, many=False, backward=False)
        if kernel == "middle":
            # In half precision nobody launches it.
            yield replace(first, dtype="fp32")
            continue
        yield first
        if not quick:
            yield from (replace(first, many=True), replace(first, dtype="fp32"), replace(first, dtype="fp16"))


def conv_cases(*, quick: bool) -> Iterator[Case]:
    """The kernels of dynamic_conv; `many`: over images."""
    for K, kernel in itertools.product(
        [128] if quick else SIZES, [name for op, name in KERNELS if op == "dynamic_conv"]
    ):
        first = Case(
            "dynamic_conv", kernel, "bf16", K, K, aligned=True, many=False, backward=kernel == "inputs"
        )
        yield from (first, replace(first, many=True))
        if not quick:
            yield from (replace(first, dtype="fp32"), replace(first, dtype="fp16"))


def _conv_constants(case: Case, launch: Launch) -> dict[str, Any]:
    taps = (49, 49) if case.many else (16, 16)
    constants = conv_sizes(case.K, taps, launch, is_grid=case.many)
    more = {"STEPS": launch.chunk} if case.kernel == "taps" else {"BACKWARD": case.backward}
    return {**constants, **more}


def _rat_constants(case: Case, launch: Launch) -> dict[str, Any]:
    rows = block(case.K)
    constants = {
        "H": 16, "G": 2, "D": case.K, "ROWS_D": rows, "KEYS": launch.columns, "ROWS": launch.chunk,
        "VARLEN": case.many, "SPLIT": case.kernel == "step", "TILES": True, "PRECISION": "tf32x3",
    }  # fmt: skip
    if case.op == "rat_scan":
        constants |= {
            "ROWS": rows, "TURNED": case.K, "CHUNKS": max(1, launch.columns // rows), "KEEP": not case.many,
            "INNER": rat_scan.PART, "HAS_PAST": not case.many,
        }  # fmt: skip
    names = KERNELS[case.op, case.kernel].arg_names
    return {name: value for name, value in constants.items() if name in names}


def landmark_cases(*, quick: bool) -> Iterator[Case]:
    """The kernels of landmark_attention; `many`: with a choice, limits and a block that is no power of two."""
    sizes = [size for size in SIZES if size >= LEAST_HEAD]
    kernels = [kernel for op, kernel in KERNELS if op == "landmark_attention"]
    for (K, V), kernel in itertools.product(
        [(128, 128)] if quick else itertools.product(sizes, sizes), kernels
    ):
        backward = kernel in ("queries", "keys")
        first = Case("landmark_attention", kernel, "bf16", K, V, aligned=True, many=False, backward=backward)
        yield first
        if K == V and not quick:
            yield from (replace(first, many=True), replace(first, dtype="fp32"), replace(first, dtype="fp16"))


def _landmark_constants(case: Case, launch: Launch) -> dict[str, Any]:
    keys = BLOCK_KEYS - 4 if case.many else BLOCK_KEYS
    heads = LANDMARK_GROUP
    constants = {
        "K": case.K, "V": case.V, "ROWS_K": block(case.K), "ROWS_V": block(case.V), "ROWS": launch.chunk,
        "QUERIES": launch.chunk // heads, "HEADS": heads, "GROUP": heads, "BLOCK": keys, "KEYS": BLOCK_KEYS,
        "COLUMNS": launch.columns, "WIDTH": LANDMARKS, "SELECT": case.many or case.kernel in ("step", "read"),
        "SEEN": case.many, "SPLIT": True, "SPLITS": 16, "BIAS": case.many, "PRECISION": "tf32x3", "FUSED": True, "AHEAD": False,
        "LISTED": False,
    }  # fmt: skip
    if case.kernel == "read":
        constants["ROWS"] = ROWS
    if case.kernel in ("queries", "keys"):
        constants["PRECISION"] = landmark_attention.HOPPER.plan(ELEMENTS[case.dtype], _largest(case)).products
    names = KERNELS[case.op, case.kernel].arg_names
    return {name: value for name, value in constants.items() if name in names}


def _local_constants(case: Case, launch: Launch) -> dict[str, Any]:
    constants = {
        "K": case.K, "V": case.V, "ROWS_K": block(case.K), "ROWS_V": block(case.V), "ROWS": launch.chunk,
        "KEYS": launch.columns, "GROUP": 1, "SEEN": case.many, "SPLIT": case.dtype != "fp32", "GIVEN": False,
        "SOLVED": True, "PARTS": 1 if case.dtype == "fp32" else 2,
    }  # fmt: skip
    names = KERNELS[case.op, case.kernel].arg_names
    return {name: value for name, value in constants.items() if name in names}


def _window_constants(case: Case, launch: Launch) -> dict[str, Any]:
    is_step = case.kernel == "step"
    constants = {
        "K": case.K, "V": case.V, "ROWS_K": block(case.K), "ROWS_V": block(case.V),
        "ROWS": block(GROUP) if is_step else launch.chunk, "QUERIES": 1 if is_step else launch.chunk,
        "HEADS": GROUP if is_step else 1, "PACKED": GROUP if is_step else 1, "GROUP": GROUP if is_step else 4,
        "KEYS": launch.columns, "SINKS": case.many, "SEEN": case.many, "VARLEN": case.many, "SPLIT": is_step,
        "TILES": True, "SUMS": True, "PRECISION": "tf32x3", "LISTED": not is_step, "APART": case.many, "WALKED": launch.chunk,
    }  # fmt: skip
    names = KERNELS[case.op, case.kernel].arg_names
    return {name: value for name, value in constants.items() if name in names}


def _span_constants(case: Case, launch: Launch) -> dict[str, Any]:
    constants = {
        "K": case.K, "V": case.V, "ROWS_K": block(case.K), "ROWS_V": block(case.V), "ROWS": launch.chunk,
        "KEYS": launch.columns, "BIAS": case.many, "LOST": case.dtype != "fp32", "PRECISION": "tf32x3",
    }  # fmt: skip
    names = KERNELS[case.op, case.kernel].arg_names
    return {name: value for name, value in constants.items() if name in names}


def _grid_constants(case: Case, launch: Launch) -> dict[str, Any]:
    held, walked = (launch.columns, launch.chunk) if case.kernel == "keys" else (launch.chunk, launch.columns)
    constants = {
        "K": case.K, "V": case.V, "ROWS_K": block(case.K), "ROWS_V": block(case.V), "ROWS": launch.chunk,
        "KEYS": launch.columns, "BOX_C": min(8, held), "WALKED_C": min(8, walked), "GROUP": 4 if case.many else 1,
        "FRAMES": case.many, "ROW_WINDOW": True, "COLUMN_WINDOW": True, "INWARD": True, "PADDED": case.many,
        "LOST": case.dtype != "fp32", "PRECISION": "tf32x3",
    }  # fmt: skip
    names = KERNELS[case.op, case.kernel].arg_names
    return {name: value for name, value in constants.items() if name in names}


def _split_constants(case: Case, launch: Launch) -> dict[str, Any]:
    constants = {
        "K": case.K, "V": case.V, "ROWS_K": block(case.K), "ROWS_V": block(case.V), "ROWS": launch.chunk,
        "KEYS": launch.columns, "SEEN": case.many,
        "KEPT": case.kernel != "near", "TRAINS": True, "BIAS": case.many, "LOST": case.dtype != "fp32", "PRECISION": "tf32x3",
    }  # fmt: skip
    names = KERNELS[case.op, case.kernel].arg_names
    return {name: value for name, value in constants.items() if name in names}


def _block_constants(case: Case, launch: Launch) -> dict[str, Any]:
    gated = case.kernel.startswith("gated")
    # Gates are a head's own where NAtS-L has them.
    group, most = (1, launch.chunk) if gated else (GROUP, MOST_QUERIES)
    queries = queries_of(launch, group, 1 if case.many else launch.chunk, most)
    constants = {
        "K": case.K, "V": case.V, "ROWS_K": block(case.K), "ROWS_V": block(case.V), "ROWS": block(queries * group),
        "QUERIES": queries, "HEADS": group, "GROUP": group, "BLOCK": BLOCK_KEYS, "KEYS": min(launch.columns, BLOCK_KEYS),
        "DIRECT": case.many, "GATED": gated, "SEEN": not gated, "SPLIT": case.many, "PLACED": False, "BIAS": True, "TILES": gated,
        "PRECISION": "tf32x3",
    }  # fmt: skip
    names = KERNELS[case.op, case.kernel].arg_names
    return {name: value for name, value in constants.items() if name in names}


def _choice_constants(case: Case, launch: Launch) -> dict[str, Any]:
    constants = {
        "K": case.K, "ROWS_K": block(case.K), "ROWS": max(GROUP, launch.chunk), "HEADS": GROUP, "GROUP": GROUP,
        "BLOCK": BLOCK_KEYS, "COLUMNS": launch.columns, "TILES": 128, "HELD": case.many, "PRECISION": "tf32x3",
    }  # fmt: skip
    names = KERNELS[case.op, case.kernel].arg_names
    return {name: value for name, value in constants.items() if name in names}


def _planned_constants(case: Case, launch: Launch) -> dict[str, Any]:
    plan = _plan(case)
    constants = {
        "K": case.K, "V": case.V, "C": launch.chunk, "ROWS": block(case.K), "COLUMNS": launch.columns, "GROUP": 1,
        "GATED": True, "ROUTED": False, "VARLEN": False, "PRECISION": "tf32x3", "SOLVE": getattr(plan, "inverse", None),
        "LEVELS": launch.chunk.bit_length() - 1,
        "AHEAD": getattr(plan, "ahead", False) and case.kernel == "forward",
        "KEEP": case.kernel in ("keep", "prepare") or (case.op == "gla" and case.backward),
        "SEGMENTED": False, "SUMMARY": False, "OUT": case.kernel != "keep", "BACKWARD": case.backward,
        "PARTS": case.kernel == "keep" and case.dtype != "fp32",
        "PRECISE": case.dtype == "fp32", "HALVED": case.dtype == "fp16" or case.halved,
    }  # fmt: skip
    if case.op in ("gla", "kda") and case.kernel in ("prepare", "gradient", "near", "far"):
        constants["ROWS"] = min(KEY_TILE, block(case.K))
    if case.op == "gated_delta_rule" and case.kernel == "tokens":
        constants["ROWS"] = min(plan.tile, block(case.K))
    if case.kernel in ("prepare", "pairs", "near", "far", "tokens") and case.op != "gla":
        # With two kernels for the gradients.
        constants |= {"SUMS": True, "TILES": 2}
        heads, strided = ("H", "qkvd") if case.op == "gated_delta_rule" else ("HV", "qkd")
        constants |= {
            heads: 16,
            **{f"stride_{name}t": 16 * (case.K if name in "qk" else case.V) for name in strided},
        }
    names = KERNELS[case.op, case.kernel].arg_names
    return {name: value for name, value in constants.items() if name in names}


def ptx(case: Case) -> tuple[str, dict[str, int | None]]:
    """The PTX of a case, and its launch."""
    kernel = KERNELS[case.op, case.kernel]
    rows, launch = block(case.K), _launch(case)
    constants: dict[str, Any] = {
        "K": case.K, "V": case.V, "C": launch.chunk, "ROWS": rows, "COLUMNS": launch.columns,
        "ROLES": 3 if case.backward and case.K == case.V else 1, "BACKWARD": case.backward, "VARLEN": False,
        "PRECISION": "tf32x3",
    }  # fmt: skip
    if case.op in PLANS:
        constants = _planned_constants(case, launch)
    if case.op == "block_attention":
        constants = _block_constants(case, launch)
    if case.op == "block_choice":
        constants = _choice_constants(case, launch)
    if case.op in ("sliding_window_attention", "head_sparse_attention"):
        constants = _window_constants(case, launch)
    if case.op == "span_attention":
        constants = _span_constants(case, launch)
    if case.op == "taylor_attention":
        constants = _taylor_constants(case, launch)
    if case.op == "grid_window_attention":
        constants = _grid_constants(case, launch)
    if case.op == "token_split_attention":
        constants = _split_constants(case, launch)
    if case.op.startswith("rat_"):
        constants = _rat_constants(case, launch)
    if case.op == "landmark_attention":
        constants = _landmark_constants(case, launch)
    if case.op == "ttt":
        constants = _memory_constants(case, launch)
    if case.op == "local_linear_attention":
        constants = _local_constants(case, launch)
    if case.op == "dynamic_conv":
        constants = _conv_constants(case, launch)
    if case.kernel == "output" and case.op not in SPARSE:
        constants |= {"SEGMENTED": False, "HAS_INITIAL": True, "HAS_D_FINAL": case.backward}
    if case.kernel == "output" and case.op == "simple_gla":
        constants |= {"ONLY_STRONG": False, "AHEAD": _is_ahead(case) and not case.backward}
    if case.op == "simple_gla":
        constants |= {"PRECISE": case.dtype == "fp32", "H": 16 if case.many else 2}
        # As many heads as many models have, or heads that lie apart.
        between = constants["H"] * max(case.K, case.V) if case.aligned else 1000
        if case.kernel in APART:
            constants = _apart_constants(case, launch) | {"H": constants["H"]}
        constants |= {f"stride_{name}t": between for name in ("abce" if case.kernel in APART else "qkvd")}
    signature, hints = {}, {}
    for index, name in enumerate(kernel.arg_names):
        signature[name] = _type(name, case.dtype, constants)
        if case.op in PLANS and name in ("states_ptr", "d_states_ptr"):
            signature[name] = f"*{case.dtype}"
        if case.op in SPARSE and name in BLOCK_TYPES:
            signature[name] = BLOCK_TYPES[name]
        if case.op == "span_attention" and name in SPAN_TYPES:
            signature[name] = SPAN_TYPES[name]
        if case.op == "taylor_attention" and name in TAYLOR_TYPES:
            signature[name] = TAYLOR_TYPES[name]
        if case.op == "taylor_attention" and case.kernel == "state" and name == "out_ptr":
            signature[name] = "*fp32"
        if case.op == "taylor_attention" and name in ("before_ptr", "after_ptr"):
            signature[name] = "*bf16" if case.dtype == "bf16" else "*fp32"
        if case.op == "token_split_attention" and name in SPLIT_TYPES:
            signature[name] = SPLIT_TYPES[name]
        if case.op == "dynamic_conv" and name in CONV_TYPES:
            signature[name] = CONV_TYPES[name]
        if case.op.startswith("rat_") and name in RAT_FLOATS:
            signature[name] = "*fp32"
        if name.endswith("_tiles"):
            signature[name] = _descriptor(name, case.dtype, constants)
        if name in constants or name.endswith("_tiles"):
            continue
        known = case.aligned and name.startswith("stride_")
        # Weights of tokens lie as they lie.
        known = known and (case.op != "taylor_attention" or name[:8] not in ("stride_w", "stride_r"))
        if name.endswith("_ptr") or known or (name == "H" and case.many):
            hints[(index,)] = [["tt.divisibility", ALIGNMENT]]
    fixed = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, fixed, hints)
    compiled = triton.compile(source, target=TARGET, options=launch.options())
    return compiled.asm["ptx"], {"rows": rows, **asdict(launch)}


def _is_ahead(case: Case) -> bool:
    """Whether a launch of simple_gla asks for its next chunk, but for what the kernel is."""
    return simple_gla.HOPPER.ahead and case.dtype != "fp32" and max(case.K, case.V) <= simple_gla.TALL


def _apart_constants(case: Case, launch: Launch) -> dict[str, Any]:
    """What a backward role of simple_gla that is launched apart is told."""
    return {
        "K": case.K, "V": case.V, "C": launch.chunk, "ROWS": block(case.K), "COLUMNS": launch.columns,
        "ROLE": APART.index(case.kernel), "DROPPED": {"bf16": 16, "fp16": 13, "fp32": 0}[case.dtype],
        "PRECISE": case.dtype == "fp32", "PRECISION": "tf32x3",
        "VARLEN": False, "SEGMENTED": False, "HAS_OUTSIDE": True, "HAS_D_FINAL": True,
        "AHEAD": _is_ahead(case),
    }  # fmt: skip


def without_machine_code(*given: Any) -> tuple[str, str] | None:
    """Triton's hook for the stages of a compilation. Only the PTX is read, and ptxas takes a sixth of the time."""
    if not given:
        return "ptx", "ptx"
    given[1]["cubin"] = lambda _text, _metadata: b""
    return None


def _launch(case: Case) -> Launch:
    if case.op == "decay_attention":
        launch = decay_attention.HOPPER.launch(case.kernel, ELEMENTS[case.dtype], block(case.K))
    elif case.op == "dynamic_conv":
        return getattr(dynamic_conv.HOPPER, case.kernel)
    elif case.op == "rat_scan":
        return getattr(rat_scan.HOPPER, case.kernel)
    elif case.op == "rat_attention":
        return getattr(rat_attention.HOPPER.plan(ELEMENTS[case.dtype], block(case.K)), case.kernel)
    elif case.op == "taylor_attention":
        # Float16 is float32 in its kernels.
        element = 2 if case.dtype == "bf16" else 4
        launch = getattr(SPARSE[case.op].plan(element, block(case.V)), case.kernel)
        return (
            replace(launch, columns=min(launch.columns, block(case.V))) if case.kernel == "state" else launch
        )
    elif case.op in SPARSE:
        size = max(block(case.K), block(case.V))
        # Two kernels of block_choice share a launch, and two of local_linear_attention.
        name = {"sum": "share", "middle": "mean"}.get(case.kernel, case.kernel.replace(" ", "_"))
        return getattr(SPARSE[case.op].plan(ELEMENTS[case.dtype], size), name)
    elif case.op == "ttt":
        launch = getattr(ttt.HOPPER.plan(ELEMENTS[case.dtype], block(case.K)), case.kernel)
    elif case.op in PLANS:
        plan = _plan(case)
        # Where one kernel makes the gradients, the launches of the two are those of a trial.
        launch = getattr(plan, case.kernel, None) or plan.gradient
    else:
        kernel = "backward" if case.backward and case.kernel != "state" else case.kernel
        size = max(block(case.K), block(case.V))
        launch = simple_gla.HOPPER.launch(kernel, ELEMENTS[case.dtype], size)
        # All kernels of a call walk in the same chunks.
        output = simple_gla.HOPPER.launch(
            "backward" if case.backward else "output", ELEMENTS[case.dtype], size
        )
        launch = replace(launch, chunk=output.chunk)
    return replace(launch, columns=min(launch.columns, block(case.V)))


def _descriptor(name: str, dtype: str, constants: dict[str, Any]) -> str:
    """Of tiles that are walked over: of keys and values, or of queries and gradients of outputs."""
    rows = constants["KEYS" if name in ("k_tiles", "v_tiles", "keys_tiles", "values_tiles") else "ROWS"]
    of_values = name in ("v_tiles", "d_out_tiles", "g_tiles")
    if name in ("sums_tiles", "lse_tiles", "delta_tiles"):
        return f"tensordesc<fp32[1, 1, {constants['ROWS']}]>"
    columns = constants.get("ROWS_D") or constants["ROWS_V" if of_values else "ROWS_K"]
    return f"tensordesc<{dtype}[1, 1, {rows}, {columns}]>"


def _type(name: str, dtype: str, constants: dict[str, Any]) -> str:
    if name in constants:
        return "constexpr"
    if name.endswith("_ptr"):
        known = {FLOATS: "*fp32", DOUBLES: "*fp64", INTEGERS: "*i32"}
        return next((kind for names, kind in known.items() if name in names), f"*{dtype}")
    return "fp32" if name in ("scale", "ridge", "tolerance") else "i32"


def layouts_of_one_address(text: str) -> list[str]:
    """The addresses in PTX that descriptors of more than one layout are built from; a layout is the upper half."""
    layouts: dict[str, set[int]] = defaultdict(set)
    for address, constant in DESCRIPTOR.findall(text):
        upper = (int(constant) % (1 << 64)) >> 32
        if upper:
            layouts[address].add(upper)
    return [
        f"{address}: {', '.join(map(hex, sorted(found)))}"
        for address, found in layouts.items()
        if len(found) > 1
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few sizes, only as they are launched, and no machine code"
    )
    parser.add_argument("--drawn", type=int, help="a third of the cases of each kernel, drawn by this seed")
    parser.add_argument("--append", action="store_true", help="append rows to evidence-machine-code.jsonl")
    parser.add_argument("--commit", help="what the code is")
    chosen = parser.parse_args()
    if chosen.quick:
        knobs.runtime.add_stages_inspection_hook = without_machine_code
    header = {"run": secrets.token_hex(4), "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
              "commit": chosen.commit, "triton": triton.__version__, "ptxas": knobs.nvidia.ptxas.version,
              "target": "sm_90a"}  # fmt: skip
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    totals = {True: [0, 0], False: [0, 0]}
    found_cases = cases(quick=chosen.quick)
    for case in found_cases if chosen.drawn is None else drawn_cases(found_cases, chosen.drawn):
        text, launch = ptx(case)
        found = layouts_of_one_address(text)
        about = {
            "op": case.op,
            "kernel": case.kernel,
            "dtype": case.dtype,
            "aligned": case.aligned,
            "launch": launch,
        }
        for tally in (counts[json.dumps(about)], totals[case.aligned]):
            tally[0] += 1
            tally[1] += bool(found)
        if found and case.aligned:
            print(f"at risk: {case}: {'; '.join(found)}", flush=True)
    if chosen.append:
        rows = [
            {**header, **json.loads(about), "compiled": n, "at_risk": m} for about, (n, m) in counts.items()
        ]
        with (RESULTS / "evidence-machine-code.jsonl").open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    told = "; ".join(
        f"{'' if aligned else 'un'}aligned: {n} kernels, {m} at risk" for aligned, (n, m) in totals.items()
    )
    print(f"Triton {header['triton']}, ptxas {header['ptxas']}, {told}")
    return 1 if totals[True][1] else 0


if __name__ == "__main__":
    sys.exit(main())
