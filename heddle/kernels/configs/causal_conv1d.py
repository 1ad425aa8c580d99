"""Launch configurations of causal_conv1d: plain data. `chunk`: tokens that are loaded at once; `columns`: channels."""

from __future__ import annotations

from dataclasses import dataclass

from heddle.kernels.configs.launch import Launch


@dataclass(frozen=True, slots=True)
class Family:
    """The launches of one device family; a program walks over `tokens`, or over fewer so that there are `programs`."""

    forward: Launch
    backward: Launch
    tokens: int
    programs: int


HOPPER = Family(
    forward=Launch(chunk=8, columns=512, warps=4, stages=1),
    backward=Launch(chunk=4, columns=512, warps=4, stages=1),
    tokens=256,
    # Eight for each multiprocessor.
    programs=1056,
)
OTHER = HOPPER
# The interpreter pays by the operation, whatever the columns.
INTERPRETER = Family(
    Launch(chunk=8, columns=1024, warps=4, stages=1), Launch(chunk=8, columns=1024, warps=4, stages=1), 32, 1
)


def family(capability: tuple[int, int]) -> Family:
    """The configurations for a CUDA compute capability."""
    return HOPPER if capability[0] == 9 else OTHER
