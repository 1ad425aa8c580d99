"""Processes that work on placements, some on each GPU of a machine, for `truth_set.py`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

# Jobs whose slowest tells what the next of their kind is expected to take.
RECENT = 4
# A placement, and the number of what is done to it.
Job = tuple[str, int]
Told = dict[str, Any]
Work = Callable[[str, str, int, str], Told]


@dataclass
class Pools:
    """Processes that do `work(path, *job, device)`, so many on each GPU; which one, they find in their environment."""

    work: Work
    gpus: Sequence[str | None]
    pools: Sequence[ProcessPoolExecutor]
    workers: int
    running: dict[Future[Told], tuple[int, Job, float]] = field(default_factory=dict)

    def is_full(self) -> bool:
        return len(self.running) >= self.workers * len(self.pools)

    def begin(self, path: str, job: Job, device: str) -> None:
        """On the GPU that has the least to do. A pool starts its processes when it is asked."""
        busy = [sum(at == each for each, _, _ in self.running.values()) for at in range(len(self.pools))]
        at = busy.index(min(busy))
        if (gpu := self.gpus[at]) is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = gpu
        self.running[self.pools[at].submit(self.work, path, *job, device)] = (at, job, time.monotonic())

    def ended(self) -> Iterator[tuple[Future[Told], Job, float]]:
        """What has ended, at least one, with the seconds that it took."""
        for done in wait(self.running, return_when=FIRST_COMPLETED).done:
            _, job, begun = self.running.pop(done)
            yield done, job, time.monotonic() - begun


class Pace:
    """What a job takes, by those of its kind that ended last, or those of another; `sizes`: of each kind, in tokens."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = sizes
        self.took: dict[int, list[float]] = {}

    def tell(self, kind: int, seconds: float) -> None:
        self.took.setdefault(kind, []).append(seconds / self.sizes[kind])

    def expected(self, kind: int) -> float:
        """Seconds; 0 where nothing has ended yet."""
        recent = [max(took[-RECENT:]) for took in (self.took.get(kind),) if took]
        recent = recent or [max(took[-RECENT:]) for took in self.took.values()]
        return self.sizes[kind] * max(recent, default=0.0)


def visible(gpus: int) -> list[str | None]:
    """The first GPUs of those that CUDA_VISIBLE_DEVICES names, or of all."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = named.split(",") if named else [str(index) for index in range(gpus)]
    assert len(names) >= gpus, f"CUDA_VISIBLE_DEVICES={named} names fewer than {gpus} GPUs"
    return list(names[:gpus])
