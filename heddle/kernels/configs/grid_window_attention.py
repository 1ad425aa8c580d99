"""Launch configurations of grid_window_attention: plain data. On Hopper `forward` of `half` is the best of five that
tests/bench/grid_check.py measured on an H200; the others are first guesses, begun from those of span_attention."""

from __future__ import annotations

from dataclasses import dataclass

from heddle.kernels.configs.launch import BySize, Launch


@dataclass(frozen=True, slots=True)
class Plan:
    """The launches of one call. `chunk`: queries of a box;  `columns`: keys of a box

    `keys` holds `columns` keys and walks over boxes of `chunk` queries.
    """

    forward: Launch
    queries: Launch
    keys: Launch


Family = BySize[Plan]


def _even(launch: Launch) -> Plan:
    return Plan(launch, launch, launch)


_WIDE = Plan(
    forward=Launch(chunk=32, columns=32, warps=8, stages=1),
    queries=Launch(chunk=32, columns=32, warps=8, stages=1),
    # With 32 queries it spills.
    keys=Launch(chunk=16, columns=32, warps=8, stages=1),
)
_WIDE_TALL = _even(Launch(chunk=16, columns=16, warps=8, stages=1))
HOPPER = Family(
    half=Plan(
        forward=Launch(chunk=64, columns=64, warps=4, stages=3),
        queries=Launch(chunk=64, columns=64, warps=4, stages=2),
        keys=Launch(chunk=32, columns=64, warps=4, stages=2),
    ),
    half_tall=Plan(
        forward=Launch(chunk=64, columns=64, warps=8, stages=1),
        queries=Launch(chunk=32, columns=64, warps=8, stages=1),
        keys=Launch(chunk=32, columns=32, warps=8, stages=1),
    ),
    wide=_WIDE,
    wide_tall=_WIDE_TALL,
)
# Fits the 99 KiB of shared memory that every device since Ampere has.
_SMALL = _even(Launch(chunk=32, columns=32, warps=4, stages=2))
OTHER = Family(half=_SMALL, half_tall=_WIDE, wide=_WIDE, wide_tall=_WIDE_TALL)

# The interpreter pays by the operation, whatever the size of the boxes.
_INTERPRETED = _even(Launch(chunk=32, columns=32, warps=4, stages=1))
INTERPRETER = Family(half=_INTERPRETED, half_tall=_INTERPRETED, wide=_INTERPRETED, wide_tall=_INTERPRETED)


def family(capability: tuple[int, int]) -> Family:
    """The configurations for a CUDA compute capability."""
    return HOPPER if capability[0] == 9 else OTHER
