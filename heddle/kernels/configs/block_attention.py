"""Launch configurations of block_attention: plain data; `half` on Hopper is the best of those that
tests/bench/block_attention_check.py measured on an H200."""

from __future__ import annotations

from dataclasses import dataclass, replace

from heddle.kernels.configs.launch import BySize, Launch

# Heads whose tiles fit in the registers of fewer warps.
NARROW = 64


@dataclass(frozen=True, slots=True)
class Plan:
    """The launches of one call. `chunk`: rows of a tile, queries times the heads of a group;  `columns`: keys at a time

    The kernels of gradients walk over the same tiles, so their `chunk` is one. `gated` is `forward` where gates say what is read,
    and `gated_queries` and `gated_keys` are `queries` and `keys`.
    `gate_descriptors`: 1 where blocks with a gate are loaded by tensor descriptors, 0 where by pointers
    """

    forward: Launch
    gated: Launch
    queries: Launch
    keys: Launch
    gated_queries: Launch
    gated_keys: Launch
    gate_descriptors: int = 0


@dataclass(frozen=True)
class Family(BySize[Plan]):
    """A list is split where there are fewer programs than `places` a multiprocessor. `half_narrow`: heads up to `NARROW`."""

    places: int = 2
    half_narrow: Plan | None = None

    def plan(self, element: int, size: int) -> Plan:
        """As `BySize.plan`."""
        if self.half_narrow is not None and element == 2 and size <= NARROW:
            return self.half_narrow
        return super().plan(element, size)


def _even(launch: Launch) -> Plan:
    return Plan(launch, launch, launch, launch, launch, launch)


_WIDE = _even(Launch(chunk=32, columns=32, warps=4, stages=1))
_WIDE_TALL = _even(Launch(chunk=16, columns=16, warps=4, stages=1))
_HALF = Plan(
    forward=Launch(chunk=64, columns=64, warps=4, stages=3),
    # Tiles of 64 are 4 % faster and hold lists for twice as many tiles, 0.25 GB at 1 x 131,072.
    gated=Launch(chunk=128, columns=64, warps=4, stages=3),
    queries=Launch(chunk=64, columns=64, warps=4, stages=2),
    keys=Launch(chunk=64, columns=64, warps=8, stages=3),
    gated_queries=Launch(chunk=64, columns=64, warps=4, stages=2),
    gated_keys=Launch(chunk=64, columns=64, warps=8, stages=3),
    gate_descriptors=1,
)
HOPPER = Family(
    half=_HALF,
    half_narrow=replace(
        _HALF,
        # Tiles of 128 are 2 % faster, and spill.
        gated_queries=Launch(chunk=64, columns=64, warps=4, stages=3),
        gated_keys=Launch(chunk=64, columns=64, warps=4, stages=2),
    ),
    half_tall=Plan(
        forward=Launch(chunk=64, columns=64, warps=8, stages=2),
        gated=Launch(chunk=64, columns=64, warps=8, stages=2),
        queries=Launch(chunk=64, columns=64, warps=8, stages=1),
        keys=Launch(chunk=64, columns=64, warps=8, stages=1),
        gated_queries=Launch(chunk=64, columns=64, warps=8, stages=1),
        gated_keys=Launch(chunk=64, columns=64, warps=8, stages=1),
    ),
    wide=_WIDE,
    wide_tall=_WIDE_TALL,
)
# Fits the 99 KiB of shared memory that every device since Ampere has.
_SMALL = _even(Launch(chunk=32, columns=32, warps=4, stages=2))
OTHER = Family(half=_SMALL, half_tall=_WIDE, wide=_WIDE, wide_tall=_WIDE_TALL)

# The interpreter pays by the operation, whatever the size of the tiles.
_INTERPRETED = _even(Launch(chunk=64, columns=64, warps=4, stages=1))
INTERPRETER = Family(half=_INTERPRETED, half_tall=_INTERPRETED, wide=_INTERPRETED, wide_tall=_INTERPRETED)


def family(capability: tuple[int, int]) -> Family:
    """The configurations for a CUDA compute capability."""
    return HOPPER if capability[0] == 9 else OTHER
