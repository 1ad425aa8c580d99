"""One launch configuration: what every table of them holds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Launch:
    """Tokens a program treats at a time, columns of the state it holds, warps, stages of the software pipeline, and at
    most how many registers a thread gets (None: as many as it likes)."""

    chunk: int
    columns: int
    warps: int
    stages: int
    registers: int | None = None

    def options(self) -> dict[str, int]:
        """What Triton is told at a launch."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages, **limit}
