"""Whether a model can be trained for the tasks of a search: its kind, and the classes of its readout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from heddle.specs.checks import items_of, tasks_of
from heddle.specs.explain import Finding
from heddle.specs.model_parts import ModelParts
from heddle.specs.reader import Path_
from heddle.specs.tasks import TaskSchema

# Evaluators whose weights or readouts are those of a causal language model.
CAUSAL_EVALUATORS = ("supernet", "reach", "random_features")
KINDS = {"causal_lm": "causal language models", "encoder": "encoders"}


def task_findings(search: Any, model: ModelParts) -> Iterator[Finding]:
    """What a model of these parts cannot be trained for, by path below `search`; nothing of a kind that is not known."""
    if model.kind is None:
        return
    for path, task in tasks_of(search):
        if model.kind != task.model_kind:
            what = f"{task.told} is a task of {KINDS[task.model_kind]}, and model.kind is {model.kind}"
            hint = f"kind: {task.model_kind} in model, or another task"
            yield Finding("conflicting-fields", what, path, hint)
        elif model.kind == "encoder" and not model.findings:
            yield from _readout_findings(task, model.fields, path)
    if model.kind == "encoder":
        yield from _encoder_findings(search)


def _readout_findings(task: TaskSchema, model: Mapping[str, Any], path: Path_) -> Iterator[Finding]:
    readout, needed = model.get("readout"), task.classes(model["vocab_size"])
    if readout is None and task.needs_readout:
        what = f"{task.told} asks for the class of a sequence, and the model has no readout"
        yield Finding("conflicting-fields", what, path, f"readout: {{kind: ep, classes: {needed}}} in model")
    elif readout is not None and readout.classes < needed:
        what = f"{task.told} has {needed} classes, and the readout tells {readout.classes} apart"
        yield Finding("conflicting-fields", what, path, f"classes: {needed} in model.readout")


def _encoder_findings(search: Any) -> Iterator[Finding]:
    """What a search of encoders cannot do."""
    name = search.get("evaluator") if isinstance(search, Mapping) else None
    if name in CAUSAL_EVALUATORS:
        what = f"{name} scores causal language models, and model.kind is encoder"
        yield Finding("conflicting-fields", what, ("evaluator",), "evaluator: train")
    for path, budget in items_of(search, "budgets"):
        if "decode" in (budget.get("phase", "").removesuffix("_ms"), budget.get("of")):
            what = "an encoder decodes nothing, and model.kind is encoder"
            yield Finding("conflicting-fields", what, path, "prefill, a pass over whole sequences")
        elif budget.get("phase") == "cache_bytes":
            what = "an encoder keeps no cache, and model.kind is encoder"
            yield Finding("conflicting-fields", what, path, "peak_bytes, what a pass holds at one time")
