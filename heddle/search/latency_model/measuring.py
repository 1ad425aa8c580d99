"""`heddle bench SPEC --fit`: measures a designed set of stacks of a space, and fits a latency model to them.

Every stack is timed turn by turn with one reference stack of the same spec (see `heddle.search.latency`). What is fitted is
the ratio to it, times the reference's median over all of them: what slows the machine for a while slows both, and cancels.
Stacks to fit on and stacks held out are measured in one shuffled order, so that no drift tells them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from heddle.compose.plan import plan
from heddle.errors import HeddleError
from heddle.search import environment
from heddle.search.latency import Effort, Place, measure
from heddle.search.latency_model.design import Array, Design, design
from heddle.search.latency_model.fit import constant, fit, held_out, line
from heddle.search.latency_model.model import RANDOM, LatencyModel, PlaceFit
from heddle.search.latency_model.stacks import Stack, labels_of, stack_of
from heddle.search.latency_model.table import Table, timing_environment
from heddle.search.record import Latency
from heddle.search.tasks import Task
from heddle.search.timing_quality import quality_of
from heddle.search.timing_subject import routes, task_ids
from heddle.specs import ModelSpec, SpecFile

# What sentinels must agree in; the ratio alone would miss what slows all models alike.
FIGURES = ("median_ms", "ratio")
# More stacks than this share may not fail.
FAILED = 0.1


@dataclass(frozen=True, slots=True)
class Site:
    """Where latency is fitted: a place, the reference beside which it is timed, and the budget's limit if there is one.

    `at_most` is in milliseconds, or with `is_ratio` a ratio to the reference.
    """

    place: Place
    reference: ModelSpec
    reference_name: str
    at_most: float | None = None
    is_ratio: bool = False


@dataclass(frozen=True, slots=True)
class How:
    """How stacks are timed, and who is told of each: (done, of how many, whether it was in the table). `reads` gives the task
    whose tokens models with routers read (see `heddle.search.timing_subject`); without it they read random ones, as others do.
    """

    device: str = field(default_factory=environment.pick_device)
    effort: Effort = Effort()  # noqa: RUF009 - frozen
    folder: Path | None = None
    on_stack: Callable[[int, int, bool], None] = lambda *_: None
    reads: Callable[[], Task] | None = None


def fit_model(
    file: SpecFile,
    sites: Sequence[Site],
    *,
    stacks: int | None = None,
    unseen: int = 30,
    seed: int = 0,
    how: How | None = None,
) -> LatencyModel:
    """The latency model of the space of `file` at `sites`; what the user's table holds is not measured again.

    Raises:
        HeddleError: "bad-argument" for a space too small to fit, "out-of-memory", "disk-full".
    """
    how = how or How()
    drawn = design(file, stacks=stacks, held_out=unseen, seed=seed)
    table = Table(timing_environment(how.device), how.folder)
    fits = tuple(_Site(site, table, how).fit(drawn, seed) for site in sites)
    labels = labels_of([*drawn.fitted, *drawn.held_out])
    return LatencyModel(file.spec.name, table.environment, labels, fits)


class _Site:
    """The measurements of one site."""

    def __init__(self, site: Site, table: Table, how: How) -> None:
        self._site, self._table, self._how = site, table, how
        self._reference = stack_of(site.reference)
        self._stacks: dict[str, Stack] = {}

    def fit(self, drawn: Design, seed: int) -> PlaceFit:
        rows, taken_over = self._measured([*drawn.fitted, *drawn.held_out], seed)
        fitted = [stack for stack in drawn.fitted if stack.hash in rows]
        unseen = [stack for stack in drawn.held_out if stack.hash in rows]
        middle = float(np.median([row["reference_ms"] for row in rows.values()]))
        times, truth = (
            np.array([rows[stack.hash]["ratio"] * middle for stack in each]) for each in (fitted, unseen)
        )
        found, crossed = fit(fitted, times, seed=seed)
        predicted = [found.predict(stack) for stack in unseen]
        known = np.array([one is not None for one in predicted])
        shown = np.array([one for one in predicted if one is not None])
        offset, slope = line(self._flops(fitted), times)
        flops = offset + slope * self._flops(unseen)
        baselines = (np.full(known.sum(), constant(times)), flops[known])
        limit = self._site.at_most
        if limit is not None and self._site.is_ratio:
            limit *= middle
        return PlaceFit(
            place=self._site.place,
            reference=self._site.reference_name,
            reference_hash=self._reference.hash,
            reference_ms=middle,
            limit_ms=limit,
            method=next(iter(rows.values()))["method"],
            measured=len(fitted),
            taken_over=taken_over,
            crossed=crossed,
            sum=found,
            held_out=held_out(truth[known], shown, baselines, limit),
            timings=quality_of([Latency(**row) for row in rows.values()]),
            reads=self._reads([*fitted, *unseen]),
        )

    def _measured(self, stacks: Sequence[Stack], seed: int) -> tuple[dict[str, dict[str, Any]], int]:
        """The row of each stack by its hash, from the table or measured now; and how many an older environment gave."""
        self._stacks = {stack.hash: stack for stack in stacks}
        wanted = {stack.hash: self._inputs(stack) for stack in stacks}
        taken_over = self._table.adopt(list(wanted.values()), self._measure, FIGURES)
        order = np.random.default_rng(seed).permutation(len(stacks))
        rows, failures = dict[str, dict[str, Any]](), list[HeddleError]()
        for done, index in enumerate(order, start=1):
            hash_ = stacks[index].hash
            row = self._table.get(wanted[hash_])
            self._how.on_stack(done, len(stacks), row is not None)
            try:
                rows[hash_] = row or self._fresh(wanted[hash_])
            except HeddleError as error:
                failures.append(error)
                if error.code != "out-of-memory" or len(failures) > FAILED * len(stacks):
                    raise
        return rows, taken_over

    def _fresh(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        row = self._measure(inputs)
        self._table.put(inputs, row)
        return row

    def _measure(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        call = partial(measure, reference=self._site.reference, reference_name=self._site.reference_name)
        stack, how = self._stacks[inputs["spec"]], self._how
        reads = self._read_by(stack)
        ids = None if reads is None else task_ids(reads)
        return asdict(call(stack.model, self._site.place, device=how.device, effort=how.effort, ids=ids))

    def _inputs(self, stack: Stack) -> dict[str, Any]:
        """What decides a row besides the environment."""
        place, effort = asdict(self._site.place), asdict(self._how.effort)
        inputs = {"spec": stack.hash, "beside": self._reference.hash, "place": place, "effort": effort}
        reads = self._read_by(stack)
        return inputs if reads is None else {**inputs, "reads": reads.digest}

    def _read_by(self, stack: Stack) -> Task | None:
        """The task whose tokens are read in a timing of the stack; None where they are random."""
        return self._how.reads() if self._how.reads is not None and self._is_routed(stack) else None

    def _is_routed(self, stack: Stack) -> bool:
        return routes(stack.model) or routes(self._site.reference)

    def _reads(self, stacks: Sequence[Stack]) -> str | None:
        """What a fit of these stacks says that was read."""
        if not any(map(self._is_routed, stacks)):
            return None
        return RANDOM if self._how.reads is None else self._how.reads().digest

    def _flops(self, stacks: Sequence[Stack]) -> Array:
        """FLOPs of one call at the place."""
        place, found = self._site.place, []
        for stack in stacks:
            cost = plan(stack.model).cost(place.context, place.batch)
            tokens = place.batch * (1 if place.phase == "decode" else place.context)
            found.append(cost[f"{place.phase}_flops_per_token"] * tokens)
        return np.array(found, dtype=float)
