"""One call on a GPU machine: are the peaks of memory beside timings right, and are training steps predicted.

    python tests/bench/memory_check.py --out "$OUT" --budget 500 --commit "$(git rev-parse --short=12 HEAD)"

Times three models of `latency_space.yaml` in every phase, and holds each row's peak against the allocator's counter over a model
that is built and called alone, and against a second timing. Then it fits a latency model of training steps, as `heddle bench
--fit --phase train` does, and holds it against 30 stacks that it has not seen. Rows go to evidence-memory.jsonl in `--out`; the
short table comes last. Exits with 1 if a peak was wrong. `--tiny` is the same with small models, also on a CPU, where a peak
alone has no counter and only the second timing is held against the first.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from heddle.bench_commands import held_out_lines
from heddle.errors import HeddleError
from heddle.search import environment
from heddle.search.latency import Effort, Place, _Step, measure
from heddle.search.latency_model.measuring import How, Site, fit_model
from heddle.search.results import Latency
from heddle.search.timing_subject import subject_of
from heddle.specs import ModelSpec, SpecFile, load, loads

SPACE = Path(__file__).with_name("latency_space.yaml")
PLACES = (
    Place("decode", 16, 4096), Place("decode", 16, 32_768), Place("prefill", 1, 4096), Place("prefill", 1, 32_768),
    Place("train", 4, 2048), Place("train", 1, 8192),
)  # fmt: skip
TINY_PLACES = (Place("decode", 2, 32), Place("prefill", 2, 32), Place("train", 2, 32))
FITTED, TINY_FITTED = Place("train", 4, 2048), Place("train", 1, 16)
TINY = """
version: 1
name: tiny
model:
  vocab_size: 256
  hidden_size: 32
  blocks:
    full: {mixer: {kind: attention, heads: 2}, channel: {kind: gelu, ratio: 1.0}}
    delta: {mixer: {kind: gated_deltanet, heads: 2}, channel: {kind: gelu, ratio: 1.0}}
  layers: {placement: {length: 4, of: [full, delta], count: {full: {int: [1, 3]}}}}
"""
# Blocks of the allocator are rounded up, and libraries take what they keep at some call or other.
SHARE, BYTES = 0.01, 32 << 20
# Seconds that the fit must have left to begin.
LEAST_FOR_FIT = 150.0


@dataclass(frozen=True, slots=True)
class Peak:
    """One model at one place: the row of a timing, the peak of a second one, and that of the model alone, None on a CPU."""

    model: str
    row: Latency
    again: int | None
    alone: int | None

    @property
    def is_right(self) -> bool:
        seen = self.row.peak_bytes
        if seen is None or self.again is None:
            return False
        if self.alone is None:
            return seen == self.again
        return all(abs(seen - other) <= SHARE * other + BYTES for other in (self.again, self.alone))

    @property
    def told(self) -> str:
        known = (self.row.peak_bytes, self.again, self.alone)
        sizes = [f"{'–' if one is None else f'{one / 2**20:.1f}':>10}" for one in known]
        verdict = "right" if self.is_right else "WRONG"
        return f"{self.model:8} {self.row.label:22} {self.row.median_ms:10.3f} {' '.join(sizes)}  {verdict}"


def models(file: SpecFile) -> dict[str, ModelSpec]:
    placement = file.space.placement
    assert placement is not None
    kinds, length = list(placement.of), placement.length
    orders = {
        "all-full": ["full"] * length,
        "all-delta": ["delta"] * length,
        "mixed": [kinds[index % len(kinds)] for index in range(length)],
    }
    return {name: file.resolve(file.space.defaults(), layers=layers).model for name, layers in orders.items()}


def alone(model: ModelSpec, place: Place) -> int | None:
    """The allocator's own peak over a model that is built and called with nothing beside it; None on a CPU."""
    if environment.pick_device() != "cuda":
        return None
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    step = _Step(subject_of(model, None), place, "cuda", torch.bfloat16)
    for _ in range(2):
        step._work()
        step._clear()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step._work()
    torch.cuda.synchronize()
    found = torch.cuda.max_memory_allocated() - before
    del step
    gc.collect()
    return found


def peaks(file: SpecFile, places: tuple[Place, ...], until: float) -> Iterator[Peak]:
    effort = Effort(warmup=2, least=5, most=50, seconds=0.2, builds=1)
    reference = next(iter(models(file).values()))
    for place in places:
        for name, model in models(file).items():
            if time.monotonic() > until:
                return
            try:
                row = measure(model, place, reference=reference, reference_name="all-full", effort=effort)
                again = measure(model, place, effort=effort).peak_bytes
                yield Peak(name, row, again, alone(model, place))
            except HeddleError as error:
                print(f"{name} {place.label}: {error}", flush=True)


def fitted(file: SpecFile, place: Place, *, stacks: int, unseen: int) -> dict[str, Any]:
    """The held-out errors of a latency model of training steps."""
    site = Site(place, models(file)["all-full"], "all-full")
    effort = Effort(warmup=2, least=5, most=100, seconds=0.15, builds=1)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        how = How(effort=effort, folder=Path(folder))
        (fit,) = fit_model(file, [site], stacks=stacks, unseen=unseen, how=how).fits
    print(fit.place.label, *held_out_lines(fit), sep="\n", flush=True)
    spent = round(time.monotonic() - began, 1)
    return {"fit": fit.place.label, "stacks": fit.measured, "held_out": asdict(fit.held_out), "wall_s": spent}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the rows")
    parser.add_argument("--budget", type=float, default=500.0, help="seconds")
    parser.add_argument("--commit", help="the code that measured")
    parser.add_argument("--tiny", action="store_true", help="small models, in seconds")
    chosen = parser.parse_args()
    ends, device = time.monotonic() + chosen.budget, environment.pick_device()
    head = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": chosen.commit,
        "device": environment.device_name(device),
        "packages": environment.package_versions(),
        "tiny": chosen.tiny,
    }

    def keep(row: dict[str, Any]) -> None:
        with (chosen.out / "evidence-memory.jsonl").open("a") as rows:
            rows.write(json.dumps({**head, **row}) + "\n")

    chosen.out.mkdir(parents=True, exist_ok=True)
    file, found = loads(TINY) if chosen.tiny else load(SPACE), list[Peak]()
    for one in peaks(file, TINY_PLACES if chosen.tiny else PLACES, ends - LEAST_FOR_FIT):
        found.append(one)
        keep({"model": one.model, "row": asdict(one.row), "again": one.again, "alone": one.alone})
        print(one.told, flush=True)
    if chosen.tiny:
        keep(fitted(file, TINY_FITTED, stacks=7, unseen=2))
    elif time.monotonic() < ends - LEAST_FOR_FIT:
        keep(fitted(file, FITTED, stacks=45, unseen=30))
    print(f"{'model':8} {'place':22} {'ms':>10} {'MiB':>10} {'again':>10} {'alone':>10}")
    print(*(one.told for one in found), sep="\n")
    return int(not found or not all(one.is_right for one in found))


if __name__ == "__main__":
    sys.exit(main())
