"""Full, choosing and reusing layers: both objectives equal brute force, and a solution is a spec of the language."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from heddle.compose.plan import plan
from heddle.errors import HeddleError
from heddle.search.placement.reuse import (
    Across,
    Policy,
    Profile,
    as_layers,
    best_overlap,
    fewest_lists,
    profiler_resets,
)
from heddle.specs import loads
from heddle.specs.pattern import layers_of
from heddle.specs.references import links

# The worked example of five layers.
PAIRS = {(0, 1): 0.9, (0, 2): 0.6, (0, 3): 0.5, (0, 4): 0.4, (1, 2): 0.95, (1, 3): 0.7, (1, 4): 0.5}
PAIRS |= {(2, 3): 0.8, (2, 4): 0.75, (3, 4): 0.9}
WORKED = np.eye(5)
for place, share in PAIRS.items():
    WORKED[place] = share


def test_the_worked_example_by_a_threshold() -> None:
    found = fewest_lists(Profile(WORKED), 0.7)
    assert found.sources == (-1, 0, -1, 2, 2)
    assert found.resets == 1
    assert found.total == pytest.approx(4.45)


@pytest.mark.parametrize(
    ("resets", "sources", "least"),
    [(0, (-1, 0, 0, 0, 0), 0.4), (1, (-1, 0, -1, 2, 2), 0.75), (4, (-1,) * 5, 1.0)],
)
def test_the_worked_example_within_so_many_resets(
    resets: int, sources: tuple[int, ...], least: float
) -> None:
    found = best_overlap(Profile(WORKED), resets)
    assert (found.sources, found.least) == (sources, least)


def every(profile: Profile, across: Across) -> list[Policy]:
    """All patterns of resets, valued without the solver."""
    sets = profile.overlap if profile.overlap.ndim == 3 else profile.overlap[None]
    found = []
    for fresh in product((False, True), repeat=profile.length):
        sources, roles, current, legal = [], [], -1, True
        for layer, is_fresh in enumerate(fresh):
            if layer in profile.full:
                legal &= is_fresh
                roles.append("full")
                sources.append(-1)
                current = current if across == "keep" else -1
            elif is_fresh:
                current = layer
                roles.append("select")
                sources.append(-1)
            else:
                legal &= current >= 0
                roles.append("reuse")
                sources.append(current)
        taken = [sets[:, source, layer] for layer, source in enumerate(sources) if source >= 0]
        total = sum(float(one.mean()) for one in taken) + len(roles) - len(taken)
        least = min((float(one.min()) for one in taken), default=1.0)
        if legal:
            found.append(Policy(tuple(roles), tuple(sources), total, least))  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("across", ["keep", "drop"])
@pytest.mark.parametrize("full", [(), (0, 1, 8), (4,)])
@pytest.mark.parametrize("sets", [1, 3])
def test_both_objectives_equal_brute_force(across: Across, full: tuple[int, ...], sets: int) -> None:
    rng = np.random.default_rng(len(full) + sets)
    for _ in range(4):
        # Two digits, so that equal overlaps occur.
        profile = Profile(np.round(rng.random((sets, 9, 9)), 2).squeeze(), frozenset(full))
        policies = every(profile, across)
        for theta in (0.3, 0.7):
            kept = [one for one in policies if one.least >= theta]
            wanted = min((one.resets, -one.total) for one in kept)
            found = fewest_lists(profile, theta, across=across)
            assert found in kept
            assert (found.resets, -found.total) == pytest.approx(wanted)
        for resets in (3, 5):
            within = [one for one in policies if one.resets <= resets]
            if not within:
                with pytest.raises(HeddleError, match="resets are asked for"):
                    best_overlap(profile, resets, across=across)
                continue
            best = max((one.least, one.total) for one in within)
            found = best_overlap(profile, resets, across=across)
            assert found in within
            assert (found.least, found.total) == pytest.approx(best)


def test_the_deepest_profile_is_solved_and_the_same_again() -> None:
    profile = Profile(np.random.default_rng(0).random((64, 64)), frozenset({*range(7), 61, 62, 63}))
    resets = profiler_resets(64, 10)
    assert resets == 28
    found = best_overlap(profile, resets)
    assert found == best_overlap(profile, resets)
    assert found.resets <= resets
    assert found.roles[:7] == ("full",) * 7


def test_a_budget_of_resets_that_is_too_small_tells_the_least() -> None:
    with pytest.raises(HeddleError, match="1 resets are asked for and 4 needed") as raised:
        best_overlap(Profile(np.ones((6, 6)), frozenset({2, 4})), 1, across="drop")
    assert raised.value.code == "nothing-feasible"


@pytest.mark.parametrize(
    ("overlap", "full"), [(np.zeros((2, 3)), ()), (np.full((3, 3), 1.5), ()), (np.zeros((3, 3)), (3,))]
)
def test_a_profile_that_is_none_is_refused(overlap: np.ndarray, full: tuple[int, ...]) -> None:
    with pytest.raises(HeddleError) as raised:
        Profile(overlap, frozenset(full))
    assert raised.value.code == "bad-argument"


TEXT = """\
version: 1
name: reused
model:
  vocab_size: 256
  hidden_size: 16
  blocks:
    full: {{mixer: {{kind: attention, heads: 2}}, channel: {{kind: none}}}}
    pick: {{mixer: {{kind: attention, heads: 2, selection: {{block: 8, count: 4}}}}, channel: {{kind: none}}}}
    reuse: {{mixer: {{kind: attention, heads: 2, selection: {{block: 8, count: 4, source: pick}}}}, channel: {{kind: none}}}}
  layers: [{layers}]
"""


def test_a_policy_is_a_spec_whose_layers_take_from_its_sources() -> None:
    profile = Profile(np.random.default_rng(1).random((10, 10)), frozenset({0, 4}))
    policy = fewest_lists(profile, 0.4)
    assert {*policy.roles} == {"full", "select", "reuse"}
    model = loads(TEXT.format(layers=", ".join(as_layers(policy)))).spec.model
    plan(model)
    taken = {link.layer: link.source for link in links(layers_of(model))}
    assert taken == {layer: source for layer, source in enumerate(policy.sources) if source >= 0}
