"""What is known of the goals that docs/performance.md misses beside flash-linear-attention: for `rivals.py`."""

from __future__ import annotations

ON_H100 = "[profiled on an H100](#gated-delta-rule-beside-flash-linear-attention-on-an-h100)"
STRONG = (
    "An untrained layer forgets half in a token, so every chunk fades by more than 2^40 on either side of its middle, and each "
    "takes the longer way, pair by pair of its parts ([below](#beside-flash-linear-attention-on-an-h200)); fla has one way for "
    "all decays. With the decays of trained gates (`hgrn2`) one product does. Tried at 8 × 4,096 with `gla`'s "
    "decays 100 times as strong, kernels alone: 40 settings ([rows](../tests/bench/results/evidence-gla-kernels.jsonl)). "
)
# 23 settings at `1f9c353bf5b9`, 17 at `e739e40`: the sums of `kernels_ms` in the rows of "8x4096 strong".
STRONG_FORWARD = (
    "Of 17 at `e739e40`, with the launches of now 1.43 ms, the best takes 1.40 by tiles of 32 channels (not used: some crashed)."
    " Of 23 at `1f9c353bf5b9`, where one kernel took all decays (1.27; weak ones 0.78, now 0.61), chunks of 32 take 1.12, "
    "1.2 times as fast as fla, and 10.5 in both directions; with the kernels of now such chunks were not tried."
)
STRONG_BOTH = "The best of 17 at `e739e40`, 4.82 ms, is set; the best of 23 at `1f9c353bf5b9` took 6.98."
PARALLAX = (
    "14 to 19 % of a matrix product's rate: all tiles are masked, and not those at the diagonal alone. Launches were tried "
    "([rows](../tests/bench/results/evidence-lla.jsonl), `lla_check.py --only launches`), kernels not profiled."
)
# By op and phase of the rows: what bounds it, and what was tried.
CAUSES = {
    ("lightning", "fwd"): (
        "One kernel of 256 programs on 264 places: each walks through a whole sequence, chunk by chunk. fla took 0.385 ms in one "
        "run (`8d97eeab`) and 0.416 in the other."
    ),
    ("parallax", "fwd"): PARALLAX,
    ("parallax", "fwdbwd"): PARALLAX + " Its peak is above fla's (1.49 GB, 0.82); why was not looked into.",
    ("hgrn2_first_layer", "fwd"): STRONG + STRONG_FORWARD,
    ("hgrn2_first_layer", "fwdbwd"): STRONG + STRONG_BOTH,
    ("gated_delta_rule", "fwd"): (
        "The triangular inverse of each chunk (0.16 ms) and a serial loop over chunks with few programs a multiprocessor "
        f"(0.48), {ON_H100}. The inverse is that of a value head's own beta and decays, so sharing keys saves loads alone. "
        "Tried: segments, the inverse in float16 and in fewer registers, a program for each value head, the next chunk asked "
        "for ahead, 128 columns with three stages, chunks of 32 ([in turns](#in-turns-on-an-h200)). Alone it takes 0.720 ms "
        "since (`1ba49f2a`), which is 44 % over."
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
