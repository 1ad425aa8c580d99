"""Which stacks to measure: random ones of the space, chosen so that every term and every meeting of two is seen.

From a pool of random stacks the next is always the one that tells most about the terms beyond those chosen before it: the
greatest xᵀ A⁻¹ x, where A sums x xᵀ over them. That is the greedy way to a large determinant (D-optimal design). Position
counts only in the choice, by thirds of a stack, so that a layer is met early, midway and late.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heddle.compose.plan import plan
from heddle.errors import HeddleError
from heddle.search.latency_model.stacks import Stack, stack_of
from heddle.specs import Parameter, SpecFile
from heddle.specs.pattern import expand_layers

Array = NDArray[np.float64]
# Stacks for each coefficient of the fit.
STACKS_EACH = 3
# Nobody waits for more; with fewer than STACKS_EACH the fit leans on its penalty.
MOST_STACKS = 400
# Random stacks to choose from, for each that is chosen.
POOL = 4
# Of an int with more values, or of a float, so many are drawn.
LEVELS = 4
# The share of stacks of half the length: only they can tell what a model costs without its layers.
SHORTER = 1 / 6
# Draws in a row that bring nothing new before the space counts as drawn out.
PATIENCE = 60
FIRST_POOL = 60
# Seeds of the stacks that are fitted and of those that are held out.
DESIGN_SEED, HELD_OUT_SEED = 20_260, 62_020


@dataclass(frozen=True, slots=True)
class Design:
    """Stacks to fit on, and stacks of the space alone that the fit never sees."""

    fitted: tuple[Stack, ...]
    held_out: tuple[Stack, ...]


def design(file: SpecFile, *, stacks: int | None = None, held_out: int = 30, seed: int = 0) -> Design:
    """The stacks to measure for a space; `stacks` to fit on, by default three for each coefficient.

    Raises:
        HeddleError: "bad-argument" for a space with too few specs to fit a model of them.
    """
    drawn = _random_stacks(file, np.random.default_rng([DESIGN_SEED, seed]), is_free=True)
    pool = _distinct(drawn, FIRST_POOL, ())
    while True:
        coefficients = len(columns(pool))
        wanted = stacks or min(MOST_STACKS, STACKS_EACH * coefficients)
        more = _distinct(drawn, POOL * wanted - len(pool), {stack.hash for stack in pool})
        pool += more
        # New stacks may have brought new terms, which ask for more stacks.
        if not more or len(columns(pool)) == coefficients:
            break
    chosen = choose(pool, wanted)
    taken = {stack.hash for stack in chosen}
    unseen = held_out_stacks(file, held_out, taken=taken, seed=seed)
    if stacks is not None and stacks < coefficients <= len(pool):
        what = f"{stacks} stacks do not fit the {coefficients} terms that these hold: their layers, pairs of layers and the rest"
        hint = f"without --stacks {STACKS_EACH} a term are measured; {coefficients + coefficients // 4} should do"
        raise HeddleError("bad-argument", what, hint=hint)
    if len(chosen) < coefficients or len(unseen) < 2:
        what = f"the space has too few specs: {len(chosen)} stacks to fit {coefficients} terms, {len(unseen)} held out"
        hint = "heddle bench SPEC times one spec; a search of so few times each"
        raise HeddleError("bad-argument", what, hint=hint)
    return Design(tuple(chosen), tuple(unseen))


def held_out_stacks(file: SpecFile, count: int, *, taken: Collection[str] = (), seed: int = 0) -> list[Stack]:
    """Up to `count` random stacks of the space alone, none of the hashes `taken`; with another `count` the first are the same."""
    rng = np.random.default_rng([HELD_OUT_SEED, seed])
    return _distinct(_random_stacks(file, rng, is_free=False), count, taken)


def columns(stacks: Sequence[Stack]) -> list[tuple[str, ...]]:
    """The coefficients that stacks need: a frame, a term, or a pair of terms; each by its digests."""
    frames = sorted({("frame", stack.frame) for stack in stacks})
    terms = sorted({("term", term) for stack in stacks for term in stack.terms})
    pairs = sorted({("pair", *pair) for stack in stacks for pair in stack.pairs})
    return [*frames, *terms, *pairs]


def matrix(stacks: Sequence[Stack], names: Sequence[tuple[str, ...]]) -> Array:
    """How often each coefficient counts in each stack. [stacks, coefficients]"""
    place = {name: index for index, name in enumerate(names)}
    made = np.zeros((len(stacks), len(names)))
    for row, stack in zip(made, stacks, strict=True):
        counted: list[tuple[tuple[str, ...], int]] = [(("frame", stack.frame), 1)]
        counted += [(("term", term), count) for term, count in stack.counts.items()]
        counted += [(("pair", *pair), count) for pair, count in stack.pairs.items()]
        for name, count in counted:
            if name in place:
                row[place[name]] = count
    return made


def choose(pool: Sequence[Stack], count: int) -> list[Stack]:
    """`count` stacks of the pool, or all of it: each the one that tells most beyond those before it."""
    if len(pool) <= count:
        return list(pool)
    features = np.hstack([matrix(pool, columns(pool)), _thirds(pool)])
    features /= np.sqrt((features**2).mean(axis=0)).clip(min=1e-12)
    inverse = np.eye(features.shape[1]) * 1e3
    left, chosen = np.ones(len(pool), dtype=bool), []
    for _ in range(count):
        gain = np.einsum("ij,jk,ik->i", features, inverse, features)
        best = int(np.argmax(np.where(left, gain, -np.inf)))
        left[best] = False
        chosen.append(pool[best])
        told = inverse @ features[best]
        inverse -= np.outer(told, told) / (1.0 + float(features[best] @ told))
    return chosen


def _thirds(stacks: Sequence[Stack]) -> Array:
    """Layers of each term in the first, the middle and the last third."""
    terms = sorted({term for stack in stacks for term in stack.terms})
    place = {term: index for index, term in enumerate(terms)}
    made = np.zeros((len(stacks), 3 * len(terms)))
    for row, stack in zip(made, stacks, strict=True):
        for layer, term in enumerate(stack.terms):
            row[3 * place[term] + 3 * layer // len(stack.terms)] += 1
    return made


def _distinct(drawn: Iterator[Stack | None], count: int, taken: Collection[str]) -> list[Stack]:
    """Up to `count` stacks that differ from each other and are not in `taken`."""
    found: dict[str, Stack] = {}
    idle = 0
    while len(found) < count and idle < PATIENCE:
        stack = next(drawn)
        idle += 1
        if stack is not None and stack.hash not in found and stack.hash not in taken and _is_legal(stack):
            found[stack.hash], idle = stack, 0
    return list(found.values())


def _random_stacks(file: SpecFile, rng: np.random.Generator, *, is_free: bool) -> Iterator[Stack | None]:
    """Random stacks without end; None for each that is no legal model.

    Free ones have layers in any number, from none to all of a block, and some have half the length.
    """
    while True:
        try:
            yield _random_stack(file, rng, is_free=is_free)
        except HeddleError:
            yield None


def _random_stack(file: SpecFile, rng: np.random.Generator, *, is_free: bool) -> Stack:
    values = file.space.settle(lambda one: _random_value(one, rng))[0]
    placement = file.space.placement
    if placement is None:
        model = file.resolve(values).model
    else:
        counts = placement.count(file.space.held(values))
        if is_free:
            shares = rng.dirichlet(np.full(len(placement.of), 0.5))
            drawn = rng.multinomial(placement.length, shares)
            counts = dict(zip(placement.of, map(int, drawn), strict=True))
        names = [name for name, count in counts.items() for _ in range(count)]
        layers = file.order(values).mended([names[index] for index in rng.permutation(len(names))])
        model = file.resolve(values, layers=layers).model
        if is_free and rng.random() < SHORTER:
            half = expand_layers(model)[: max(1, len(layers) // 2)]
            model = model.model_copy(update={"layers": half})
    return stack_of(model)


def _is_legal(stack: Stack) -> bool:
    """Whether it can be planned: a short stack may lack a layer that another one takes from."""
    try:
        plan(stack.model)
    except HeddleError:
        return False
    return True


def _random_value(parameter: Parameter, rng: np.random.Generator) -> Any:
    if parameter.kind == "float":
        assert parameter.low is not None
        assert parameter.high is not None
        return float(np.linspace(parameter.low, parameter.high, LEVELS)[rng.integers(LEVELS)])
    values = parameter.values()
    if parameter.kind == "int" and len(values) > 2 * LEVELS:
        return values[int(rng.integers(LEVELS)) * (len(values) - 1) // (LEVELS - 1)]
    return values[int(rng.integers(len(values)))]
