"""Launch configurations of dynamic_conv: plain data, guessed; an H200 timed these alone (tests/bench/run.py).

`columns`: numbers that a program holds, the channels of a head for as many tokens as fit; `chunk`: tiles of tokens that a program
goes through for each tap, which are as many fewer partial sums of the gradient of taps that all tokens share.
"""

from __future__ import annotations

from dataclasses import dataclass

from heddle.kernels.configs.launch import Launch


@dataclass(frozen=True, slots=True)
class Family:
    """The launches of one device family: of outputs, of the gradient of x, and of those of taps."""

    forward: Launch
    inputs: Launch
    taps: Launch


# More threads than channels in heads up to 128: then each thread reads the taps that it needs, none through shared memory.
_LAUNCH = Launch(chunk=1, columns=4096, warps=8, stages=1)
HOPPER = Family(forward=_LAUNCH, inputs=_LAUNCH, taps=Launch(chunk=8, columns=2048, warps=4, stages=1))
OTHER = HOPPER
# The interpreter pays by the operation, whatever the size of the tiles.
_INTERPRETED = Launch(chunk=2, columns=4096, warps=8, stages=1)
INTERPRETER = Family(_INTERPRETED, _INTERPRETED, _INTERPRETED)


def family(capability: tuple[int, int]) -> Family:
    """The configurations for a CUDA compute capability."""
    return HOPPER if capability[0] == 9 else OTHER
