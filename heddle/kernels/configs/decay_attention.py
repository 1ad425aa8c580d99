"""Launch configurations of decay_attention: plain data, measured by tests/bench/gpu_check.py, never tuned at run time."""

from __future__ import annotations

from dataclasses import dataclass

from heddle.kernels.configs.launch import Launch


@dataclass(frozen=True, slots=True)
class Family:
    """What a device family runs: for two- and four-byte elements, and for states taller than `TALL`, which need room.

    `resident` programs share a multiprocessor. A sequence is cut into segments of at least `segment` tokens when there
    are fewer programs than places for them.
    """

    output: Launch
    state: Launch
    tall: Launch
    wide: Launch
    wide_tall: Launch
    resident: int = 2
    segment: int = 256

    def launch(self, kernel: str, element: int, rows: int) -> Launch:
        """The configuration of kernel "output" or "state" for an element size and a state of `rows` rows."""
        if element > 2:
            return self.wide_tall if rows > TALL else self.wide
        if rows > TALL:
            return self.tall
        return self.output if kernel == "output" else self.state


TALL = 128
HOPPER = Family(
    output=Launch(chunk=64, columns=64, warps=4, stages=2),
    state=Launch(chunk=64, columns=128, warps=8, stages=3),
    tall=Launch(chunk=64, columns=32, warps=4, stages=2),
    wide=Launch(chunk=16, columns=32, warps=8, stages=2),
    wide_tall=Launch(chunk=16, columns=32, warps=8, stages=1),
)
# Fits the 99 KiB of shared memory that every device since Ampere has.
OTHER = Family(
    output=Launch(chunk=32, columns=64, warps=4, stages=2),
    state=Launch(chunk=32, columns=64, warps=4, stages=2),
    tall=Launch(chunk=32, columns=32, warps=4, stages=1),
    wide=Launch(chunk=16, columns=32, warps=4, stages=2),
    wide_tall=Launch(chunk=16, columns=16, warps=4, stages=1),
)

# The interpreter pays by the operation, whatever the size of the tiles.
_LARGE = Launch(chunk=64, columns=32, warps=4, stages=1)
INTERPRETER = Family(output=_LARGE, state=_LARGE, tall=_LARGE, wide=_LARGE, wide_tall=_LARGE, resident=1)


def family(capability: tuple[int, int]) -> Family:
    """The configurations for a CUDA compute capability."""
    return HOPPER if capability[0] == 9 else OTHER
