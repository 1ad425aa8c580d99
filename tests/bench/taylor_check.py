"""One call on a GPU machine: is taylor_attention right, in all dtypes and by which launches, and how fast is each of them.

    python tests/bench/taylor_check.py --out "$OUT" --budget 200 --commit "$(git rev-parse --short=12 HEAD)"
    TRITON_INTERPRET=1 python tests/bench/taylor_check.py --tiny --out /tmp/taylor --commit none

Compiles side by side first. Holds every dtype, form and launch to the reference in float64, then times what is right at the
shapes of the benchmark. Writes taylor_check.log and rows to evidence-taylor.jsonl; the short table comes last. Exits with 1 if
anything was wrong. `--tiny` tries the script itself on a CPU, with interpreted kernels.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_check import Log

from heddle.kernels import force_path, taylor_attention
from heddle.kernels.accuracy import Measured, compare, draw
from heddle.kernels.bench import _call_of, machine, timed, timing_sample
from heddle.kernels.common.tuning import tuning
from heddle.kernels.configs.launch import Launch

WORKERS, ON_GPU = 12, torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
HALF = torch.bfloat16 if ON_GPU else torch.float32
DTYPES = (torch.bfloat16, torch.float16, torch.float32) if ON_GPU else (torch.float32,)
CHECKED = {"B": 1, "H": 2, "K": 16, "V": 128, "T": 700}
FORMS: dict[str, dict[str, Any]] = {
    "as models have it": {},
    "narrow": {"K": 7, "V": 24},
    "wide": {"V": 256},
    "ragged": {"V": 100, "T": 65},
    "one token": {"T": 1},
    "packed": {"ends": [0, 5, 5, 133, 700]},
    "long": {"T": 3000},
    "across": {"across": True},
}
Overrides = dict[str, Launch | int]
TRIED: dict[str, tuple[Launch, ...]] = {
    "state": (Launch(64, 128, 8, 2), Launch(32, 128, 8, 2), Launch(64, 64, 8, 2), Launch(64, 64, 4, 3)),
    "forward": (Launch(64, 64, 8, 2), Launch(128, 64, 8, 2), Launch(64, 64, 4, 3)),
    "queries": (Launch(64, 32, 4, 2), Launch(64, 64, 4, 1), Launch(32, 64, 4, 2)),
    "keys": (Launch(64, 32, 4, 2), Launch(64, 32, 8, 1), Launch(32, 64, 4, 1)),
}
SEGMENTS = (256, 1024, 2048)
SHAPES = taylor_attention.cases.bench_shapes


def tiny() -> None:
    """Sizes that a CPU interprets in seconds."""
    global FORMS, SEGMENTS, SHAPES, TRIED
    CHECKED.update(T=70, V=16)
    FORMS = {name: FORMS[name] for name in ("narrow", "one token")}
    TRIED = {"forward": (Launch(64, 32, 4, 1),)}
    SEGMENTS, SHAPES = (128,), ({**CHECKED, "B": 2},)


def variants() -> Iterator[Overrides]:
    """What is set, and each launch that is tried."""
    yield {}
    yield from ({name: launch} for name, launches in TRIED.items() for launch in launches)
    yield from ({"segment": size} for size in SEGMENTS)


def held(overrides: Overrides, form: dict[str, Any], dtype: torch.dtype) -> list[Measured]:
    """All results of one call, and how far they may be off."""
    ends = form.get("ends")
    shape = {**CHECKED, **{name: size for name, size in form.items() if name not in ("ends", "across")}}
    sample = draw(taylor_attention, shape, dtype, cu_seqlens=ends)
    if "across" in form:
        # Keys of one direction, queries across it: sums over pairs of dimensions cancel.
        sample.arguments["k"][..., 0] += 8.0
        sample.arguments["q"][..., 0] = 0.0
        sample.arguments["q"].mul_(2.0)
    # Also in dtypes that nothing has shown to be right yet.
    with tuning(**overrides), force_path("triton"):
        return compare(taylor_attention, sample, DEVICE)


def calls() -> list[tuple[str, Callable[[], list[Measured]]]]:
    """What is held to the reference, by name."""
    found = [
        (f"{str(dtype).removeprefix('torch.')} {name}", lambda form=form, dtype=dtype: held({}, form, dtype))
        for dtype, (name, form) in itertools.product(DTYPES, FORMS.items())
    ]
    return found + [
        (told(overrides), lambda overrides=overrides: held(overrides, {}, HALF)) for overrides in variants()
    ]


def told(overrides: Overrides) -> str:
    """A variant in few words."""
    words = []
    for name, one in overrides.items():
        numbers = (one,) if isinstance(one, int) else (one.chunk, one.columns, one.warps, one.stages)
        words.append(" ".join(map(str, (name, *numbers))))
    return ", ".join(words) or "as set"


def warm(index: int) -> None:
    """Compiles every `WORKERS`th thing that will run, into Triton's cache on disk."""
    for name, call in calls()[index::WORKERS]:
        try:
            call()
        except Exception as error:
            print(f"{name}: {str(error).splitlines()[0]}", flush=True)


def times(overrides: Overrides) -> Iterator[dict[str, Any]]:
    """A variant at each shape, forward and in both directions."""
    for shape, phase in itertools.product(SHAPES, ("fwd", "fwdbwd")):
        sample = timing_sample(taylor_attention, shape, HALF, DEVICE)
        call = _call_of(taylor_attention, taylor_attention, "heddle", sample, phase)
        with tuning(**overrides):
            yield {"phase": phase, "shape": dict(shape), "variant": told(overrides), **timed(call, DEVICE)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the log and the rows")
    parser.add_argument("--budget", type=float, default=200.0, help="seconds after which nothing is begun")
    parser.add_argument("--commit", default=None, help="what the code is")
    parser.add_argument("--tiny", action="store_true", help="small, on a CPU")
    parser.add_argument("--warm", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.tiny:
        tiny()
    if given.warm is not None:
        warm(given.warm)
        return 0
    begin = time.monotonic()
    given.out.mkdir(parents=True, exist_ok=True)
    log = Log(given.out / "taylor_check.log")
    if ON_GPU:
        command = [sys.executable, __file__, "--warm"]
        workers = [subprocess.Popen([*command, str(index)]) for index in range(WORKERS)]
        for worker in workers:
            worker.wait()
        log(f"compiled after {time.monotonic() - begin:.0f} s")
    right = {name for name, call in calls() if log.check(name, call())}
    header, lines = {**machine(DEVICE), "commit": given.commit, "op": "taylor_attention"}, []
    with (given.out / "evidence-taylor.jsonl").open("a") as rows:
        for overrides in variants():
            if told(overrides) not in right or time.monotonic() - begin > given.budget:
                continue
            found = list(times(overrides))
            rows.writelines(json.dumps({**header, **row}) + "\n" for row in found)
            rows.flush()
            lines.append(f"{told(overrides):24s} " + "  ".join(f"{row['ms']:8.4f}" for row in found))
    for line in [*lines, f"{len(log.wrong)} wrong, {time.monotonic() - begin:.0f} s", *log.wrong]:
        log(line)
    return bool(log.wrong)


if __name__ == "__main__":
    sys.exit(main())
