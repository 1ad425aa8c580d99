"""One call on a GPU machine: attention behind padding and in later pieces of a prompt, by the window kernels and by masks.

    python tests/bench/padded_check.py --out "$OUT" --budget 120 --commit "$(git rev-parse --short=12 HEAD)"
    python tests/bench/padded_check.py --out /tmp/padded --budget 60 --commit none --tiny

Holds both ways to masks in float64 on a short sequence first, then times them in turns and tells the peak of each: dense
attention of rows padded on the left, that of a piece after earlier tokens, and a window with sink tokens behind padding.
Writes padded_check.log and rows to evidence-padded.jsonl; exits with 1 if anything was wrong. `--tiny` tries the script
itself on a CPU.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from gpu_check import Log
from torch import Tensor

from heddle.compose.cache import Call
from heddle.compose.modules.in_view import attend_in_view
from heddle.compose.modules.masks import View
from heddle.compose.modules.sliding import attend_sliding
from heddle.compose.modules.softmax import softmax_attention
from heddle.kernels.accuracy import EPSILON, worst_error
from heddle.kernels.bench import machine, timed

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
HALF = torch.bfloat16 if ON_GPU else torch.float32
# Name, rows, queries, keys, and what is in view: of a real model, and short ones.
CASES = (
    ("padded", 4, 16384, 16384, View()),
    ("piece", 1, 4096, 65536, View()),
    ("padded window, sinks", 4, 16384, 16384, View(2048, sinks=128)),
)
SHORT = (
    ("padded", 2, 300, 300, View()),
    ("piece", 1, 100, 300, View()),
    ("padded window, sinks", 2, 300, 300, View(40, sinks=9)),
)
Inputs = tuple[list[Tensor], Call]
Attend = Callable[..., Tensor]


def by_masks(q: Tensor, keys: tuple[Tensor, Tensor, None], call: Call, view: View) -> Tensor:
    return attend_in_view(q, keys, call, view, softmax_attention)


WAYS: dict[str, Attend] = {"heddle": attend_sliding, "masks": by_masks}


def drawn(rows: int, queries: int, keys: int, heads: tuple[int, int, int], dtype: torch.dtype) -> Inputs:
    """Queries, keys and values as projections leave them; the first row of several has an eighth of padding."""
    generator, (H, N, d) = torch.Generator().manual_seed(keys), heads
    sizes = ((queries, H), (keys, N), (keys, N))
    sides = [
        torch.randn(rows, length, count, d, generator=generator).to(DEVICE, dtype).transpose(1, 2)
        for length, count in sizes
    ]
    positions = torch.arange(keys - queries, keys, device=DEVICE).expand(rows, -1)
    if rows == 1:
        return sides, Call(positions)
    real = torch.ones(rows, keys, dtype=torch.bool, device=DEVICE)
    real[0, : keys // 8] = False
    return sides, Call(positions, real[:, keys - queries :], real)


def both_directions(attend: Attend, given: Inputs, view: View) -> tuple[Tensor, ...]:
    """Output where there are tokens, and gradients of queries, keys and values."""
    sides, call = given
    q, k, v = leaves = [side.detach().requires_grad_() for side in sides]
    o = attend(q, (k, v, None), call, view)
    if call.padding is not None:
        o = o * call.padding[:, None, :, None]
    return (o.detach(), *torch.autograd.grad(o, leaves, torch.ones_like(o)))


def checks(log: Log) -> None:
    for name, rows, queries, keys, view in SHORT:
        sides, call = drawn(rows, queries, keys, (4, 2, 128 if ON_GPU else 8), HALF)
        exact = both_directions(by_masks, ([side.double() for side in sides], call), view)
        limit = dict.fromkeys(WAYS, 0.0)
        for way, attend in WAYS.items():
            found = both_directions(attend, (sides, call), view)
            pairs = zip(found, exact, strict=True)
            limit[way] = max(
                worst_error(one.transpose(1, 2), other.transpose(1, 2), timed=True)[0] for one, other in pairs
            )
        most = 2 * limit["masks"] + EPSILON[HALF]
        log(
            f"{'ok   ' if limit['heddle'] <= most else 'wrong'} {name}: error {limit['heddle']:.3g}, at most {most:.3g}"
        )
        if not limit["heddle"] <= most:
            log.wrong.append(f"{name}: error {limit['heddle']:.3g}, at most {most:.3g}")


def once(attend: Attend, given: Inputs, view: View, phase: str) -> object:
    (q, k, v), call = given
    call.memo.clear()
    if phase == "fwdbwd":
        return both_directions(attend, given, view)
    with torch.no_grad():
        return attend(q, (k, v, None), call, view)


def timings(log: Log, row: Callable[..., float], late: Callable[[], bool], *, tiny: bool) -> None:
    for name, rows, queries, keys, view in SHORT if tiny else CASES:
        given = drawn(rows, queries, keys, (4, 2, 8) if tiny else (32, 8, 128), HALF)
        q, k = given[0][:2]
        for phase in ("fwd",) if rows == 1 else ("fwd", "fwdbwd"):
            ms = {}
            for way, attend in WAYS.items():
                if late():
                    log(f"{name} {phase} {way}: out of time")
                    continue

                run = partial(once, attend, given, view, phase)
                shape = {
                    "B": rows,
                    "T": queries,
                    "S": keys,
                    "H": q.shape[1],
                    "N": k.shape[1],
                    "K": q.shape[3],
                }
                shape |= {"window": view.window or keys, "sinks": view.sinks}
                ms[way] = row(name, way, phase, shape, run)
            if len(ms) == len(WAYS):
                log(f"{name} {phase}: {ms['masks'] / ms['heddle']:.2f} x as fast as masks")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", type=float, default=120.0, help="seconds after which nothing is begun")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the log and the rows")
    parser.add_argument("--commit", help="what the code is")
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a CPU")
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    begin, log = time.monotonic(), Log(chosen.out / "padded_check.log")
    header = machine(DEVICE) | ({"commit": chosen.commit} if chosen.commit else {})

    def row(name: str, impl: str, phase: str, shape: dict[str, int], run: Callable[[], object]) -> float:
        run()
        if ON_GPU:
            torch.cuda.reset_peak_memory_stats()
            run()
        peak = torch.cuda.max_memory_allocated() if ON_GPU else 0
        times = timed(run, DEVICE)
        about = {"op": name, "impl": impl, "phase": phase, "shape": shape, "dtype": str(HALF)[6:]}
        with (chosen.out / "evidence-padded.jsonl").open("a") as file:
            file.write(json.dumps({**header, **about, **times, "peak_bytes": peak}) + "\n")
        log(f"{name:22} {phase:7} {impl:7} {times['ms']:9.3f} ms, peak {peak / 1e9:.2f} GB")
        return float(times["ms"])

    checks(log)
    timings(log, row, lambda: time.monotonic() - begin > chosen.budget, tiny=chosen.tiny)
    log(f"{len(log.wrong)} wrong, {time.monotonic() - begin:.0f} s")
    return 1 if log.wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
