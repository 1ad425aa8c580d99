"""What the longer trainings at the end of a search gave (`heddle.search.longer`); needs only the standard library."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

LONGER_FILE = "longer.json"


@dataclass(frozen=True, slots=True)
class LongerRow:
    """A trial trained again for longer, or with `is_reversed` its layers the other way round, which was never timed.

    `before` is its mean normalised score in the search, None for a reverse; `qualities` the same of the longer trainings by seed,
    empty where one failed; `values` the scores by task and seed, at the best of several learning rates. `se` is the standard
    error of `quality` over held-out examples, which knows nothing of what other seeds would give.
    """

    number: int
    is_reversed: bool
    hash: str
    layers: tuple[str, ...]
    before: float | None
    qualities: tuple[float, ...]
    values: dict[str, tuple[float, ...]]
    learning_rates: dict[str, float]
    se: float

    @property
    def name(self) -> str:
        return f"trial {self.number}{' in reverse order' * self.is_reversed}"

    @property
    def quality(self) -> float | None:
        """Mean over tasks and seeds; None where a training failed."""
        return sum(self.qualities) / len(self.qualities) if self.qualities else None

    def is_better(self, other: LongerRow) -> bool:
        """Whether it is better than `other` by more than two standard errors."""
        if self.quality is None or other.quality is None:
            return False
        return self.quality - other.quality > 2 * math.hypot(self.se, other.se)


@dataclass(frozen=True, slots=True)
class Longer:
    """The best trials after `times` the tokens, in the order of the search, each followed by its reverse; `number` is the winner.

    `left_out` says why a reverse is no model.
    """

    number: int
    times: float
    seeds: tuple[int, ...]
    rows: tuple[LongerRow, ...]
    failures: tuple[str, ...]
    left_out: tuple[str, ...]

    def ranked(self) -> tuple[LongerRow, ...]:
        """The trials, reverses left out, from the best of the longer trainings down; without those that failed."""
        found = [row for row in self.rows if row.quality is not None and not row.is_reversed]
        return tuple(sorted(found, key=lambda row: -(row.quality or 0.0)))

    @property
    def is_same_order(self) -> bool:
        """Whether the order is the search's to the last place."""
        before = [row.before or 0.0 for row in self.ranked()]
        return before == sorted(before, reverse=True)

    @property
    def holds(self) -> bool | None:
        """Whether no trial is better than one that was ahead of it in the search; None with less than two to compare."""
        ranked = self.ranked()
        behind = combinations(sorted(ranked, key=lambda row: -(row.before or 0.0)), 2)
        return None if len(ranked) < 2 else not any(later.is_better(first) for first, later in behind)

    @property
    def ahead(self) -> tuple[LongerRow, ...]:
        """What is better than the winner after the longer trainings, reverses included."""
        won = next(row for row in self.rows if row.number == self.number and not row.is_reversed)
        return tuple(row for row in self.rows if row.is_better(won))


def read_longer(path: Path, best: int | None) -> Longer | None:
    """The longer trainings of a search that trial `best` won."""
    if not path.exists():
        return None
    value = json.loads(path.read_bytes())
    rows = (
        LongerRow(**{
            **row,
            "layers": tuple(row["layers"]),
            "qualities": tuple(row["qualities"]),
            "values": {task: tuple(values) for task, values in row["values"].items()},
        })
        for row in value["rows"]
    )  # fmt: skip
    listed = {name: tuple(value[name]) for name in ("seeds", "failures", "left_out")}
    return Longer(**{**value, **listed, "rows": tuple(rows)}) if value["number"] == best else None
