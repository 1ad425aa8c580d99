"""Launch configurations of causal_conv1d: plain data. `chunk`: tokens of a tile; `columns`: channels."""

from __future__ import annotations

from dataclasses import dataclass

from heddle.kernels.configs.launch import Launch


@dataclass(frozen=True, slots=True)
class Family:
    """The launches of one device family; a program walks over `steps` tiles, or over fewer so that there are `programs`."""

    forward: Launch
    backward: Launch
    steps: int
    programs: int


HOPPER = Family(
    forward=Launch(chunk=8, columns=512, warps=4, stages=1),
    backward=Launch(chunk=8, columns=512, warps=4, stages=1),
    steps=32,
    # Eight for each multiprocessor.
    programs=1056,
)
OTHER = HOPPER
# The interpreter pays by the operation, whatever the columns.
INTERPRETER = Family(
    Launch(chunk=8, columns=1024, warps=4, stages=1), Launch(chunk=8, columns=1024, warps=4, stages=1), 4, 1
)


def family(capability: tuple[int, int]) -> Family:
    """The configurations for a CUDA compute capability."""
    return HOPPER if capability[0] == 9 else OTHER
