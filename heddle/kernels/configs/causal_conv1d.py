"""Launch configurations of causal_conv1d: plain data. `chunk`: tokens of a tile; `columns`: channels."""

from __future__ import annotations

from dataclasses import dataclass

from heddle.kernels.configs.launch import Launch


@dataclass(frozen=True, slots=True)
class Family:
    """The launches of one device family; a program of the backward pass walks over `steps` tiles."""

    forward: Launch
    backward: Launch
    steps: int


HOPPER = Family(
    forward=Launch(chunk=32, columns=128, warps=4, stages=1),
    # Seven rows of each token in registers.
    backward=Launch(chunk=16, columns=128, warps=4, stages=1),
    steps=16,
)
OTHER = HOPPER
# The interpreter pays by the operation, whatever the size of the tiles.
INTERPRETER = Family(
    Launch(chunk=64, columns=64, warps=4, stages=1), Launch(chunk=64, columns=64, warps=4, stages=1), 2
)


def family(capability: tuple[int, int]) -> Family:
    """The configurations for a CUDA compute capability."""
    return HOPPER if capability[0] == 9 else OTHER
