"""The Triton paths, run by Triton's interpreter: the same tests, in a process of their own, and by default half of them.

Triton decides when it is imported whether kernels are compiled or interpreted, so this cannot be switched for one test.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


# Kernels take long to interpret; this takes each road of them once, packed sequences in half precision. The two delta rules
# share theirs.
SOME = "65 or packed and not float32 or token or scratch or one_decay"
OPS = {
    "decay_attention": f"{SOME} or lie and spread and float32",
    "simple_gla": SOME,
    "delta_rule": f"gated and ({SOME} or one_beta and float16) or delta_rule-cpu-float32 and 65 and not gated",
    "gla and not simple": "65 or packed and not float32 or one_decay",
    "kda": "kda-cpu-float32 and 65 or kda-cpu-float16 and packed_sequences or one_decay or one_beta and float16",
    "ttt": "ttt-cpu-float32 and 65 or ttt-cpu-float16 and packed_sequences",
    "causal_conv1d": "causal_conv1d-cpu-float32 and 65 or causal_conv1d-cpu-float16 and packed_sequences",
    "taylor_attention": "taylor_attention-cpu-float32 and 65 or taylor_attention-cpu-float16 and packed_sequences",
}
CONTRACTS, REPLAY = "tests/contracts/test_ops.py", "tests/kernels/test_replay.py"
# Of ops with calls of their own, what files of theirs do not run here.
OTHER_CONTRACTS = "tests/contracts/test_other_ops.py"
SOME_OTHERS = "local_linear_attention and (empty and float16 or 1-cpu) or dynamic_conv and 65-cpu and float16"
# Gates in half precision one sequence after the other, clusters in one call.
PACKED_CONTRACT = "tests/contracts/test_packed_ops.py"
SOME_PACKED = "one_by_one and gates and float16 or one_call and clusters and float16"
# A token more than a tile in half precision, and one alone.
LENGTHS_CONTRACT = "tests/contracts/test_attention_lengths.py"
SOME_LENGTHS = "65-cpu and float16 and not best or (best or sinks) and 1-cpu and float32"
# Attention and a layer's step, whose contract is their own, and forms of ops that contracts do not have.
OTHERS = {
    # All gradients of one form, those of gates that cancel, tall tiles, ragged heads in half precision, a list in three parts.
    "test_block_attention_kernels": "reference and gates and float32 or cancel and 26 and float16 or gated_tiles and float16 "
    "or odd and group and float16 or split and 3-listed and float32",
    # Ragged heads and groups in half precision, marks, a dense list, both ways of scoring; tiles of many queries, one more
    # than blocks hold.
    "test_block_choice": "reference and (odd and float16 or (marked or dense) and float32) or equal_blocks "
    "or many_queries and (long and float32 or odd and float16) or whole_sequence and 65-False-cpu and float16",
    # A choice in both directions with all limits, ragged heads and blocks in half precision, a step in three parts, merged as it
    # is read, by a list, of equal landmarks; what only kernels have: a choice part by part, and how often a gradient is rounded.
    "test_landmark_attention": "results and reference and 1-cpu and float32 or odd and group and float16 "
    "or split and 3-2-cpu and float32 or fresh and 1-True or part_by_part or rounded_once "
    "or merges and 2-cpu and (limited-3-False and float32 or ragged-3-True and float16 or group-1 and float32) "
    "or equal and True-cpu",
    # What a GPU alone showed.
    "test_gated_delta_rule": "in_bfloat16 and cpu",
    # Each option once in full precision, one form in half, tiles, and a mixer's decode steps.
    "test_gated_delta_layer": "odd and float32 or plain and float16 or tiles or window_moves or mixer and float32",
    # Ragged heads in half precision, packed sequences by descriptors in two loops, keys of a step in three parts, lists, a mixer.
    "test_head_sparse_attention": "reference and ragged and float16 or two_loops and packed-1-1 and float32 "
    "or split and 1-3-cpu and float32 or list or mixer and 20-learned and float32 or no_number",
    # Ragged heads and few keys in half precision, a step and keys of before, a window, tiles, later tokens; a mixer.
    "test_span_attention": "reference and ((ragged or few) and float16 or (step or past or window) and float32) "
    "or tiles and 16-64 and float32 or no_bit and float32 or mixer or no_number",
    # Ragged groups and few keys in half precision, videos, clipped behind padding as well, boxes of unequal size, a mixer.
    "test_grid_window_attention": "reference and ((ragged or few) and float16 or video and float32) "
    "or boxes and 16-64 and float32 or mixer or no_number",
    # Sinks in half precision, packed sequences by descriptors, keys of a step in three parts, a mixer.
    "test_sliding_window_attention": "reference and many and float16 or descriptors and packed-1-cpu and float32 "
    "or split and 3-cpu and float32 or mixer or no_number",
    # A chunk that goes on in half precision, packed sequences.
    "test_rat_scan": "reference and (goes and float16 or packed and float32)",
    # Of chosen blocks, which each query has its own of.
    "test_attention_weights": "gated and float32",
    # Tiles that some queries see in half precision, packed sequences by descriptors, a step in three parts, a mixer.
    "test_rat_attention": "reference and many and float16 or descriptors and packed-1-cpu and float32 "
    "or split and 3-cpu and float32 or mixer",
    # A step in full precision, a given slope and a window in half, logits of hundreds.
    "test_local_linear_attention": "kernels_are and (step and float32 or slope and float16 and not peaked or peaked and float32)",
    # Segments in full precision, ragged heads and a part of a tile in half, in both directions; odd lengths; routes of a repeated
    # call.
    "test_routed_delta_rule": "reference and (whole and float32 or ragged and float16) or every_length and float16 or repeated",
    # The widest window in half precision, one of a single token; packed sequences with an empty one.
    "test_causal_conv1d": "reference and (8-packed and float16 or 1-dense and float32 or 3-packed and float32)",
    # Taps of both sorts that are not as many, along a line in half precision and over images; tokens that are read alone.
    "test_dynamic_conv": "reference and (long and float16 or (ragged or before) and float32)",
    # Rows that lie apart in half precision, each form once.
    "test_rms_norm": "apart and float16 or reference and ragged and float32",
    # Backward roles launched apart, in both precisions, at ragged heads and in segments, and where decays are strong.
    "test_simple_gla": "apart and sizes1-64-cpu or alone and 64-1-cpu",
    # Ragged heads and chunks in half precision, a call that goes on with padding.
    "test_token_split_attention_kernels": "reference and (ragged and float16 or padded and float32) or behind_all",
    # The loss and the norm that contracts do not have; padding.
    "test_ttt": "any_form and packed and l2-before or padding_of",
}


def test_interpreted_kernels_keep_the_contract_and_are_repeated(full_counts: bool, random_seed: int) -> None:
    # In one process: each imports torch anew, and collects all tests.
    chosen = [f"test_ops and {op}" + ("" if full_counts else f" and ({some})") for op, some in OPS.items()]
    chosen += ["test_replay and cpu", "test_other_ops" + ("" if full_counts else f" and ({SOME_OTHERS})")]
    chosen += ["test_packed_ops" + ("" if full_counts else f" and ({SOME_PACKED})")]
    chosen += ["test_attention_lengths" + ("" if full_counts else f" and ({SOME_LENGTHS})")]
    files = [CONTRACTS, OTHER_CONTRACTS, PACKED_CONTRACT, LENGTHS_CONTRACT, REPLAY]
    done = _run_interpreted(
        files, " or ".join(f"({one})" for one in chosen), _drawn(full_counts, random_seed)
    )
    for op in (
        "decay_attention",
        "simple_gla",
        "gated_delta_rule",
        "delta_rule",
        "gla",
        "kda",
        "ttt",
        "causal_conv1d",
        "taylor_attention",
    ):
        assert re.search(rf"PASSED .*test_ops.py::.*[-\[]{op}-cpu", done), (
            f"no test of {op} in:\n{done[-4000:]}"
        )
    assert all(f"PASSED {file}" in done for file in files[1:])


def test_interpreted_kernels_of_a_contract_of_their_own_are_right(
    full_counts: bool, random_seed: int
) -> None:
    files = [f"tests/kernels/{name}.py" for name in OTHERS]
    chosen = " or ".join(f"({name} and ({some}))" for name, some in OTHERS.items())
    done = _run_interpreted(files, chosen, _drawn(full_counts, random_seed))
    for file in files:
        assert f"PASSED {file}" in done


# Long: the same tests run on a GPU by `make test-gpu`.
@pytest.mark.long
@pytest.mark.parametrize(
    "op",
    [
        "decay_attention",
        "simple_gla",
        "gated_delta_rule",
        "gla",
        "kda",
        "block_attention_kernels",
        "block_choice",
        "gated_delta_layer",
        "landmark_attention",
        "grid_window_attention",
        "head_sparse_attention",
        "sliding_window_attention",
        "rat_scan",
        "rat_attention",
        "ttt",
        "local_linear_attention",
        "token_split_attention_kernels",
    ],
)
def test_interpreted_kernels_are_right_where_they_are_peculiar(op: str) -> None:
    _run_interpreted([f"tests/kernels/test_{op}.py"], op)


def _drawn(full_counts: bool, random_seed: int) -> int | None:
    return None if full_counts else random_seed


def _run_interpreted(files: list[str], chosen: str, drawn: int | None = None) -> str:
    """What pytest tells of those tests, or of half of them, drawn by a seed: all of them pass."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    # What xdist tells its own workers is not for this process.
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
    if drawn is not None:
        environment["HEDDLE_TEST_SEED"] = str(drawn)
    choice = ["-m", "not gpu and not long", "-k", chosen]
    told = ["-p", "no:cacheprovider", "-q", "-rAp", *([] if drawn is None else ["--half"])]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *files, *choice, *told],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    seed = "" if drawn is None else f"half of them, drawn by HEDDLE_TEST_SEED={drawn}\n"
    assert done.returncode == 0, seed + done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout
