"""Launch configurations of rat_scan: plain data, chosen without a GPU so far (tests/bench/rat_check.py tries others)."""

from __future__ import annotations

from dataclasses import dataclass

from heddle.kernels.configs.launch import Launch

# Places of a chunk whose gates stay in registers on the way back; the forward pass keeps the state before each so many.
PART = 8


@dataclass(frozen=True, slots=True)
class Family:
    """The launches of one device family. `columns`: channels that a program holds, those of some chunks of a head"""

    forward: Launch
    backward: Launch


HOPPER = Family(
    forward=Launch(chunk=PART, columns=1024, warps=4, stages=1),
    # Four numbers of each place and channel in registers: more than two channels a thread would spill.
    backward=Launch(chunk=PART, columns=256, warps=4, stages=1),
)
OTHER = HOPPER
# The interpreter pays by the operation, whatever the size of the tiles.
_INTERPRETED = Launch(chunk=PART, columns=4096, warps=4, stages=1)
INTERPRETER = Family(_INTERPRETED, _INTERPRETED)


def family(capability: tuple[int, int]) -> Family:
    """The configurations for a CUDA compute capability."""
    return HOPPER if capability[0] == 9 else OTHER
