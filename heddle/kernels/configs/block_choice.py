"""Launch configurations of block_choice: plain data. Guesses: no GPU has timed them yet."""

from __future__ import annotations

from dataclasses import dataclass

from heddle.kernels.configs.launch import BySize, Launch


@dataclass(frozen=True, slots=True)
class Plan:
    """The launches of one call. `columns`: means (of `pool`, blocks) that a program treats at a time. Its rows are the heads of
    a group; those of `share`, which many queries take, are `chunk` queries times heads."""

    mean: Launch
    logit: Launch
    pool: Launch
    share: Launch


Family = BySize[Plan]
_POOL = Launch(chunk=1, columns=64, warps=4, stages=1)


def _of(columns: int, warps: int, stages: int = 1) -> Plan:
    launch = Launch(chunk=1, columns=columns, warps=warps, stages=1)
    return Plan(launch, launch, _POOL, Launch(chunk=64, columns=columns, warps=warps, stages=stages))


HOPPER = Family(half=_of(64, 4, 2), half_tall=_of(64, 4), wide=_of(32, 4), wide_tall=_of(32, 8))
# The interpreter pays by the operation, whatever the size of the tiles.
INTERPRETER = Family(half=_of(64, 4), half_tall=_of(64, 4), wide=_of(64, 4), wide_tall=_of(64, 4))


def family(capability: tuple[int, int]) -> Family:  # noqa: ARG001
    """The configurations for a CUDA compute capability: the same for all."""
    return HOPPER
