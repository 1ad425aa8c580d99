"""One launch configuration, and what a device family runs: what the tables of them hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

Plan = TypeVar("Plan")
# Heads above this size need room.
TALL = 128


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


@dataclass(frozen=True)
class BySize(Generic[Plan]):
    """What a device family runs: for two- and four-byte elements, and for heads larger than `TALL`."""

    half: Plan
    half_tall: Plan
    wide: Plan
    wide_tall: Plan

    def plan(self, element: int, size: int) -> Plan:
        """The launches for elements of so many bytes and the larger head size that counts."""
        if element > 2:
            return self.wide_tall if size > TALL else self.wide
        return self.half_tall if size > TALL else self.half
