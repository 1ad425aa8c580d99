"""Launch configurations of simple_gla: plain data, measured by tests/bench/simple_gla_check.py, never tuned at run time."""

from __future__ import annotations

from dataclasses import dataclass

from heddle.kernels.configs.launch import Launch

TALL = 128


@dataclass(frozen=True, slots=True)
class Family:
    """What a device family runs: for two- and four-byte elements, and for heads larger than `TALL`, which need room.

    All kernels of a call share their chunks, so the launches of one row do. A sequence is cut into segments of at least
    `segment` tokens when there are fewer programs than `forward_places` or `backward_places` a multiprocessor: forward as
    many as it holds, backward more, since a last round that is half empty costs less after several full ones. The roles of the
    backward pass of two-byte elements are launched apart where heads are from the first of `apart` to the last of it wide, and
    fill `apart_places` each then; a fourth launch treats segments with strong decays. `ahead`: in launches of two-byte elements
    and heads up to `TALL` a program asks for its next chunk in the L2 cache.
    """

    output: Launch
    backward: Launch
    state: Launch
    tall: Launch
    wide: Launch
    wide_tall: Launch
    forward_places: int = 2
    backward_places: int = 8
    apart_places: int = 2
    segment: int = 256
    apart: tuple[int, int] = (0, 0)
    ahead: bool = False

    def is_apart(self, element: int, K: int, V: int) -> bool:
        """Whether the roles of a backward pass are launched apart."""
        return element == 2 and self.apart[0] <= min(K, V) and max(K, V) <= self.apart[1]

    def launch(self, kernel: str, element: int, size: int) -> Launch:
        """The configuration of kernel "output", "backward" or "state" for an element size and the larger head size."""
        if element > 2:
            return self.wide_tall if size > TALL else self.wide
        if size > TALL:
            return self.tall
        return {"output": self.output, "backward": self.backward, "state": self.state}[kernel]


HOPPER = Family(
    output=Launch(chunk=64, columns=64, warps=4, stages=2),
    backward=Launch(chunk=64, columns=64, warps=4, stages=2),
    state=Launch(chunk=64, columns=128, warps=8, stages=3),
    tall=Launch(chunk=64, columns=32, warps=4, stages=2),
    wide=Launch(chunk=16, columns=32, warps=8, stages=2),
    wide_tall=Launch(chunk=16, columns=32, warps=8, stages=1),
    apart=(64, 128),
    ahead=True,
)
# Fits the 99 KiB of shared memory that every device since Ampere has.
OTHER = Family(
    output=Launch(chunk=32, columns=64, warps=4, stages=2),
    backward=Launch(chunk=32, columns=32, warps=4, stages=2),
    state=Launch(chunk=32, columns=64, warps=4, stages=2),
    tall=Launch(chunk=32, columns=32, warps=4, stages=1),
    wide=Launch(chunk=16, columns=32, warps=4, stages=2),
    wide_tall=Launch(chunk=16, columns=16, warps=4, stages=1),
)

# The interpreter pays by the operation, whatever the size of the tiles.
_LARGE = Launch(chunk=64, columns=64, warps=4, stages=1)
INTERPRETER = Family(
    output=_LARGE,
    backward=_LARGE,
    state=_LARGE,
    tall=_LARGE,
    wide=_LARGE,
    wide_tall=_LARGE,
    forward_places=1,
    backward_places=1,
)


def family(capability: tuple[int, int]) -> Family:
    """The configurations for a CUDA compute capability."""
    return HOPPER if capability[0] == 9 else OTHER
