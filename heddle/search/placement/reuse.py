"""Which layers read all keys, which choose blocks of keys, and which take over an earlier layer's choice (HyLRA).

A profile of a trained model tells how far two layers choose the same blocks; the layers that suffer most from reading a
part are full. The rest is an exact dynamic program over (layer, the layer whose list is in use, lists chosen so far).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from heddle.errors import HeddleError
from heddle.search.placement.counts import Array

Role = Literal["full", "select", "reuse"]
# Whether a list may be taken over across a full layer in between, or the next layer chooses anew.
Across = Literal["keep", "drop"]


@dataclass(frozen=True)
class Profile:
    """How much of layer j's choice layer i < j has made before it: overlap A[i, j] in [0, 1], for each calibration set.

    Layers in `full` read everything: they neither give a list nor take one.

    Shapes:  overlap: [L, L] or [sets, L, L]; only i < j is read.

    Raises:
        HeddleError: "bad-argument" for overlaps that are none, or layers that are not there.
    """

    overlap: Array
    full: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        shape = self.overlap.shape
        if len(shape) not in (2, 3) or shape[-1] != shape[-2] or 0 in shape:
            raise HeddleError(
                "bad-argument", f"overlaps of shape {shape} are not those of layers with layers"
            )
        above = self.overlap[..., np.triu(np.ones(shape[-2:], dtype=bool), 1)]
        if not ((above >= 0) & (above <= 1)).all():
            raise HeddleError("bad-argument", "an overlap is a share between 0 and 1")
        if strange := sorted(layer for layer in self.full if not 0 <= layer < shape[-1]):
            raise HeddleError("bad-argument", f"full layers {strange} are not among {shape[-1]} layers")

    @property
    def length(self) -> int:
        return int(self.overlap.shape[-1])

    @cached_property
    def mean(self) -> Array:
        """The mean over calibration sets: [L, L]."""
        return self.overlap if self.overlap.ndim == 2 else self.overlap.mean(axis=0)

    @cached_property
    def worst(self) -> Array:
        """The least over calibration sets, -1 where no list can be taken over: [L, L]."""
        least = np.array(self.overlap if self.overlap.ndim == 2 else self.overlap.min(axis=0))
        least[np.tril(np.ones(least.shape, dtype=bool))] = -1.0
        for layer in self.full:
            least[layer, :] = least[:, layer] = -1.0
        return least


@dataclass(frozen=True, slots=True)
class Policy:
    """What each layer does. `sources[j]` is the layer whose list layer j takes over, -1 where it has its own or is full.

    `total` is Σ_j A[source, j], with 1 for a layer that takes over none; `least` the smallest A of those taken over, over
    all calibration sets, 1 where there is none.
    """

    roles: tuple[Role, ...]
    sources: tuple[int, ...]
    total: float
    least: float

    @property
    def resets(self) -> int:
        """Layers after the first that take over no list, full ones among them."""
        return sum(role != "reuse" for role in self.roles[1:])

    @property
    def lists(self) -> int:
        """Layers that choose."""
        return self.roles.count("select")


def fewest_lists(profile: Profile, theta: float, *, across: Across = "keep") -> Policy:
    """Of all policies that take over no list with an overlap below `theta`, one with the fewest resets, of those the largest
    total (HyLRA, arXiv 2602.00777, as others describe it: the paper's own text was not at hand).

    There is always one: every layer may choose for itself.
    """
    table = _Table(profile, theta, across)
    return table.policy(table.fewest)


def best_overlap(profile: Profile, resets: int, *, across: Across = "drop") -> Policy:
    """Of all policies with at most so many resets, one with the largest least overlap, of those the largest total.

    The released profiler's objective, solved exactly: its one dynamic program over (least, total) finds the right least
    but not always the right total, since the larger least of a beginning is kept even where a later layer sets it anyway.
    Here the least is searched by halving among the overlaps, and the total maximised over what lies at or above it.

    Raises:
        HeddleError: "nothing-feasible" where more resets are needed.
    """
    allowed = resets - _full_resets(profile)
    if not {0} & profile.full:
        # The first layer chooses, and is no reset.
        allowed += 1
    levels = [-0.5, *sorted({float(a) for a in profile.worst.ravel() if a >= 0}), np.inf]
    if (table := _Table(profile, levels[0], across)).fewest > allowed:
        least = table.policy(table.fewest).resets
        raise HeddleError("nothing-feasible", f"{resets} resets are asked for and {least} needed at least")
    low, high = 0, len(levels) - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (
            (middle, high) if _Table(profile, levels[middle], across).fewest <= allowed else (low, middle - 1)
        )
    table = _Table(profile, levels[low], across)
    totals = table.totals[: allowed + 1]
    return table.policy(int(totals.argmax()))


def profiler_resets(length: int, full: int, *, sparsity: float = 0.9, ratio: float = 0.3) -> int:
    """The released profiler's budget of resets: ⌈L · sparsity · ratio⌉ and one for each full layer."""
    # A hair less, so that 0.1 * 30 is 3.
    return ceil(length * sparsity * ratio - 1e-9) + full


def as_layers(policy: Policy, *, full: str = "full", select: str = "pick", reuse: str = "reuse") -> list[str]:
    """The `layers` of a spec that does this, from the names of three blocks.

    The block `select` is an attention with a `selection`; `reuse` one whose `selection` has `source: <select>` and the same
    block and count. That source is the nearest earlier layer of its block, which is what a policy takes over.
    """
    nearest = -1
    names: dict[Role, str] = {"full": full, "select": select, "reuse": reuse}
    for layer, role in enumerate(policy.roles):
        assert role != "reuse" or policy.sources[layer] == nearest, f"layer {layer} reads an older list"
        nearest = layer if role == "select" else nearest
    return [names[role] for role in policy.roles]


def _full_resets(profile: Profile) -> int:
    return len(profile.full - {0})


class _Table:
    """The largest total with exactly c lists chosen, over takings of at least `theta`, for every c at once.

    S_j[i, c]: layers 0 … j with the list of layer i in use (row L: none). A layer that takes over adds A[i, j] to its row; one
    that chooses starts row j from the best of all rows with c - 1.
    """

    def __init__(self, profile: Profile, theta: float, across: Across) -> None:
        self.profile, self.across = profile, across
        length = profile.length
        state = np.full((length + 1, length + 1), -np.inf)
        state[length, 0] = 0.0
        # For each layer the row that was best, where it was left for another.
        self._from: list[NDArray[np.int64] | None] = []
        for layer in range(length):
            state = self._after(state, layer, theta)
        self._last = state
        self.totals: Array = state.max(axis=0)

    def _after(self, state: Array, layer: int, theta: float) -> Array:
        none = self.profile.length
        if layer in self.profile.full:
            if self.across == "keep":
                self._from.append(None)
                return state + 1.0
            self._from.append(state.argmax(axis=0))
            after = np.full_like(state, -np.inf)
            after[none] = state.max(axis=0) + 1.0
            return after
        worst = np.append(self.profile.worst[:, layer], -1.0)
        gain = np.append(self.profile.mean[:, layer], 0.0)
        after = np.where(((worst >= theta) & (worst >= 0))[:, None], state + gain[:, None], -np.inf)
        self._from.append(state.argmax(axis=0))
        after[layer, 1:] = state.max(axis=0)[:-1] + 1.0
        return after

    @property
    def fewest(self) -> int:
        """The least number of lists."""
        return int(np.flatnonzero(np.isfinite(self.totals))[0])

    def policy(self, lists: int) -> Policy:
        """The policy of the largest total with so many lists; of equals the earliest sources."""
        none, count = self.profile.length, lists
        row = int(self._last[:, count].argmax())
        roles, sources = list[Role](), list[int]()
        for layer in reversed(range(none)):
            before = self._from[layer]
            if layer in self.profile.full:
                roles.append("full")
                sources.append(-1)
                row = row if before is None else int(before[count])
            elif row == layer:
                assert before is not None
                roles.append("select")
                sources.append(-1)
                count -= 1
                row = int(before[count])
            else:
                roles.append("reuse")
                sources.append(row)
        return _policy(self.profile, roles[::-1], sources[::-1])


def _policy(profile: Profile, roles: Sequence[Role], sources: Sequence[int]) -> Policy:
    taken = [(source, layer) for layer, source in enumerate(sources) if source >= 0]
    total = sum(float(profile.mean[pair]) for pair in taken) + len(roles) - len(taken)
    least = min((float(profile.worst[pair]) for pair in taken), default=1.0)
    return Policy(tuple(roles), tuple(sources), total, least)
