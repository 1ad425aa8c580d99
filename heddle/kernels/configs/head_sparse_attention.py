"""Launch configurations of head_sparse_attention: plain data. Those of 16-bit heads of up to 128 are the fastest of
tests/bench/head_sparse_check.py on an H200."""

from __future__ import annotations

from dataclasses import dataclass

from heddle.kernels.configs.launch import BySize, Launch


@dataclass(frozen=True, slots=True)
class Plan:
    """The launches of one call. `chunk`: queries of a tile (of `step` times heads of a group);  `columns`: keys at a time

    `keys` holds `columns` keys and walks over tiles of `chunk` queries.
    """

    forward: Launch
    step: Launch
    queries: Launch
    keys: Launch


@dataclass(frozen=True)
class Family(BySize[Plan]):
    """The keys of a tile are split where there are fewer programs than `places` a multiprocessor.

    `descriptors`: 1 where tiles that are walked over are loaded by tensor descriptors, 0 where by pointers
    `sums`: 1 where log-sum-exp and δ of queries are loaded by descriptors for the gradients of keys, 0 where by pointers
    `apart`: 1 where keys that need a mask have a loop of their own in the forward kernel
    """

    places: int = 2
    descriptors: int = 0
    sums: int = 0
    apart: int = 0


def _even(launch: Launch) -> Plan:
    return Plan(launch, launch, launch, launch)


_WIDE = _even(Launch(chunk=32, columns=32, warps=4, stages=1))
_WIDE_TALL = _even(Launch(chunk=16, columns=16, warps=4, stages=1))
HOPPER = Family(
    half=Plan(
        forward=Launch(chunk=128, columns=128, warps=8, stages=3),
        step=Launch(chunk=16, columns=64, warps=4, stages=2),
        queries=Launch(chunk=128, columns=64, warps=8, stages=3),
        keys=Launch(chunk=64, columns=64, warps=4, stages=2),
    ),
    half_tall=Plan(
        forward=Launch(chunk=64, columns=64, warps=8, stages=2),
        step=Launch(chunk=16, columns=64, warps=4, stages=2),
        queries=Launch(chunk=64, columns=64, warps=8, stages=1),
        keys=Launch(chunk=64, columns=64, warps=8, stages=1),
    ),
    wide=_WIDE,
    wide_tall=_WIDE_TALL,
    descriptors=1,
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
