"""Checks a document as a spec, in parts, so that an error in one part hides none in another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from heddle.errors import HeddleError, HeddleErrors
from heddle.specs.base import Schema
from heddle.specs.check_options import Context, option_findings
from heddle.specs.check_references import arranged
from heddle.specs.check_rungs import rung_findings
from heddle.specs.check_sampler import sampler_findings
from heddle.specs.check_tasks import task_findings
from heddle.specs.check_training import training_findings
from heddle.specs.checks import reach_problems, risk_problems, search_findings, vocabulary_findings
from heddle.specs.explain import Finding, check_fields, shown, without_echoes
from heddle.specs.migrate import migrated
from heddle.specs.model import ModelSpec
from heddle.specs.model_parts import ModelParts, check_parts
from heddle.specs.open_values import MODEL, OpenValues, find_open_values
from heddle.specs.pattern import expand_layers
from heddle.specs.placement import find_placement
from heddle.specs.places import Places
from heddle.specs.reader import HOLE, MAX_ERRORS, Document, Path_, steps_of
from heddle.specs.recipe import DataSpec, TrainSpec
from heddle.specs.search import SearchSpec
from heddle.specs.short_forms import full_search
from heddle.specs.spec import Spec

SECTIONS: tuple[tuple[str, type[Schema]], ...] = (
    ("model", ModelSpec),
    ("data", DataSpec),
    ("train", TrainSpec),
)


@dataclass(frozen=True, slots=True)
class Checked:
    """A file without errors."""

    spec: Spec
    warnings: tuple[HeddleError, ...]
    open: OpenValues
    places: Places


def check_file(document: Document) -> Checked:
    """The spec of a document, its open values at their defaults.

    Raises:
        HeddleErrors: all there are, sorted by place.
    """
    _check_mapping(document)
    document, wrong_version = migrated(document)
    found = find_open_values(document)
    found.placement = find_placement(found)
    moves: dict[Path_, Path_] = {}
    data = document.data
    search, findings, search_moves = full_search(data.get("search"))
    findings = [*wrong_version, *(one.below(("search",)) for one in findings)]
    moves |= {("search", *path): ("search", *source) for path, source in search_moves.items()}
    fields, wrong = check_fields(
        Spec, data if search is None else {**data, "search": search}, leave=("model",)
    )
    findings += [_with_home(one) for one in wrong]
    parts = ModelParts({}, {}, None, [])
    context = Context(search, data.get("tokenizer", Spec.model_fields["tokenizer"].default))
    if "model" in data:
        model = found.fill_model(found.space.defaults(), arranged(found, {}), moves)
        parts = check_parts(model, has_layers=not found.has_placement or found.placement is not None)
        findings += [one.below(MODEL) for one in parts.findings]
    else:
        findings.append(
            Finding("missing-field", "'model' is missing", MODEL, "model: what is built", key=True)
        )
    findings += _across(found, parts, context)
    train = fields.get("train", None if "train" in data else TrainSpec())
    if isinstance(fields.get("search"), SearchSpec) and train is not None:
        findings += [one.below(("search",)) for one in rung_findings(fields["search"], train)]
    if isinstance(fields.get("search"), SearchSpec):
        findings += [one.below(("search",)) for one in training_findings(fields["search"])]
    if isinstance(fields.get("search"), SearchSpec) and not found.findings:
        findings += [one.below(("search",)) for one in sampler_findings(fields["search"], found.space)]
    places = found.places(moves)
    # These speak of the file as it is, the others of the data that was made of it.
    in_file = without_echoes(found.findings) + option_findings(found, parts, context)
    if findings or in_file or document.errors:
        errors = [*map(places.error, without_echoes(findings)), *map(found.places({}).error, in_file)]
        raise HeddleErrors(_sorted([*document.errors, *errors]))
    # Each part of it is checked; to check the whole again would take as long.
    spec = Spec.model_construct(**fields, model=_model(parts))
    return Checked(spec, tuple(_warnings(found, spec, places)), found, places)


def check_model(model: Any, places: Places) -> ModelSpec:
    """The model in resolved data.

    Raises:
        HeddleErrors: all there are.
    """
    parts = check_parts(model, has_layers=True)
    if parts.findings:
        raise HeddleErrors(_sorted([places.error(one.below(MODEL)) for one in parts.findings]))
    return _model(parts)


def _model(parts: ModelParts) -> ModelSpec:
    """The model of parts that nothing is wrong with."""
    blocks = {name: block for name, block in parts.blocks.items() if block is not None}
    assert parts.layers is not None
    return ModelSpec.model_construct(**parts.fields, blocks=blocks, layers=parts.layers)


def _check_mapping(document: Document) -> None:
    """Of what is no mapping nothing else can be said."""
    data = document.data
    if isinstance(data, dict):
        return
    errors = list(document.errors)
    if data is not HOLE:
        got = "the file is empty" if data is None else f"this is {shown(data)}"
        where = document.where(())
        told = HeddleError(
            "wrong-type", f"a spec is a mapping, and {got}", where=where, hint="heddle init writes one"
        )
        errors.append(told)
    raise HeddleErrors(errors)


def _with_home(finding: Finding) -> Finding:
    """Of an unknown top-level field, the section it belongs to."""
    if finding.code != "unknown-field" or len(finding.path) != 1 or "did you mean" in (finding.hint or ""):
        return finding
    home = next((name for name, schema in SECTIONS if finding.path[0] in schema.model_fields), None)
    return (
        finding
        if home is None
        else Finding(finding.code, finding.what, finding.path, f"it belongs in {home}", key=True)
    )


def _across(found: OpenValues, parts: ModelParts, context: Context) -> Iterator[Finding]:
    """What must hold between the model and the other sections."""
    if "vocab_size" in parts.fields:
        for one in vocabulary_findings(parts.fields["vocab_size"], context.tokenizer, context.search):
            yield one.below((*MODEL, "vocab_size"))
    if (*MODEL, "kind") in found.parameters:
        what = "the kind of a model cannot be left open: its tasks and its head depend on it"
        yield Finding("bad-space", what, (*MODEL, "kind"), "causal_lm or encoder")
    for path in ((*MODEL, "readout"), (*MODEL, "readout", "classes")):
        if path in found.parameters and context.search is not None:
            what = "a search cannot leave the readout's classes open: its tasks depend on them"
            yield Finding("bad-space", what, path, "one readout; its queries may be open")
    for one in task_findings(context.search, parts):
        yield one.below(("search",))
    is_open = bool(found.parameters or found.findings or found.has_placement)
    for one in search_findings(context.search, parts.blocks, is_open=is_open):
        yield one.below(("search",))


def _sorted(errors: list[HeddleError]) -> list[HeddleError]:
    unique = {(error.code, error.where, error.what): error for error in errors}
    by_place = sorted(unique.values(), key=lambda error: (error.where.line or 0, error.where.column or 0))
    return by_place[:MAX_ERRORS]


def _warnings(found: OpenValues, spec: Spec, places: Places) -> Iterator[HeddleError]:
    used = set(expand_layers(spec.model))
    if found.placement is not None:
        used.update(found.placement.of)
    if spec.search is not None:
        used.update((budget.relative_to or "").removeprefix("all-") for budget in spec.search.budgets)
    for parameter in found.parameters.values():
        # A choice inside the layers may bring any block in.
        if parameter.name.startswith("layers."):
            used.update(str(choice) for choice in parameter.choices)
    for path, what, hint in reach_problems(spec):
        yield HeddleError("reach-too-short", what, where=places.where(path), hint=hint)
    for name, block in spec.model.blocks.items():
        if name not in used:
            where = places.where((*MODEL, "blocks", name), key=True)
            yield HeddleError(
                "unused-block", f"no layer uses the block {name!r}", where=where, hint="remove it, or use it"
            )
            continue
        for one in risk_problems(block.mixer):
            where = places.where((*MODEL, "blocks", name, "mixer", *steps_of(one.field)))
            yield HeddleError(one.code, one.what, where=where, hint=one.hint)
