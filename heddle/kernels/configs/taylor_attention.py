"""Launch configurations of taylor_attention: plain data, measured by tests/bench/taylor_check.py, never tuned at run time."""

from __future__ import annotations

from dataclasses import dataclass

from heddle.kernels.configs.launch import BySize, Launch


@dataclass(frozen=True, slots=True)
class Plan:
    """The launches of one call. `chunk`: queries of a tile (tokens of `state`);  `columns`: keys at a time (columns of `state`)

    Sequences are cut into segments of so many tokens: within one, each query meets each earlier key.
    """

    state: Launch
    forward: Launch
    queries: Launch
    keys: Launch
    segment: int


Family = BySize[Plan]


def _even(launch: Launch, segment: int) -> Plan:
    return Plan(launch, launch, launch, launch, segment)


_WIDE = _even(Launch(chunk=32, columns=32, warps=4, stages=1), 256)
_WIDE_TALL = _even(Launch(chunk=16, columns=16, warps=4, stages=1), 256)
HOPPER = Family(
    half=Plan(
        state=Launch(chunk=64, columns=64, warps=4, stages=2),
        forward=Launch(chunk=64, columns=64, warps=4, stages=2),
        # With eight warps one address has two layouts (decision 0005).
        queries=Launch(chunk=64, columns=64, warps=4, stages=2),
        keys=Launch(chunk=64, columns=64, warps=4, stages=2),
        segment=512,
    ),
    half_tall=_even(Launch(chunk=32, columns=32, warps=4, stages=1), 512),
    wide=_WIDE,
    wide_tall=_WIDE_TALL,
)
# Fits the 99 KiB of shared memory that every device since Ampere has.
_SMALL = _even(Launch(chunk=32, columns=32, warps=4, stages=1), 512)
OTHER = Family(half=_SMALL, half_tall=_SMALL, wide=_WIDE, wide_tall=_WIDE_TALL)

# The interpreter pays by the operation, whatever the size of the tiles.
_INTERPRETED = _even(Launch(chunk=32, columns=32, warps=4, stages=1), 64)
INTERPRETER = Family(half=_INTERPRETED, half_tall=_INTERPRETED, wide=_INTERPRETED, wide_tall=_INTERPRETED)


def family(capability: tuple[int, int]) -> Family:
    """The configurations for a CUDA compute capability."""
    return HOPPER if capability[0] == 9 else OTHER
