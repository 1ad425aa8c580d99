"""A fitted latency model as plain data: one fit for each place, its file, and what it predicts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from heddle.errors import HeddleError, Where
from heddle.search.durable import write_json
from heddle.search.latency import Place
from heddle.search.latency_model.fit import HeldOut, Sum, Way
from heddle.search.latency_model.stacks import Stack
from heddle.search.timing_quality import TimingQuality
from heddle.search.timing_quality import from_data as quality_from

FORMAT = 1
KIND = "latency-model"
# What stacks with routers read where it was no task's.
RANDOM = "random"


@dataclass(frozen=True, slots=True)
class Prediction:
    """Milliseconds and their margin; and as a ratio to the reference, where the stacks were timed beside one."""

    ms: float
    margin_ms: float | None
    ratio: float | None
    margin_ratio: float | None


@dataclass(frozen=True, slots=True)
class PlaceFit:
    """The sum for one phase, batch and context, beside the reference that every stack was timed with.

    `measured` counts the stacks it was fitted on. `limit_ms` is the budget near which the bias was looked at.
    """

    place: Place
    reference: str
    reference_hash: str
    reference_ms: float
    limit_ms: float | None
    method: str
    measured: int
    taken_over: int
    crossed: float
    sum: Sum
    held_out: HeldOut
    # Of all timings that it was fitted on and held against; None in a model of before they were counted.
    timings: TimingQuality | None = None
    # The digest of the task whose tokens models with routers read, or RANDOM; None where nothing routes, or nobody told.
    reads: str | None = None

    def predict(self, stack: Stack) -> Prediction | None:
        """None for a stack with what was never measured."""
        ms = self.sum.predict(stack)
        if ms is None or ms <= 0:
            return None
        share = self.held_out.margin
        margin = None if share is None else share * ms
        return Prediction(
            ms, margin, ms / self.reference_ms, None if margin is None else margin / self.reference_ms
        )


@dataclass(frozen=True, slots=True)
class LatencyModel:
    """What `heddle bench SPEC --fit` leaves: fits, names of the terms, and what they were measured with."""

    name: str
    environment: dict[str, Any]
    labels: dict[str, str]
    fits: tuple[PlaceFit, ...]

    def at(self, place: Place, reference_hash: str | None) -> PlaceFit | None:
        """The fit of a place, beside that reference where one is given."""
        for one in self.fits:
            if one.place == place and reference_hash in (None, one.reference_hash):
                return one
        return None

    def save(self, path: Path) -> None:
        """Raises HeddleError "disk-full"."""
        write_json(path, self.data())

    def data(self) -> dict[str, Any]:
        """The model as JSON says it."""
        fits = []
        for one in self.fits:
            weights = [{"column": list(name), "ms": ms} for name, ms in one.sum.weights.items()]
            fits.append({**asdict(one), "sum": {"way": asdict(one.sum.way), "weights": weights}})
        head = {"format": FORMAT, "kind": KIND, "name": self.name, "environment": self.environment}
        return {**head, "labels": self.labels, "fits": fits}


def load_model(path: Path) -> LatencyModel:
    """The model in a file.

    Raises:
        HeddleError: "latency-model" for a file that is none, "file-not-found".
    """
    where = Where(file=str(path))
    try:
        data = json.loads(path.read_bytes())
    except OSError:
        hint = "heddle bench SPEC --fit makes one"
        raise HeddleError("file-not-found", "no latency model is here", where=where, hint=hint) from None
    except ValueError as error:
        raise HeddleError("latency-model", f"not a latency model: {error}", where=where) from None
    if not isinstance(data, dict) or (data.get("kind"), data.get("format")) != (KIND, FORMAT):
        raise HeddleError("latency-model", "not a latency model of this heddle", where=where)
    return from_data(data)


def from_data(data: Mapping[str, Any]) -> LatencyModel:
    """The model that `LatencyModel.data` made."""
    return LatencyModel(data["name"], data["environment"], data["labels"], tuple(map(_fit, data["fits"])))


def _fit(data: Mapping[str, Any]) -> PlaceFit:
    weights = {tuple(one["column"]): one["ms"] for one in data["sum"]["weights"]}
    unseen = HeldOut(**data["held_out"])
    known = {
        "place": Place(**data["place"]),
        "sum": Sum(Way(**data["sum"]["way"]), weights),
        "held_out": replace(unseen, pairs=tuple((ms, seen) for ms, seen in unseen.pairs)),
        "timings": quality_from(data.get("timings")),
    }
    return PlaceFit(**{**data, **known})
