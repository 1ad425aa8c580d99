"""What a call of an op costs the host, on a GPU that has next to nothing to do.

    python tests/bench/host_time.py --ops decay_attention simple_gla gla --out "$OUT"

Appends a row for each op and direction to evidence-host-time.jsonl in `--out`. Medians of repeats are not taken: the mean of 200
calls one after the other, of which the device runs none longer than the host takes for the next.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import triton

from heddle.kernels import OPS
from heddle.kernels.accuracy import draw

RESULTS = Path(__file__).parent / "results"
SHAPE = {"B": 1, "T": 128, "H": 16, "HV": 16, "K": 128, "V": 128}
WARM, CALLS = 20, 200


def calls(name: str) -> dict[str, Callable[[], object]]:
    """A call without gradients, and one with them."""
    op = OPS[name]
    sample = draw(op, SHAPE, torch.bfloat16, initial_state=False, device="cuda")
    wanted = op.cases.differentiable
    leaves = {key: x.detach().requires_grad_(key in wanted) for key, x in sample.arguments.items()}

    def forward() -> object:
        with torch.no_grad():
            return op(**leaves)

    def both() -> object:
        return torch.autograd.grad(op(**leaves)[0], [leaves[key] for key in wanted], sample.upstream[0])

    return {"fwd": forward, "fwdbwd": both}


def host_us(call: Callable[[], object]) -> float:
    """Microseconds until a call comes back."""
    for _ in range(WARM):
        call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(CALLS):
        call()
    taken = time.perf_counter() - begin
    torch.cuda.synchronize()
    return taken / CALLS * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--ops", nargs="+", choices=sorted(OPS), default=["decay_attention", "simple_gla", "gla"]
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the rows")
    parser.add_argument("--commit", help="what the code is")
    chosen = parser.parse_args()
    header = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": chosen.commit,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    with (chosen.out / "evidence-host-time.jsonl").open("a") as rows:
        for name in chosen.ops:
            for phase, call in calls(name).items():
                row = {
                    **header,
                    "op": name,
                    "phase": phase,
                    "shape": SHAPE,
                    "dtype": "bfloat16",
                    "host_us": host_us(call),
                }
                rows.write(json.dumps(row) + "\n")
                print(f"{name:18} {phase:7} {row['host_us']:.0f} us", flush=True)


if __name__ == "__main__":
    main()
