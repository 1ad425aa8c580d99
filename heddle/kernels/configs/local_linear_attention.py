"""Launch configurations of local_linear_attention: plain data, never tuned at run time; some were timed on an H200
(tests/bench/lla_check.py)."""

from __future__ import annotations

from dataclasses import dataclass

from heddle.kernels.configs.launch import BySize, Launch


@dataclass(frozen=True, slots=True)
class Plan:
    """The launches of one kind of inputs. `chunk`: queries of a tile, `columns`: keys of one

    `right` begins the adjoint solve, `queries` and `keys` are the gradients of theirs.
    """

    mean: Launch
    solve: Launch
    output: Launch
    right: Launch
    queries: Launch
    keys: Launch


Family = BySize[Plan]


def _even(launch: Launch) -> Plan:
    """One launch for all kernels."""
    return Plan(launch, launch, launch, launch, launch, launch)


HOPPER = Family(
    # 64 rows of products for each four warps: with fewer, two groups of warps do the same loads. With larger tiles ptxas spills.
    half=Plan(
        mean=Launch(chunk=64, columns=64, warps=4, stages=2),
        solve=Launch(chunk=64, columns=32, warps=4, stages=2),
        output=Launch(chunk=64, columns=64, warps=4, stages=2),
        right=Launch(chunk=64, columns=64, warps=4, stages=2),
        queries=Launch(chunk=128, columns=32, warps=8, stages=2),
        keys=Launch(chunk=32, columns=128, warps=8, stages=2),
    ),
    half_tall=_even(Launch(chunk=64, columns=32, warps=8, stages=1)),
    wide=_even(Launch(chunk=16, columns=16, warps=8, stages=1)),
    wide_tall=_even(Launch(chunk=16, columns=16, warps=8, stages=1)),
)
# Fits the 99 KiB of shared memory that every device since Ampere has.
_SMALL = _even(Launch(chunk=32, columns=32, warps=8, stages=1))
OTHER = Family(half=_SMALL, half_tall=HOPPER.wide_tall, wide=HOPPER.wide_tall, wide_tall=HOPPER.wide_tall)

# The interpreter pays by the operation, whatever the size of the tiles.
_INTERPRETED = _even(Launch(chunk=64, columns=64, warps=4, stages=1))
INTERPRETER = Family(half=_INTERPRETED, half_tall=_INTERPRETED, wide=_INTERPRETED, wide_tall=_INTERPRETED)


def family(capability: tuple[int, int]) -> Family:
    """The configurations for a CUDA compute capability."""
    return HOPPER if capability[0] == 9 else OTHER
