"""Whether a latency model that was fitted with other software still holds: a few specs are timed again when a search begins.

The margin of a fit says how far off a further spec of the space is, drawn as those were that it was held against. The sentinels
are the first of these very specs (of a fit with another seed, others drawn alike). Where all of them lie within the margin it is
kept. Of 30 the worst is the margin, so all of them lay within it then: what is beyond it now is so by the software, or by noise
as large as what was left of the margin. Five specs see no change that slows few of the kinds that the space has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from heddle.search import space
from heddle.search.latency import Place, measure
from heddle.search.latency_model.design import held_out_stacks
from heddle.search.latency_model.model import LatencyModel, PlaceFit
from heddle.search.latency_model.stacks import Stack, stack_of
from heddle.search.latency_model.table import SENTINELS
from heddle.search.record import BudgetInfo, Latency
from heddle.search.workers import Answer, Job, Workers
from heddle.specs import ModelSpec, SpecFile

# What the timings of a fit's sentinels are made by: the answers, of which some may be failures.
Time = Callable[[Sequence[Job]], Iterator[Answer]]


@dataclass(frozen=True, slots=True)
class Site:
    """A fit that the search goes by, under the label of its budget; `is_ratio` where that limits no milliseconds."""

    label: str
    fit: PlaceFit
    reference: ModelSpec | None
    is_ratio: bool


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the sentinels of a fit say: their errors as shares of what was predicted, and whether the margin is kept.

    `failure` is why one could not be timed; then, and without any that is predicted, the fit is not trusted.
    """

    label: str
    place: Place
    reference_hash: str
    margin: float
    errors: tuple[float, ...]
    failure: str | None

    @property
    def worst(self) -> float:
        """The greatest error by size; 0 without any."""
        return _greatest(self.errors)

    @property
    def is_trusted(self) -> bool:
        return self.failure is None and bool(self.errors) and abs(self.worst) <= self.margin

    def data(self) -> dict[str, Any]:
        """As run.json keeps it."""
        return {**asdict(self), "trusted": self.is_trusted}


def judged(
    file: SpecFile,
    model: LatencyModel,
    budgets: Sequence[Mapping[str, Any]],
    time: Time,
    how: Mapping[str, Any],
) -> list[Verdict]:
    """The verdict on each fit of `model` with a margin that the `budgets` of run.json ask for; `how` are device and effort, and
    the `ids` that models with routers read."""
    sites = _sites(file, model, budgets)
    stacks = held_out_stacks(file, SENTINELS) if sites else []
    return [_judge(site, stacks, time, how) for site in sites]


def verdict(site: Site, rows: Sequence[tuple[Stack, Latency]], failure: str | None = None) -> Verdict:
    """How far the timings `rows` of sentinels are from what `site` predicts.

    In the ratio to the reference, which is what was fitted; where the budget limits milliseconds, in these too: the ratio would
    miss what slows all models alike.
    """
    fit, errors = site.fit, []
    for stack, row in rows:
        predicted = fit.predict(stack)
        if predicted is None:
            continue
        found = [] if row.ratio is None else [row.ratio * fit.reference_ms / predicted.ms - 1]
        found += [] if site.is_ratio else [row.median_ms / predicted.ms - 1]
        errors.append(_greatest(found))
    margin = fit.held_out.margin
    assert margin is not None
    return Verdict(site.label, fit.place, fit.reference_hash, margin, tuple(errors), failure)


def _greatest(errors: Iterable[float]) -> float:
    """The greatest by size, which NaN is; 0 without any."""
    return max(errors, key=lambda one: math.inf if math.isnan(one) else abs(one), default=0.0)


def timer(workers: Workers) -> Time:
    """Times in workers, one after the other, each with the whole device."""
    return lambda jobs: workers.on_whole_device(jobs, _Unheard())


def _judge(site: Site, stacks: Sequence[Stack], time: Time, how: Mapping[str, Any]) -> Verdict:
    place, name = site.fit.place, site.fit.reference
    call = partial(measure, reference=site.reference, reference_name=name, **how)
    known = [stack for stack in stacks if site.fit.predict(stack) is not None]
    rows: list[tuple[Stack, Latency]] = []
    failure = None
    for answer in time([Job(call, (stack.model, place), stack) for stack in known]):
        if answer.ok:
            rows.append((answer.job.tag, answer.value))
        else:
            failure = f"{answer.code}: {answer.message}"
    return verdict(site, rows, failure)


def _sites(file: SpecFile, model: LatencyModel, budgets: Sequence[Mapping[str, Any]]) -> list[Site]:
    found: dict[tuple[Place, str], Site] = {}
    for budget in budgets:
        if not BudgetInfo(**budget).is_timed:
            continue
        beside = budget["relative_to"]
        one = file.spec.model if beside is None else space.reference(file, beside).model
        hash_ = stack_of(one).hash
        place = Place(budget["phase"], budget["batch"], budget["context"])
        fit = model.at(place, None if beside is None else hash_)
        if fit is None or fit.held_out.margin is None:
            continue
        # A fit that a budget in milliseconds takes may be beside a model which this file does not name.
        reference = one if hash_ == fit.reference_hash else None
        before = found.get((place, fit.reference_hash))
        is_ratio = beside is not None and (before is None or before.is_ratio)
        label = budget["label"] if before is None else before.label
        found[place, fit.reference_hash] = Site(label, fit, reference, is_ratio)
    return list(found.values())


class _Unheard:
    """A watcher of jobs that are no trial's."""

    def begun(self, jobs: Sequence[Job]) -> None:
        pass

    def placed(self, job: Job, place: Mapping[str, Any]) -> None:
        pass

    def tick(self) -> None:
        pass

    def is_stopping(self) -> bool:
        return False
