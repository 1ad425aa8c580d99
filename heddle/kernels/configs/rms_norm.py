"""Launch configurations of rms_norm: plain data, the best that an H200 timed (tests/bench/glue_check.py, and norm_check.py for the
backward pass, whose programs are as few as hold less than is gained). `columns`: numbers that a program holds, whole rows of them."""

from __future__ import annotations

from dataclasses import dataclass

from heddle.kernels.configs.launch import Launch


@dataclass(frozen=True, slots=True)
class Family:
    """The launches of one device family; a program of the backward pass goes through `chunk` tiles of rows."""

    forward: Launch
    backward: Launch


HOPPER = Family(
    forward=Launch(chunk=1, columns=1024, warps=4, stages=1),
    backward=Launch(chunk=64, columns=1024, warps=4, stages=1),
)
OTHER = HOPPER
# The interpreter pays by the operation, whatever the size of the tiles.
_INTERPRETED = Launch(chunk=2, columns=4096, warps=4, stages=1)
INTERPRETER = Family(_INTERPRETED, _INTERPRETED)


def family(capability: tuple[int, int]) -> Family:
    """The configurations for a CUDA compute capability."""
    return HOPPER if capability[0] == 9 else OTHER
