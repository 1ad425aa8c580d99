"""What a search had spent when each of its trials ended: minutes, GPU-seconds, or worker-seconds where there is no GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from heddle.dashboards.busy import Busy
from heddle.search.record import Run

TRIAL, MINUTES = "trial", "minutes of the search"
# A GPU counts once however many evaluations are on it.
GPU_S, WORKER_S = "GPU-seconds", "worker-seconds"


def overs(run: Run) -> dict[str, str]:
    """What the best so far is drawn over, each with the unit of its axis."""
    return {"trial": TRIAL, "time": MINUTES, "device": GPU_S if _tells_gpus(run) else WORKER_S}


def _tells_gpus(run: Run) -> bool:
    """Whether every session that evaluated told on which GPUs: an older heddle did not."""
    placed = {event["session"] for event in run.events if event["event"] == "evaluation_placed"}
    return bool(placed) and all(
        event["session"] in placed for event in run.events if event["event"] == "evaluation_finished"
    )


def positions(run: Run, over: str) -> dict[int, float]:
    """Where each trial stands on an axis of `overs`: at its number, or at what had been spent when it ended."""
    if over == "trial":
        return {trial.number: float(trial.number) for trial in run.trials}
    spent: Spent = Minutes() if over == "time" else GpuSeconds() if _tells_gpus(run) else WorkerSeconds()
    found: dict[int, float] = {}
    for event in run.events:
        spent.take(event)
        if event["event"] in ("trial_started", "trial_finished"):
            found[event["number"]] = spent.now
    return found


class Spent(Protocol):
    """A sum over the events of a search."""

    def take(self, event: Mapping[str, Any]) -> None:
        """Go on with the next event."""

    @property
    def now(self) -> float:
        """The sum until the last event."""


class Minutes:
    """Minutes of the search, without the time between its sessions."""

    def __init__(self) -> None:
        self._before, self._session, self._longest, self._clock = 0.0, "", 0.0, 0.0

    def take(self, event: Mapping[str, Any]) -> None:
        if event["session"] != self._session:
            self._before, self._session, self._longest = self._before + self._longest, event["session"], 0.0
        self._clock = event["clock_s"]
        self._longest = max(self._longest, self._clock)

    @property
    def now(self) -> float:
        return (self._before + self._clock) / 60


class WorkerSeconds:
    """Seconds of evaluations, all workers together; what was taken from the ledger costs nothing."""

    def __init__(self) -> None:
        self.now = 0.0

    def take(self, event: Mapping[str, Any]) -> None:
        if event["event"] == "evaluation_finished":
            self.now += event["wall_s"]


class GpuSeconds:
    """Seconds in which GPUs had an evaluation on them, all GPUs together."""

    def __init__(self) -> None:
        self._before, self._session = 0.0, Busy()

    def take(self, event: Mapping[str, Any]) -> None:
        if event["event"] == "search_started":
            self._before, self._session = self.now, Busy()
        self._session.take(event)

    @property
    def now(self) -> float:
        return self._before + self._session.gpu_s
