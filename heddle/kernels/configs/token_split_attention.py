"""Launch configurations of token_split_attention: plain data, first guesses all, which an H200 has run (tests/bench/run.py)."""

from __future__ import annotations

from dataclasses import dataclass

from heddle.kernels.configs.launch import BySize, Launch


@dataclass(frozen=True, slots=True)
class Plan:
    """The launches of one call. `chunk`: queries of a tile;  `columns`: keys at a time

    `near` and `far` hold `columns` keys and walk over tiles of `chunk` queries: those that stand near, and those that stay.
    """

    forward: Launch
    queries: Launch
    near: Launch
    far: Launch


Family = BySize[Plan]


def _even(launch: Launch) -> Plan:
    return Plan(launch, launch, launch, launch)


_WIDE = _even(Launch(chunk=32, columns=32, warps=8, stages=1))
_WIDE_TALL = _even(Launch(chunk=16, columns=16, warps=8, stages=1))
HOPPER = Family(
    half=Plan(
        forward=Launch(chunk=64, columns=64, warps=4, stages=2),
        queries=Launch(chunk=64, columns=64, warps=8, stages=2),
        near=Launch(chunk=64, columns=64, warps=8, stages=2),
        # All later queries read a key that stays: of smaller tiles more programs share them.
        far=Launch(chunk=64, columns=32, warps=8, stages=2),
    ),
    half_tall=_even(Launch(chunk=32, columns=32, warps=8, stages=1)),
    wide=_WIDE,
    wide_tall=_WIDE_TALL,
)
# Fits the 99 KiB of shared memory that every device since Ampere has.
_SMALL = _even(Launch(chunk=32, columns=32, warps=4, stages=2))
OTHER = Family(half=_SMALL, half_tall=_WIDE, wide=_WIDE, wide_tall=_WIDE_TALL)

# The interpreter pays by the operation, whatever the size of the tiles.
_INTERPRETED = _even(Launch(chunk=32, columns=32, warps=4, stages=1))
INTERPRETER = Family(half=_INTERPRETED, half_tall=_INTERPRETED, wide=_INTERPRETED, wide_tall=_INTERPRETED)


def family(capability: tuple[int, int]) -> Family:
    """The configurations for a CUDA compute capability."""
    return HOPPER if capability[0] == 9 else OTHER
