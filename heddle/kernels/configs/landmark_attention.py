"""Launch configurations of landmark_attention: plain data; `half` on Hopper is the best of those that
tests/bench/landmark_check.py measured on an H200."""

from __future__ import annotations

from dataclasses import dataclass, replace

from heddle.kernels.configs.launch import BySize, Launch

# Two blocks of heads of 128 in half precision are on their way, and three programs fit beside each other.
_READ = Launch(chunk=1, columns=1, warps=4, stages=3)


# So many queries are a step: each reads its blocks by itself.
STEP_QUERIES = 8


@dataclass(frozen=True, slots=True)
class Plan:
    """The launches of one call. `chunk`: queries of a tile, times the heads of a group in `score`;  `columns`: landmarks that
    `score` treats at a time. The others take a block as a whole, and `step` one query.  `products`: how gradients multiply
    float32;  `fused`: whether a step is two launches, `score` and `read`, in place of `score`, `step` and a merge;
    `listed`: whether one between them chooses;  `ahead`: whether each of them is begun before the one before has ended
    """

    forward: Launch
    queries: Launch
    keys: Launch
    score: Launch
    step: Launch
    products: str = "tf32x3"
    read: Launch = _READ
    fused: bool = False
    listed: bool = False
    ahead: bool = False


@dataclass(frozen=True, slots=True)
class Spread:
    """The blocks of a step's query are split where there are fewer programs than `places` a multiprocessor, and so that no
    program reads more than `share` of them."""

    places: int
    share: int


@dataclass(frozen=True)
class Family(BySize[Plan]):
    """`fused_spread`: that of fused steps."""

    spread: Spread = Spread(places=4, share=33)
    fused_spread: Spread = Spread(places=3, share=33)


_SCORE = Launch(chunk=64, columns=64, warps=4, stages=1)
_STEP = Launch(chunk=1, columns=1, warps=4, stages=1, registers=128)
_STEP_TALL = Launch(chunk=1, columns=1, warps=8, stages=1)


def _even(chunk: int, stages: int) -> Plan:
    launch = Launch(chunk=chunk, columns=1, warps=4, stages=stages)
    return Plan(launch, launch, launch, Launch(chunk=32, columns=32, warps=4, stages=1), _STEP_TALL)


_WIDE = _even(32, 1)
# A block of such heads and what tensor cores want of it do not fit into shared memory together.
_TALL = Launch(chunk=16, columns=1, warps=8, stages=1)
_WIDE_TALL = replace(_even(16, 1), queries=_TALL, keys=_TALL, products="ieee")
HOPPER = Family(
    half=Plan(
        # Three stages were faster, but held to the reference in one form alone.
        forward=Launch(chunk=128, columns=1, warps=8, stages=2),
        queries=Launch(chunk=64, columns=1, warps=4, stages=2),
        keys=Launch(chunk=32, columns=1, warps=4, stages=2),
        score=_SCORE,
        step=_STEP,
        fused=True,
    ),
    half_tall=Plan(
        forward=Launch(chunk=64, columns=1, warps=8, stages=2),
        queries=Launch(chunk=64, columns=1, warps=8, stages=1),
        keys=Launch(chunk=64, columns=1, warps=8, stages=1),
        score=_SCORE,
        step=_STEP_TALL,
    ),
    # With four warps ptxas 12.8 gives heads of 128 no more than 32 registers, and spills 18 KB.
    wide=replace(_WIDE, queries=Launch(chunk=32, columns=1, warps=8, stages=1)),
    wide_tall=_WIDE_TALL,
)
# `half` fits the 99 KiB of shared memory that every device since Ampere has; before Hopper nothing else is asked for.
OTHER = Family(half=_even(32, 2), half_tall=_WIDE, wide=_WIDE, wide_tall=_WIDE_TALL)

# The interpreter pays by the operation, whatever the size of the tiles.
_INTERPRETED = _even(32, 1)
INTERPRETER = Family(half=_INTERPRETED, half_tall=_INTERPRETED, wide=_INTERPRETED, wide_tall=_INTERPRETED)


def family(capability: tuple[int, int]) -> Family:
    """The configurations for a CUDA compute capability."""
    return HOPPER if capability[0] == 9 else OTHER
