"""What a search tells while it runs: the protocol a terminal or a dashboard implements to show it live."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from heddle.search.record import Run, Trial


@dataclass(frozen=True, slots=True)
class Status:
    """Where the search stands now; `seconds_left`, to the end of its trials or of its time, is None while neither is known."""

    phase: str
    done: int
    running: int
    failed: int
    infeasible: int
    total: int
    best: Trial | None
    elapsed_s: float
    seconds_left: float | None
    # Left at a rung.
    pruned: int = 0


class Progress(Protocol):
    """Callbacks of a search, all called from the driver's thread and in order. Each must return quickly."""

    def started(self, run: Run, total: int) -> None:
        """The run folder is open; `total` trials will have been told at the end."""

    def phase(self, name: str, detail: str) -> None:
        """A phase begins: "start", "ask", "timing", "training", "confirm", "longer", "remeasure", "export",
        "finish"."""

    def trial_started(self, trial: Trial) -> None:
        """A spec was asked for; its layers and parameters are known, nothing is measured."""

    def trial_finished(self, trial: Trial) -> None:
        """A trial was told: complete, pruned, infeasible or failed (then with its reason). `status` has counted it before."""

    def status(self, status: Status) -> None:
        """The figures changed, also inside a phase."""

    def message(self, text: str, level: str = "info") -> None:
        """One line for the user; level is "info" or "warning"."""

    def finished(self, run: Run) -> None:
        """All is written; `run` is what `read_run` gives."""


class Silent:
    """A progress that shows nothing."""

    def started(self, run: Run, total: int) -> None:
        pass

    def phase(self, name: str, detail: str) -> None:
        pass

    def trial_started(self, trial: Trial) -> None:
        pass

    def trial_finished(self, trial: Trial) -> None:
        pass

    def status(self, status: Status) -> None:
        pass

    def message(self, text: str, level: str = "info") -> None:
        pass

    def finished(self, run: Run) -> None:
        pass
