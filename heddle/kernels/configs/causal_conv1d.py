"""Launch configurations of causal_conv1d: plain data. `chunk`: tokens of a tile; `columns`: channels."""

from __future__ import annotations

from dataclasses import dataclass

from heddle.kernels.configs.launch import Launch


@dataclass(frozen=True, slots=True)
class Family:
    """The launches of one device family: forward, and the two kernels of the backward pass, of which a program of the first walks
    over `steps` tiles."""

    forward: Launch
    sums: Launch
    turned: Launch
    steps: int


HOPPER = Family(
    forward=Launch(chunk=32, columns=128, warps=4, stages=1),
    # Four sums and as many rows of each place in registers.
    sums=Launch(chunk=16, columns=128, warps=4, stages=1),
    turned=Launch(chunk=32, columns=128, warps=4, stages=1),
    steps=16,
)
OTHER = HOPPER
# The interpreter pays by the operation, whatever the size of the tiles.
_INTERPRETED = Launch(chunk=64, columns=64, warps=4, stages=1)
INTERPRETER = Family(_INTERPRETED, _INTERPRETED, _INTERPRETED, 2)


def family(capability: tuple[int, int]) -> Family:
    """The configurations for a CUDA compute capability."""
    return HOPPER if capability[0] == 9 else OTHER
