"""Launch configurations of rms_norm: plain data, the best that an H200 timed (tests/bench/glue_check.py; norm_check.py for the
backward pass, whose programs each leave a sum that takes room). `columns`: numbers that a program holds, whole rows of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from heddle.kernels.configs.launch import Launch

# Programs that a GPU should have.
FEWEST = 512


@dataclass(frozen=True, slots=True)
class Family:
    """The launches of one device family; a program of the backward pass goes through `chunk` tiles of rows."""

    forward: Launch
    backward: Launch
    few: Launch

    def back(self, rows: int, size: int) -> Launch:
        """The launch of the gradients of so many rows of a size: `few` where there were too few programs otherwise, and for rows
        that fill a tile, which were not timed with few programs."""
        tile = self.backward.columns >> (size - 1).bit_length()
        return self.few if tile < 2 or rows < FEWEST * tile * self.backward.chunk else self.backward


HOPPER = Family(
    forward=Launch(chunk=1, columns=1024, warps=4, stages=1),
    backward=Launch(chunk=64, columns=1024, warps=4, stages=1),
    few=Launch(chunk=4, columns=1024, warps=4, stages=1),
)
OTHER = HOPPER
# The interpreter pays by the operation, whatever the size of the tiles.
_INTERPRETED = Launch(chunk=2, columns=4096, warps=4, stages=1)
INTERPRETER = Family(_INTERPRETED, _INTERPRETED, _INTERPRETED)


def family(capability: tuple[int, int]) -> Family:
    """The configurations for a CUDA compute capability."""
    return HOPPER if capability[0] == 9 else OTHER
