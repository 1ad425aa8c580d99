"""Launch configurations of gated_delta_layer_step: plain data, never tuned at run time; the best of those that an H200 timed in
bfloat16 (tests/bench/layer_step_check.py)."""

from __future__ import annotations

from heddle.kernels.configs.launch import Launch

# `columns` of the state are held at a time; with `stages` above 1 the next ones are loaded before these are done.
# One program has a whole head: few heads leave multiprocessors free, and a head is read at once by many warps.
FEW = Launch(chunk=1, columns=128, warps=4, stages=1)
MANY = Launch(chunk=1, columns=64, warps=2, stages=1)
TALL_LAUNCH = Launch(chunk=1, columns=32, warps=4, stages=1)
# Keys of more channels than this.
TALL = 128
MANY_HEADS = 264


def launch_of(heads: int, rows: int) -> Launch:
    """The launch for so many heads of all sequences, and a state of `rows` rows."""
    if rows > TALL:
        return TALL_LAUNCH
    return MANY if heads >= MANY_HEADS else FEW
