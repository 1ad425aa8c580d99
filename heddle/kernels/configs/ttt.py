"""Launch configurations of ttt with a linear memory: plain data, never tuned at run time. No GPU has timed them yet."""

from __future__ import annotations

from dataclasses import dataclass

from heddle.kernels.configs.launch import BySize, Launch


@dataclass(frozen=True, slots=True)
class Plan:
    """The launches of one kind of inputs; `chunk` is a block of tokens, `columns` are those of the weights.

    `keep` sweeps for what the backward pass wants, `backward` from the end; `step` is for calls of a few tokens
    """

    forward: Launch
    keep: Launch
    backward: Launch
    tokens: Launch
    step: Launch


Family = BySize[Plan]


def _even(launch: Launch) -> Plan:
    """One launch for all kernels."""
    return Plan(launch, launch, launch, launch, launch)


HOPPER = Family(
    # With wider tiles ptxas spills.
    half=Plan(
        forward=Launch(chunk=64, columns=32, warps=4, stages=2),
        keep=Launch(chunk=64, columns=32, warps=4, stages=2),
        backward=Launch(chunk=64, columns=32, warps=8, stages=2),
        tokens=Launch(chunk=64, columns=64, warps=4, stages=1),
        step=Launch(chunk=16, columns=16, warps=4, stages=1),
    ),
    half_tall=Plan(
        forward=Launch(chunk=64, columns=32, warps=8, stages=1),
        keep=Launch(chunk=64, columns=32, warps=8, stages=1),
        backward=Launch(chunk=64, columns=32, warps=8, stages=1),
        tokens=Launch(chunk=64, columns=64, warps=4, stages=1),
        step=Launch(chunk=16, columns=16, warps=8, stages=1),
    ),
    wide=_even(Launch(chunk=16, columns=32, warps=8, stages=1)),
    wide_tall=_even(Launch(chunk=16, columns=16, warps=8, stages=1)),
)
# Fits the 99 KiB of shared memory that every device since Ampere has.
_SMALL = _even(Launch(chunk=32, columns=32, warps=8, stages=1))
OTHER = Family(half=_SMALL, half_tall=HOPPER.wide_tall, wide=HOPPER.wide, wide_tall=HOPPER.wide_tall)

# The interpreter pays by the operation, whatever the size of the tiles.
_INTERPRETED = _even(Launch(chunk=64, columns=256, warps=4, stages=1))
INTERPRETER = Family(half=_INTERPRETED, half_tall=_INTERPRETED, wide=_INTERPRETED, wide_tall=_INTERPRETED)


def family(capability: tuple[int, int]) -> Family:
    """The configurations for a CUDA compute capability."""
    return HOPPER if capability[0] == 9 else OTHER
