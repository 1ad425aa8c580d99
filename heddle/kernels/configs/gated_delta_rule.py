"""Launch configurations of gated_delta_rule and delta_rule: plain data, measured by tests/bench/gated_delta_check.py."""

from __future__ import annotations

from dataclasses import dataclass

from heddle.kernels.configs.launch import BySize, Launch


@dataclass(frozen=True, slots=True)
class Plan:
    """The launches of one kind of inputs; all share the chunk. `columns` are those of V (`solve` has none).

    `keep` is `forward` where a backward pass will want the states. `inverse`: how products of the triangular inverse are
    computed. `pairs`: where two kernels make the gradients, that of the first; `gradient` is that of the second, which takes
    `tile` channels of keys at a time. `narrow`: heads need not be LEAST_HEAD wide. `ahead`: where sequences are cut
    into segments, forward passes ask for the next chunk in the L2 cache
    """

    solve: Launch
    forward: Launch
    keep: Launch
    backward: Launch
    gradient: Launch
    inverse: str = "tf32x3"
    pairs: Launch | None = None
    tile: int = 64
    narrow: bool = False
    ahead: bool = False

    @property
    def chunk(self) -> int:
        return self.solve.chunk


# Channels of keys and of values that heads have at most which are narrow.
NARROW = (32, 64)


@dataclass(frozen=True)
class Family(BySize[Plan]):
    """As `BySize`, and what runs for two-byte elements and narrow heads."""

    half_narrow: Plan

    def of_heads(self, element: int, K: int, V: int) -> Plan:
        """The launches for elements of so many bytes and heads of these sizes."""
        is_narrow = element == 2 and NARROW[0] >= K and NARROW[1] >= V
        return self.half_narrow if is_narrow else self.plan(element, K)


# Of gradients by two kernels.
PAIRS = Launch(chunk=64, columns=64, warps=4, stages=1, registers=168)
TOKENS = Launch(chunk=64, columns=64, warps=4, stages=1, registers=168)
# Fewer than four warps know no products of a warpgroup, with which ptxas 12.8 gets narrow heads wrong:
# docs/decisions/0005-ragged-heads.md.
_NARROW = Plan(
    solve=Launch(chunk=32, columns=32, warps=2, stages=1),
    forward=Launch(chunk=32, columns=32, warps=2, stages=1),
    keep=Launch(chunk=32, columns=32, warps=2, stages=1),
    backward=Launch(chunk=32, columns=32, warps=2, stages=1),
    gradient=Launch(chunk=32, columns=32, warps=2, stages=1),
    inverse="fp16",
    narrow=True,
)

HOPPER = Family(
    half=Plan(
        # Four programs on a multiprocessor.
        solve=Launch(chunk=64, columns=64, warps=4, stages=1, registers=128),
        forward=Launch(chunk=64, columns=64, warps=4, stages=2),
        keep=Launch(chunk=64, columns=128, warps=8, stages=2),
        backward=Launch(chunk=64, columns=128, warps=8, stages=2),
        # Loops that follow each other: loading ahead in them is a race, docs/decisions/0008-loops-in-a-row.md.
        gradient=TOKENS,
        pairs=PAIRS,
        inverse="fp16",
        ahead=True,
    ),
    half_tall=Plan(
        solve=Launch(chunk=64, columns=64, warps=4, stages=1),
        forward=Launch(chunk=64, columns=64, warps=8, stages=1),
        keep=Launch(chunk=64, columns=64, warps=8, stages=1),
        backward=Launch(chunk=64, columns=64, warps=8, stages=1),
        gradient=Launch(chunk=64, columns=32, warps=8, stages=1),
        inverse="fp16",
    ),
    # With longer chunks ptxas spills thousands of bytes.
    wide=Plan(
        solve=Launch(chunk=16, columns=16, warps=4, stages=1),
        forward=Launch(chunk=16, columns=32, warps=8, stages=1),
        keep=Launch(chunk=16, columns=32, warps=8, stages=1),
        backward=Launch(chunk=16, columns=32, warps=8, stages=1),
        gradient=Launch(chunk=16, columns=32, warps=8, stages=1),
    ),
    wide_tall=Plan(
        solve=Launch(chunk=16, columns=16, warps=4, stages=1),
        forward=Launch(chunk=16, columns=16, warps=4, stages=1),
        keep=Launch(chunk=16, columns=16, warps=4, stages=1),
        backward=Launch(chunk=16, columns=16, warps=4, stages=1),
        gradient=Launch(chunk=16, columns=16, warps=8, stages=1),
    ),
    half_narrow=_NARROW,
)
# Fits the 99 KiB of shared memory that every device since Ampere has.
_SMALL = Plan(
    solve=Launch(chunk=32, columns=32, warps=4, stages=1),
    forward=Launch(chunk=32, columns=32, warps=4, stages=1),
    keep=Launch(chunk=32, columns=32, warps=4, stages=1),
    backward=Launch(chunk=32, columns=32, warps=4, stages=1),
    gradient=Launch(chunk=32, columns=32, warps=4, stages=1),
)
OTHER = Family(
    half=_SMALL,
    half_tall=HOPPER.wide_tall,
    wide=HOPPER.wide_tall,
    wide_tall=HOPPER.wide_tall,
    half_narrow=_SMALL,
)

# The interpreter pays by the operation, whatever the size of the tiles.
_LARGE = Launch(chunk=64, columns=256, warps=4, stages=1)
_INTERPRETED = Plan(solve=_LARGE, forward=_LARGE, keep=_LARGE, backward=_LARGE, gradient=_LARGE)
INTERPRETER = Family(
    half=_INTERPRETED,
    half_tall=_INTERPRETED,
    wide=_INTERPRETED,
    wide_tall=_INTERPRETED,
    half_narrow=_INTERPRETED,
)

# One token: the narrow choice spreads few heads over more multiprocessors.
STEP = Launch(chunk=1, columns=64, warps=4, stages=1)
STEP_FEW = Launch(chunk=1, columns=16, warps=1, stages=1)
STEP_MANY_HEADS = 1024


def family(capability: tuple[int, int]) -> Family:
    """The configurations for a CUDA compute capability."""
    return HOPPER if capability[0] == 9 else OTHER
