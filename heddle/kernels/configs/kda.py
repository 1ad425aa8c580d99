"""Launch configurations of kda: plain data, never tuned at run time. `half` on Hopper is the best of those that an H200 timed
(tests/bench/kda_check.py), the others are those of the kernels of gla and gated_delta_rule that they resemble."""

from __future__ import annotations

from dataclasses import dataclass

from heddle.kernels.configs.launch import BySize, Launch


@dataclass(frozen=True, slots=True)
class Plan:
    """The launches of one kind of inputs; all share the chunk. `columns` are those of V (`prepare` has none).

    `keep` sweeps for what the backward pass wants, `backward` from the end. `inverse`: how products of the triangular
    inverse are computed. `pairs`: where two kernels make the gradients, that of the first; `gradient` is that of the second
    """

    prepare: Launch
    forward: Launch
    keep: Launch
    backward: Launch
    gradient: Launch
    inverse: str = "tf32x3"
    pairs: Launch | None = None

    @property
    def chunk(self) -> int:
        return self.prepare.chunk


Family = BySize[Plan]


def _even(launch: Launch, *, inverse: str = "tf32x3", **others: Launch) -> Plan:
    """One launch for all kernels but some."""
    names = ("prepare", "forward", "keep", "backward", "gradient")
    return Plan(**{name: others.get(name, launch) for name in names}, inverse=inverse)


_NARROW = Launch(chunk=16, columns=16, warps=4, stages=1)
HOPPER = Family(
    half=Plan(
        prepare=Launch(chunk=64, columns=64, warps=4, stages=1),
        forward=Launch(chunk=64, columns=128, warps=8, stages=2),
        keep=Launch(chunk=64, columns=64, warps=4, stages=1),
        backward=Launch(chunk=64, columns=128, warps=8, stages=2),
        # Its loops follow each other; loading ahead in them is a race: docs/decisions/0008-loops-in-a-row.md.
        gradient=Launch(chunk=64, columns=64, warps=8, stages=1),
        pairs=Launch(chunk=64, columns=64, warps=4, stages=1),
        inverse="fp16",
    ),
    # With narrower tiles of a tall state ptxas spills thousands of bytes.
    half_tall=_even(Launch(chunk=64, columns=64, warps=8, stages=1), inverse="fp16"),
    # With longer chunks ptxas spills thousands of bytes.
    wide=_even(Launch(chunk=16, columns=32, warps=8, stages=1)),
    wide_tall=_even(_NARROW, gradient=Launch(chunk=16, columns=16, warps=8, stages=1)),
)
# Fits the 99 KiB of shared memory that every device since Ampere has.
_SMALL = _even(Launch(chunk=32, columns=32, warps=4, stages=1))
OTHER = Family(half=_SMALL, half_tall=HOPPER.wide_tall, wide=HOPPER.wide_tall, wide_tall=HOPPER.wide_tall)

# The interpreter pays by the operation, whatever the size of the tiles.
_INTERPRETED = _even(Launch(chunk=64, columns=256, warps=4, stages=1))
INTERPRETER = Family(half=_INTERPRETED, half_tall=_INTERPRETED, wide=_INTERPRETED, wide_tall=_INTERPRETED)


def family(capability: tuple[int, int]) -> Family:
    """The configurations for a CUDA compute capability."""
    return HOPPER if capability[0] == 9 else OTHER
