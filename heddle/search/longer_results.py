"""What the longer trainings at the end of a search gave (`heddle.search.longer`); needs only the standard library."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

LONGER_FILE = "longer.json"


@dataclass(frozen=True, slots=True)
class LongerRow:
    """A trial trained again for longer, or with `is_reversed` its layers the other way round, which was never timed.

    `before` is its mean normalised score in the search, None for a reverse; `qualities` the same of the longer trainings by seed,
    empty where one failed; `values` the scores by task and seed, at the best of several learning rates.
    """

    number: int
    is_reversed: bool
    hash: str
    layers: tuple[str, ...]
    before: float | None
    qualities: tuple[float, ...]
    values: dict[str, tuple[float, ...]]
    learning_rates: dict[str, float]

    @property
    def name(self) -> str:
        return f"trial {self.number}{' in reverse order' * self.is_reversed}"

    @property
    def quality(self) -> float | None:
        """Mean over tasks and seeds; None where a training failed."""
        return sum(self.qualities) / len(self.qualities) if self.qualities else None


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
    def holds(self) -> bool | None:
        """Whether the order of the search is that of the longer trainings too; None with less than two to compare."""
        ranked = self.ranked()
        before = [row.before for row in ranked if row.before is not None]
        return None if len(ranked) < 2 else before == sorted(before, reverse=True)

    @property
    def ahead(self) -> tuple[LongerRow, ...]:
        """What is better than the winner after the longer trainings, reverses included."""
        won = next(
            (row.quality for row in self.rows if row.number == self.number and not row.is_reversed), None
        )
        return tuple(
            row for row in self.rows if won is not None and row.quality is not None and row.quality > won
        )


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
