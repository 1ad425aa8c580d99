"""The first call of each op, forward and backward, in a fresh process whose Triton cache is empty.

    python tests/bench/cold_start.py --commit "$(git rev-parse --short=12 HEAD)" --out "$OUT"
    python tests/bench/cold_start.py --impl fla --ops gla --out "$OUT"

A process for each op imports it, makes the CUDA context and draws the inputs of its first benchmark; then the clock starts, and
it stops when the gradients are there, of a step when its result is. `again_s` is the same call once more: the rest of the first
was compiling, or a rival's tuning. Rows go to evidence-cold-start.jsonl in `--out`, with how many processes ran at once.
`--tiny`: small, on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from heddle.kernels.bench import CALLED, CPU_LIMIT, first_call, machine
from heddle.kernels.op import Op

RESULTS = Path(__file__).parent / "results"
KNOWN: dict[str, Op[..., Any]] = {op.name: op for op in CALLED if op.kernel is not None}
GOAL_S = 15.0


def device_of(tiny: bool) -> torch.device:
    return torch.device("cpu" if tiny else "cuda")


def measured(name: str, impl: str, tiny: bool) -> dict[str, object]:
    """In the process of one op: seconds of both calls."""
    op, device = KNOWN[name], device_of(tiny)
    shape = dict((op.cases.bench_shapes or op.cases.decode_shapes)[0])
    if tiny:
        limits = {**CPU_LIMIT, "T": 65, "S": 65}
        shape = {letter: min(size, limits.get(letter, size)) for letter, size in shape.items()}
    wait = (lambda: None) if tiny else torch.cuda.synchronize
    call = first_call(op, shape, impl=impl, device=device)
    wait()
    seconds = []
    for _ in range(2):
        begin = time.perf_counter()
        call()
        wait()
        seconds.append(round(time.perf_counter() - begin, 3))
    return {"op": name, "impl": impl, "shape": shape, "first_s": seconds[0], "again_s": seconds[1]}


def in_fresh_process(name: str, impl: str, seconds: float, tiny: bool) -> dict[str, object]:
    """The row of an op; `failed` in it where the process ended otherwise."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, __file__, "--inside", "--ops", name, "--impl", impl]
        command += ["--tiny"] if tiny else []
        environment = {**os.environ, "TRITON_CACHE_DIR": cache}
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=seconds, check=True
            )
        except subprocess.SubprocessError as error:
            told = str(getattr(error, "stderr", None) or error).strip().splitlines()
            return {"op": name, "impl": impl, "failed": told[-1] if told else type(error).__name__}
        return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ops", nargs="*", choices=KNOWN, default=list(KNOWN))
    parser.add_argument("--impl", choices=["heddle", "fla"], default="heddle")
    parser.add_argument("--commit", help="the code that ran")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the rows")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds for one op")
    parser.add_argument("--at-once", type=int, default=1, help="processes that run side by side")
    parser.add_argument("--tiny", action="store_true", help="small, on a CPU")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.inside:
        print(json.dumps(measured(chosen.ops[0], chosen.impl, chosen.tiny)))
        return
    header = {**machine(device_of(chosen.tiny)), "commit": chosen.commit, "at_once": chosen.at_once}
    with ThreadPoolExecutor(chosen.at_once) as pool:
        made = [
            pool.submit(in_fresh_process, name, chosen.impl, chosen.limit, chosen.tiny) for name in chosen.ops
        ]
        for one in as_completed(made):
            row = one.result()
            with (chosen.out / "evidence-cold-start.jsonl").open("a") as rows:
                rows.write(json.dumps({**header, **row}) + "\n")
            told = row.get("failed") or f"{row['first_s']} s, then {row['again_s']} s (goal {GOAL_S:.0f})"
            print(f"{row['op']} {chosen.impl}: {told}", flush=True)


if __name__ == "__main__":
    main()
