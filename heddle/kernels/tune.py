"""Searches better launches for this machine, and keeps what is better: what `heddle bench --tune` does.

Nothing is tuned while models run. For each kernel of an op the neighbours of its launch are tried, one change at a time: half
or twice the columns, half or twice the warps, one stage more or less. A launch with one stage keeps it, since loading ahead may
be a race (docs/decisions/0008-loops-in-a-row.md). What is faster must pass what the shipped launch passed: within the bounds of
`accuracy.compare`, the same bits twice. Tuned are elements of two bytes and heads up to 128; the rest stays as shipped.
"""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from heddle.errors import HeddleError
from heddle.kernels import OPS
from heddle.kernels.accuracy import compare, draw, results
from heddle.kernels.bench import milliseconds, timing_sample
from heddle.kernels.common.tuning import tuning
from heddle.kernels.configs.dense_attention import Rule, rules
from heddle.kernels.configs.found import keep, tunable
from heddle.kernels.configs.launch import Launch
from heddle.kernels.dense_attention import dense_attention
from heddle.kernels.op import TRITON_VERSION, Op, force_path
from heddle.kernels.tune_backends import BackendTrial, best_rules

# The op whose table is of backends.
BACKENDS = dense_attention.name
COLUMNS, WARPS, STAGES = (16, 128), (2, 8), (1, 4)
# What is not faster by this share is noise.
GAIN = 0.02
DTYPE = torch.bfloat16
CHECKED = {"B": 1, "H": 2, "HV": 2, "K": 128, "V": 128, "T": 300}
SHAPES = 2
Launches = Mapping[str, Launch]
# Milliseconds of a call with launches in the place of the table's; raises where they cannot run or give other results.
Trial = Callable[[Launches], float]


@dataclass(frozen=True, slots=True)
class Tuned:
    """What was found for an op: milliseconds as shipped and now (the geometric mean over shapes and phases), the changed
    launches (of `dense_attention` the rules), and how many were tried."""

    op: str
    shipped_ms: float
    found_ms: float
    launches: Mapping[str, Launch | Rule]
    tried: int


def tune(
    names: Iterable[str] | None = None,
    *,
    seconds: float = math.inf,
    report: Callable[[str], None] = lambda _: None,
) -> list[Tuned]:
    """Tunes the ops named, or all that have a table of launches, and keeps what it found; `report` is told of each try.

    After `seconds` nothing more is tried; what was found until then is kept.

    Raises:
        HeddleError: "bad-argument" without a CUDA device, or for an op that has no launches to tune.
    """
    if not torch.cuda.is_available() or TRITON_VERSION is None:
        raise HeddleError(
            "bad-argument", "launches are tuned on a CUDA device with Triton, and there is none here"
        )
    until, device = time.monotonic() + seconds, torch.device("cuda")
    done = []

    def late() -> bool:
        return time.monotonic() > until

    for op in _chosen(names):
        if op.name == BACKENDS:
            trial = BackendTrial(device, rules(torch.cuda.get_device_capability(device)))
            found = best_rules(trial, late=late, report=report)
            done.append(Tuned(op.name, found.shipped_ms, found.found_ms, found.rules, found.tried))
        else:
            table = tunable(_table(op.name, device))
            done.append(climb(op.name, table, _Trial(op, device), late=late, report=report))
        if done[-1].launches:
            told = {"shipped_ms": done[-1].shipped_ms, "found_ms": done[-1].found_ms}
            keep(
                op.name,
                done[-1].launches,
                device=torch.cuda.get_device_name(),
                triton=TRITON_VERSION,
                told=told,
                library=torch.__version__ if op.name == BACKENDS else None,
            )
    return done


def tuned_ops() -> dict[str, Op[..., Any]]:
    """The ops with a table of launches of their own, or of torch's backends, by name."""
    found = {op.name: op for op in OPS if op.kernel is not None and _module(op.name) is not None}
    return found | {BACKENDS: dense_attention}


def _chosen(names: Iterable[str] | None) -> list[Op[..., Any]]:
    known = tuned_ops()
    for name in names or ():
        if name not in known:
            raise HeddleError(
                "bad-argument", f"{name} has no launches to tune", hint=f"one of: {', '.join(known)}"
            )
    return [known[name] for name in names or known]


def _module(op: str) -> Any:
    try:
        return importlib.import_module(f"heddle.kernels.configs.{op}")
    except ModuleNotFoundError:
        return None


def _table(op: str, device: torch.device) -> Any:
    return _module(op).family(torch.cuda.get_device_capability(device))


def climb(
    op: str,
    shipped: Launches,
    trial: Trial,
    *,
    late: Callable[[], bool] = lambda: False,
    report: Callable[[str], None] = lambda _: None,
) -> Tuned:
    """Takes the best neighbour of each launch in turn, with those taken before in place, until all were visited or it is late.

    All launches are given to each trial: what an earlier tuning has kept has no part in it.
    """
    found: dict[str, Launch] = {}
    first = best = trial(shipped)
    tried = 0
    for name, launch in shipped.items():
        for candidate in neighbours(launch):
            if late():
                return Tuned(op, first, best, found, tried)
            tried += 1
            try:
                ms = trial({**shipped, **found, name: candidate})
            except Exception as error:
                report(
                    f"{op} {name} {candidate}: {' '.join(str(error).split())[:120] or type(error).__name__}"
                )
                continue
            report(f"{op} {name} {candidate}: {ms:.4f} ms, best {best:.4f}")
            if ms < best * (1 - GAIN):
                best, found[name] = ms, candidate
    return Tuned(op, first, best, found, tried)


def neighbours(launch: Launch) -> Iterator[Launch]:
    """The launches that differ in one thing, by one step."""
    for columns in (launch.columns // 2, launch.columns * 2):
        if COLUMNS[0] <= columns <= COLUMNS[1]:
            yield replace(launch, columns=columns)
    for warps in (launch.warps // 2, launch.warps * 2):
        if WARPS[0] <= warps <= WARPS[1]:
            yield replace(launch, warps=warps)
    for stages in (launch.stages - 1, launch.stages + 1):
        if launch.stages > 1 and STAGES[0] <= stages <= STAGES[1]:
            yield replace(launch, stages=stages)


class _Trial:
    """Checks launches on a small shape, then times them on the op's own, forward and in both directions."""

    def __init__(self, op: Op[..., Any], device: torch.device) -> None:
        self.op, self.device = op, device
        self.sample = draw(op, CHECKED, DTYPE).to(device)
        shapes = op.cases.bench_shapes[:SHAPES]
        self.timed = [timing_sample(op, shape, DTYPE, device) for shape in shapes]

    def __call__(self, launches: Launches) -> float:
        with tuning(**launches), force_path("triton"):
            self._check()
            times = [
                milliseconds(self.op, sample, phase) for sample in self.timed for phase in ("fwd", "fwdbwd")
            ]
        return math.exp(sum(map(math.log, times)) / len(times))

    def _check(self) -> None:
        for measured in compare(self.op, self.sample, self.device):
            if not measured.ok:
                raise ArithmeticError(str(measured))
        once, again = (results(self.op, self.sample) for _ in range(2))
        other = [name for name in once if not torch.equal(once[name], again[name])]
        if other:
            raise ArithmeticError(f"{', '.join(other)}: another result the second time")
