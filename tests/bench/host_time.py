"""What a call of an op costs the host, on a GPU that has next to nothing to do.

    python tests/bench/host_time.py --commit "$(git rev-parse --short=12 HEAD)" --out "$OUT"

Appends a row for each op and phase (forward, forward and backward, decode step without a graph) to evidence-host-time.jsonl in
`--out`. A time is that of a few calls one after the other, which the device may still be at when the host is done: the median of
many such runs, and the least. Most of the time goes into compilation, so rows are written as they come.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import triton

from heddle.kernels import OPS as ALL_OPS
from heddle.kernels import force_path
from heddle.kernels._gated_delta_rule_step import launch_step
from heddle.kernels.accuracy import draw

OPS = {op.name: op for op in ALL_OPS if op.step is not None}
RESULTS = Path(__file__).parent / "results"
SHAPE = {"B": 1, "T": 128, "H": 16, "HV": 16, "K": 128, "V": 128}
# Few at a time: the device may be behind, and its queue must not fill.
WARM, RUNS, CALLS = 20, 40, 20


def calls(name: str) -> dict[str, Callable[[], object]]:
    """A call without gradients, one with them, and a decode step."""
    op = OPS[name]
    sample = draw(op, SHAPE, torch.bfloat16, initial_state=False, device="cuda")
    wanted = op.cases.differentiable
    leaves = {key: x.detach().requires_grad_(key in wanted) for key, x in sample.arguments.items()}
    single = draw(op, {**SHAPE, "T": 1}, torch.bfloat16, device="cuda").arguments
    single["state"] = single.pop("initial_state")

    def forward() -> object:
        with torch.no_grad():
            return op(**leaves)

    def both() -> object:
        return torch.autograd.grad(op(**leaves)[0], [leaves[key] for key in wanted], sample.upstream[0])

    def step() -> object:
        assert op.step is not None
        with torch.no_grad():
            return op.step(**single)

    return {"fwd": forward, "fwdbwd": both, "decode": step}


def host_us(call: Callable[[], object]) -> tuple[float, float]:
    """Microseconds until a call comes back: median and least of all runs."""
    for _ in range(WARM):
        call()
    taken = []
    for _ in range(RUNS):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(CALLS):
            call()
        taken.append((time.perf_counter() - begin) / CALLS * 1e6)
    torch.cuda.synchronize()
    return statistics.median(taken), min(taken)


def parts() -> None:
    """Where the time of one eager step goes: memory for its results, then with the launch, then all of it."""
    step = OPS["gated_delta_rule"].step
    assert step is not None
    single = draw(OPS["gated_delta_rule"], {**SHAPE, "T": 1}, torch.bfloat16, device="cuda").arguments
    given = [single[name] for name in ("q", "k", "v", "log_decay", "beta", "initial_state")]
    out, state = step(*given)

    def memory() -> object:
        sizes = ((out.shape, out.dtype), (state.shape, state.dtype))
        return [torch.empty(shape, dtype=dtype, device=out.device) for shape, dtype in sizes]

    calls = {"memory": memory, "launcher": lambda: launch_step(*given, 0.1), "step": lambda: step(*given)}
    for name, call in calls.items():
        median, least = host_us(call)
        print(f"{name:18} {median:.0f} us, least {least:.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ops", nargs="+", choices=sorted(OPS), default=list(OPS))
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the rows")
    parser.add_argument("--parts", action="store_true", help="only print where an eager step spends its time")
    parser.add_argument("--commit", help="what the code is")
    chosen = parser.parse_args()
    if chosen.parts:
        with torch.no_grad():
            parts()
        return
    header = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": chosen.commit,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    # Also those that no GPU has held to the reference yet.
    with (chosen.out / "evidence-host-time.jsonl").open("a") as rows, force_path("triton"):
        for name in chosen.ops:
            for phase, call in calls(name).items():
                median, least = host_us(call)
                told = {"op": name, "phase": phase, "shape": SHAPE, "dtype": "bfloat16"}
                rows.write(json.dumps({**header, **told, "host_us": median, "host_us_least": least}) + "\n")
                rows.flush()
                print(f"{name:18} {phase:7} {median:.0f} us, least {least:.0f}", flush=True)


if __name__ == "__main__":
    main()
