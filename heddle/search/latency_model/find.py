"""Where the latency model of a space is kept, and the one that a search goes by.

`heddle bench SPEC --fit` keeps its model in the user's cache under the space and the machine with its software. The file has a
fit for each place and reference, and, where models have routers, for each task whose tokens they read.
A search copies the model that it found into its run folder, and goes by that copy from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heddle.errors import HeddleError
from heddle.kernels.configs.found import cache_folder
from heddle.search import space
from heddle.search.latency import Place
from heddle.search.latency_model.model import LatencyModel, PlaceFit, from_data, load_model
from heddle.search.latency_model.table import MACHINE
from heddle.search.ledger import key_of
from heddle.search.results import BudgetInfo
from heddle.specs import SpecFile

if TYPE_CHECKING:
    from heddle.search.latency_model.sentinels import Verdict

RUN_COPY = "latency_model.json"


def kept_at(file: SpecFile, made_with: Mapping[str, Any], folder: Path | None = None) -> Path:
    """The file in the cache for the model of this space on this machine."""
    space = {
        "model": file.spec.model.model_dump(mode="json"),
        "parameters": repr([asdict(parameter) for parameter in file.space.parameters]),
        "placement": repr(file.space.placement),
        "environment": dict(made_with),
    }
    root = cache_folder() if folder is None else folder
    return root / "latency" / "models" / f"{key_of(space)}.json"


def keep(model: LatencyModel, path: Path) -> LatencyModel:
    """Write `model` to `path`, together with fits of other places, references or tokens that are there already; gives what was
    written.

    Raises:
        HeddleError: "disk-full".
    """
    try:
        before = load_model(path)
    except HeddleError:
        before = None
    if before is not None and before.environment == model.environment:
        fitted = {(one.place, one.reference_hash, one.reads) for one in model.fits}
        others = [one for one in before.fits if (one.place, one.reference_hash, one.reads) not in fitted]
        labels = {**before.labels, **model.labels}
        model = LatencyModel(model.name, model.environment, labels, (*model.fits, *others))
    model.save(path)
    return model


def into_run(
    file: SpecFile,
    run: Path,
    made_with: Mapping[str, Any],
    meta: Mapping[str, Any],
    judge: Callable[[LatencyModel], list[Verdict]],
    *,
    reads: str,
    kept: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Put the model that the search of `file` goes by into the folder `run`; gives what run.json, so far `meta`, says of it.

    It is `kept`, the data of a lockfile's, as they stand. Else it is the run's own, or where that has none the one that the spec
    names, or the cache's, without fits for which models with routers read other tokens than those of the task of digest `reads`.
    Fitted with other software than `made_with` it keeps the margins that `judge` trusts alone: without one it predicts, and rules
    nothing out. What was judged with that software before is not judged again.

    Raises:
        HeddleError: "latency-model" where there is none, or it is another machine's; "file-not-found", "disk-full".
    """
    changed: dict[str, Any] = {}
    told_by = meta.get("latency_sentinels", {})
    if kept is not None:
        model = from_data(kept)
    else:
        model = of_run(run) if "latency_model" in meta else _asked(file, made_with, reads)
        changed = _changed(model, made_with)
        if changed and told_by.get("environment") != key_of(made_with):
            verdicts = judge(model)
            told_by = {"environment": key_of(made_with), "places": [one.data() for one in verdicts]}
            model = _trusted(model, {(one.place, one.reference_hash) for one in verdicts if one.is_trusted})
    model.save(run / RUN_COPY)
    timed = (budget for budget in meta["budgets"] if BudgetInfo(**budget).is_timed)
    told = [found for budget in timed if (found := _told(file, model, budget)) is not None]
    changed = changed or meta.get("latency_changed", {})
    return {"latency_model": told, "latency_changed": changed, "latency_sentinels": told_by}


def _changed(model: LatencyModel, made_with: Mapping[str, Any]) -> dict[str, Any]:
    """The software that a model was fitted with otherwise than `made_with`: {name: [then, now]}."""
    pairs = {
        name: [model.environment.get(name), made_with.get(name)]
        for name in dict.fromkeys([*model.environment, *made_with])
        if name not in MACHINE
    }
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _trusted(model: LatencyModel, kept: Collection[tuple[Place, str]]) -> LatencyModel:
    """`model` with the margins of the fits at these places beside these references alone."""
    fits = (
        fit
        if (fit.place, fit.reference_hash) in kept
        else replace(fit, held_out=replace(fit.held_out, margin=None))
        for fit in model.fits
    )
    return replace(model, fits=tuple(fits))


def _asked(file: SpecFile, made_with: Mapping[str, Any], reads: str) -> LatencyModel:
    """The model that the spec names, or the cache's, if it is of this machine; without fits for other tokens than `reads`."""
    search = file.spec.search
    assert search is not None
    named = search.latency_model
    path = kept_at(file, made_with) if named is None else Path(file.file or "").parent / named
    where = file.where("search.latency" if named is None else "search.latency_model")
    hint = f"heddle bench {file.file or 'SPEC'} --fit makes one"
    if not path.exists():
        what = (
            "no latency model was fitted for this space on this machine"
            if named is None
            else f"no file {path}"
        )
        raise HeddleError("latency-model", what, where=where, hint=hint)
    try:
        model = load_model(path)
    except HeddleError as error:
        raise HeddleError("latency-model", f"{path}: {error.what}", where=where, hint=hint) from None
    for name in MACHINE:
        theirs, ours = model.environment.get(name), made_with.get(name)
        if theirs != ours:
            what = f"{path} was fitted with {name} {theirs}, and here it is {ours}"
            raise HeddleError("latency-model", what, where=where, hint=hint)
    fits = tuple(fit for fit in model.fits if fit.reads in (None, reads))
    if not fits:
        what = f"{path} was fitted to models that read other tokens than those of the task that is exported"
        raise HeddleError("latency-model", what, where=where, hint=hint)
    return replace(model, fits=fits)


def _told(file: SpecFile, model: LatencyModel, budget: Mapping[str, Any]) -> dict[str, Any] | None:
    """The fit for a budget in figures; None where the model has none."""
    beside = budget["relative_to"]
    reference = None if beside is None else space.reference(file, beside).hash
    fit = model.at(Place(budget["phase"], budget["batch"], budget["context"]), reference)
    if fit is None:
        return None
    names = {"label": budget["label"], "reference": fit.reference, "method": fit.method}
    # The fit may have been made under another budget.
    limit = budget["at_most"] * (1.0 if beside is None else fit.reference_ms)
    return {
        **names,
        "way": fit.sum.way.told,
        "measured": fit.measured,
        "held_out": asdict(fit.held_out.near(limit)),
        "timings": _timings(fit),
    }


def _timings(fit: PlaceFit) -> dict[str, Any] | None:
    return None if fit.timings is None else asdict(fit.timings)


def of_run(run: Path) -> LatencyModel:
    """The model that the search in `run` goes by. Raises HeddleError "latency-model", "file-not-found"."""
    return load_model(run / RUN_COPY)
