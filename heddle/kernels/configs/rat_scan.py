"""Launch configurations of rat_scan: plain data, chosen without a GPU so far (tests/bench/rat_check.py tries others)."""

from __future__ import annotations

from dataclasses import dataclass

from heddle.kernels.configs.launch import Launch


@dataclass(frozen=True, slots=True)
class Family:
    """The launches of one device family. `columns`: channels that a program holds, those of some chunks of a head

    `chunk` of `backward`: places of a chunk whose gates stay in registers, a power of two; the forward pass keeps the state
    before each so many.
    """

    forward: Launch
    backward: Launch


HOPPER = Family(
    forward=Launch(chunk=16, columns=1024, warps=4, stages=1),
    # Three numbers of a place and channel in registers: more than two channels a thread would spill.
    backward=Launch(chunk=16, columns=256, warps=4, stages=1),
)
OTHER = HOPPER
# The interpreter pays by the operation, whatever the size of the tiles.
INTERPRETER = Family(
    forward=Launch(chunk=4, columns=4096, warps=4, stages=1),
    backward=Launch(chunk=4, columns=4096, warps=4, stages=1),
)


def family(capability: tuple[int, int]) -> Family:
    """The configurations for a CUDA compute capability."""
    return HOPPER if capability[0] == 9 else OTHER
