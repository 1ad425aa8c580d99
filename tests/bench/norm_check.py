"""One call on a GPU machine: launches of rms_norm's gradients, on the device and by what they hold.

    python tests/bench/norm_check.py --out "$OUT" --budget 40 --commit "$(git rev-parse --short=12 HEAD)"
    python tests/bench/norm_check.py --out /tmp/norm --budget 60 --commit none --tiny

`glue_check.py` times both directions as they are called, where the host decides between launches. Here the kernel of the
gradients and the sum over its programs are repeated in a CUDA graph, after each launch was held to the reference. Writes
norm_check.log and rows to evidence-glue.jsonl (op `norm_backward`, phase `bwd_graph`), and a short table last, which tells what
both directions hold at their peak too; exits with 1 if anything was wrong. `--tiny`: small, on a CPU, one launch.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path

from glue_check import HEADS, SIZE, both_ways, cases_of, drawn, held, told
from gpu_check import Log
from rat_check import DEVICE, TINY, Rows, _peak

from heddle.kernels import force_path
from heddle.kernels._rms_norm_op import launch_backward
from heddle.kernels.bench import machine
from heddle.kernels.common.tuning import tuning
from heddle.kernels.configs.launch import Launch
from heddle.kernels.rms_norm import rms_norm

SIZES = ((1, 64),) if TINY else ((8, 4096), (1, 131072))
# Tiles of rows that a program goes through, numbers of a tile, warps.
LAUNCHES = [
    Launch(*one, 1)
    for one in ((4, 1024, 4), (16, 1024, 4), (32, 1024, 4), (64, 1024, 4), (128, 1024, 4), (64, 1024, 8), (64, 512, 2),
                (16, 4096, 4), (16, 4096, 8), (16, 8192, 8))
]  # fmt: skip


def timed(B: int, T: int, launch: Launch, rows: Rows) -> str:
    """A row of a launch that is right: the gradients alone in a graph, and the peak of both directions."""
    x, gate, weight, d_out = (
        *(drawn(B, T, HEADS, SIZE) for _ in range(2)),
        drawn(SIZE),
        drawn(B, T, HEADS, SIZE),
    )
    shape = {"B": B, "T": T, "H": HEADS, "K": SIZE}
    back = partial(launch_backward, d_out, x.detach(), weight.detach(), gate.detach(), True, 1e-6, True)
    both = both_ways(lambda: rms_norm(x, weight, gate=gate, eps=1e-6), [x, weight, gate])["fwdbwd"]
    ms = rows(("norm_backward", told(launch), "bwd_graph"), shape, back)
    return f"{B} x {T:6} {told(launch):28} {ms:.4f} ms, both directions hold {_peak(both, DEVICE)}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", type=float, default=40.0, help="seconds after which nothing new is begun")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the log and the rows")
    parser.add_argument("--commit", default=None, help="what the code is")
    parser.add_argument("--tiny", action="store_true", help="small, on a CPU")
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    begin, log = time.monotonic(), Log(chosen.out / "norm_check.log")
    rows = Rows(log, chosen.out / "evidence-glue.jsonl", {**machine(DEVICE), "commit": chosen.commit})
    table, cases = list[str](), cases_of("norm")
    for launch in LAUNCHES[: 1 if TINY else None]:
        if time.monotonic() - begin > chosen.budget:
            break
        with force_path("triton"), tuning(norm_backward=launch):
            if held(log, f"norm_backward {launch}", cases):
                table += [timed(B, T, launch, rows) for B, T in SIZES]
    for line in (*table, *log.wrong, f"{len(log.wrong)} wrong, {time.monotonic() - begin:.0f} s"):
        log(line)
    return 1 if log.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
