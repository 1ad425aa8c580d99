"""What is known of the goals that docs/performance.md misses beside flash-linear-attention: for `rivals.py`."""

from __future__ import annotations

ON_H100 = "[profiled on an H100](#gated-delta-rule-beside-flash-linear-attention-on-an-h100)"
STRONG = (
    "An untrained layer forgets half in a token, so every chunk fades by more than 2^40 on either side of its middle, and each "
    "takes the longer way, pair by pair of its parts ([below](#beside-flash-linear-attention-on-an-h200)); fla has one way for "
    "all decays. With the decays of trained gates (`hgrn2`) one product does."
)
# By op and phase of the rows: what bounds it, and what was tried.
CAUSES = {
    ("lightning", "fwd"): (
        "One kernel of 256 programs on 264 places: each walks through a whole sequence, chunk by chunk. fla took 0.385 ms in one "
        "run (`8d97eeab`) and 0.416 in the other."
    ),
    ("hgrn2_first_layer", "fwd"): STRONG,
    ("hgrn2_first_layer", "fwdbwd"): STRONG,
    ("simple_gla", "fwdbwd"): (
        "The gradient of the decays is a difference of what q's and k's gradients say, so these are rounded alike and read the "
        "state in two parts: fixed decays (`lightning`) take 0.80. That was done for the gradient of v too, which has no use for "
        "it, and numbers were rounded to half precision one by one (F2F). Three kernels, one for each gradient, that cut bits "
        "off instead took 1.146 on the device at `6729b7b0ef94` (best of seven launches, `simple_gla_check.py --only gate`), and "
        "1.20 since strong decays have a loop of their own (`3569da4`), which made the other spill. That loop is in a launch of "
        "its own now, which [comes to 1.10](#in-turns-on-an-h200) where this was 1.18, and was not timed beside fla. Tried in "
        "PyTorch alone: states read once, and the "
        "sum begun anew at states kept in half precision every 256 tokens, which left the bounds at mixed decays."
    ),
    ("gated_delta_rule", "fwd"): (
        "The triangular inverse of each chunk and a serial loop over chunks with few programs a multiprocessor, "
        f"{ON_H100}. Tried there: segments, the inverse in float16. The inverse is that of a value head's own beta and "
        "decays, so sharing keys saves loads alone. Since these rows the inverse takes fewer registers, and segments ask for "
        "their next chunk: [0.416, 0.744 and 2.73 ms, and 0.715 with 4 key heads](#in-turns-on-an-h200), not timed beside fla."
    ),
    ("gated_delta_rule", "decode_graph"): (
        "512 heads of all sequences take the launch for few (16 columns, one warp); from 1,024 on that for many reaches 94% of "
        "the floor."
    ),
    ("gated_delta_rule", "decode"): (
        "Python, 57 µs a call where the device waits for it ([rows](../tests/bench/results/evidence-host-time.jsonl), at "
        "`ab791819b151`). Launches are recorded and repeated ([decision 0014](decisions/0014-eager-calls.md)); graphs do without."
    ),
}
# Which op the rows of `misses_check.py` name.
TIMED_AS = {"lightning": "decay_attention"}
