"""The functions of `heddle.api` that measure: a spec, a space by a designed set of its specs, the kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heddle import specs
from heddle.compose.plan import plan
from heddle.errors import HeddleError
from heddle.specs import SpecFile

if TYPE_CHECKING:
    from heddle.kernels.tune import Tuned
    from heddle.search.latency import Effort
    from heddle.search.latency_model.measuring import Site
    from heddle.search.latency_model.model import LatencyModel
    from heddle.search.record import Latency

PHASES = ("prefill", "decode")


def bench(
    path: Path | str, *, context: int | None = None, batch: int = 1, phases: Sequence[str] = PHASES
) -> list[Latency]:
    """The latency of the spec's model on this machine, one row a phase; of an encoder none of decoding.

    Raises:
        HeddleErrors: as `check`; "out-of-memory".
    """
    from heddle.search.latency import measure_spec
    from heddle.search.model_kinds import phases_of

    file = _planned(path)
    model, phases = file.spec.model, phases_of(file, phases)
    return measure_spec(model, batch=batch, context=context or model.context_length, phases=phases)


def bench_fit(
    path: Path | str,
    out: Path | str | None = None,
    *,
    context: int | None = None,
    batch: int = 1,
    phases: Sequence[str] = PHASES,
    stacks: int | None = None,
    seed: int = 0,
    effort: Effort | None = None,
    precision: float | None = None,
    on_stack: Callable[[int, int, bool], None] = lambda *_: None,
) -> tuple[LatencyModel, Path]:
    """Measure a designed set of stacks of the spec's space on this machine, and fit a latency model; gives it and its file.

    Fitted are the places of the spec's latency budgets; with `context`, or without such budgets, `phases` at `batch` and
    `context`. What routes by what tokens say reads those of the task that a search of the spec exports, where it has a `search`,
    else random ones. `stacks` are measured to fit on, by default three for each coefficient, and 30 held out to tell the error.
    `precision` is the width of a 95 % interval over its median that a timing stops at, where `effort` does not say it all.
    Where the model is kept a search with `latency: model` finds it; it is written to `out` as well.

    Raises:
        HeddleErrors: as `check`; "bad-argument" for a space too small to fit, "out-of-memory", "disk-full".
    """
    from heddle.search import environment
    from heddle.search.latency import Effort as Usual
    from heddle.search.latency_model import find
    from heddle.search.latency_model.measuring import How, fit_model
    from heddle.search.model_kinds import phases_of
    from heddle.search.objectives import asked_of

    file, device = _planned(path), environment.pick_device()
    if not file.space.parameters and file.space.placement is None:
        hint = "heddle bench SPEC times it"
        raise HeddleError(
            "bad-argument", f"{path} leaves nothing open: there is nothing to predict", hint=hint
        )
    sites = [] if context is not None else _budgeted(file, device)
    sites = sites or _given(file, batch, context or file.spec.model.context_length, phases_of(file, phases))
    usual = effort or Usual()
    # Read once, and only where something routes.
    reads = None if file.spec.search is None else cache(lambda: asked_of(file).read)
    how = How(device, usual if precision is None else usual.to(precision), None, on_stack, reads)
    model = fit_model(file, sites, stacks=stacks, seed=seed, how=how)
    kept = find.kept_at(file, model.environment)
    model = find.keep(model, kept)
    if out is not None:
        model.save(Path(out))
    return model, kept if out is None else Path(out)


def bench_ops() -> list[dict[str, Any]]:
    """The speed of each op on this machine: a benchmark row for each phase, shape and implementation."""
    from heddle.kernels.bench import bench_ops as time_ops

    return time_ops()


def bench_tune(
    names: Sequence[str] | None = None, *, report: Callable[[str], None] = lambda _: None
) -> tuple[list[Tuned], Path]:
    """Search faster launches of the ops named, or of all that have a table of them, on the GPU of this machine; gives what was
    found and the file that keeps it, from which every later process takes them.

    `report` is told of each try, a line each.

    Raises:
        HeddleError: "bad-argument" without a CUDA device, or for an op without launches to tune.
    """
    from heddle.kernels.configs.found import launches_file
    from heddle.kernels.tune import tune

    return tune(names, report=report), launches_file()


def _planned(path: Path | str) -> SpecFile:
    """The spec in `path`, read and planned."""
    file = specs.load(path)
    plan(file.spec.model, where=file.where)
    return file


def _budgeted(file: SpecFile, device: str) -> list[Site]:
    """The places of the latency budgets, each beside the model it is relative to; one of several at a place."""
    from heddle.search import space
    from heddle.search.latency import Place
    from heddle.search.latency_model.measuring import Site
    from heddle.search.limits import budgets_on

    found: dict[tuple[Place, str | None], Site] = {}
    for budget in () if file.spec.search is None else budgets_on(file, device):
        if not budget.is_timed:
            continue
        place, name = Place(budget.phase, budget.batch, budget.context), budget.relative_to
        model = file.spec.model if name is None else space.reference(file, name).model
        site = Site(place, model, name or "the defaults", budget.at_most, name is not None)
        found.setdefault((place, name), site)
    return list(found.values())


def _given(file: SpecFile, batch: int, context: int, phases: Sequence[str]) -> list[Site]:
    from heddle.search.latency import Place
    from heddle.search.latency_model.measuring import Site

    return [Site(Place(phase, batch, context), file.spec.model, "the defaults") for phase in phases]
