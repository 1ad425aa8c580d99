"""What a schema cannot say: sizes that must fit each other, and names that must exist."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from typing import Any

from pydantic import ValidationError

from heddle.specs.base import NAME_HINT, NAME_PATTERN, nearest
from heddle.specs.constant_stream import encoder_problems
from heddle.specs.explain import Finding, meant, shown
from heddle.specs.kinds import MixerSpec, Problem
from heddle.specs.layer import MAX_LAYERS, Site
from heddle.specs.model import BlockSpec
from heddle.specs.model_kind import causality_problems
from heddle.specs.open_values import RESERVED
from heddle.specs.pattern import Layer, layers_of
from heddle.specs.reader import MAX_ERRORS, Path_, steps_of
from heddle.specs.references import EMBEDDING, references_of
from heddle.specs.search import EVALUATORS, OF_ANSWERS, OWN_EVALUATOR, names_file
from heddle.specs.sight import reach
from heddle.specs.spec import Spec
from heddle.specs.tasks import TASKS, TaskSchema

# Token ids of the bytes tokenizer.
BYTES = 256
# Tasks that are not scored by right and wrong answers.
WITHOUT_ANSWERS = ("text", "masked_bytes", "in_context_regression")
# Levels of mixers in a layer: one that holds one that holds one that holds plain ones.
MAX_NESTING = 4


def block_problems(block: BlockSpec, hidden_size: int, kind: str | None) -> list[tuple[str, Problem]]:
    """What cannot be built of a block in a model of `kind`, beside the part it is in: mixer or channel."""
    too_deep = next(nesting_problems(block.mixer), None)
    if too_deep is not None:
        return [("mixer", too_deep)]
    site = Site(hidden_size)
    found = [("mixer", problem) for problem in block.mixer.problems(site)]
    if kind is not None:
        of_kind = causality_problems if kind == "causal_lm" else encoder_problems
        found += [
            ("mixer", replace(one, field=one.field.removeprefix("mixer."))) for one in of_kind(block.mixer)
        ]
    found += [("channel", problem) for problem in block.channel.problems(site)]
    for part in ("residual", "channel_residual"):
        residual = getattr(block, part)
        if residual is not None and residual.of == "normed" and block.norm_placement == "post":
            what = "there is no norm before the part when norms stand after it"
            problem = Problem("of", what, "norm_placement: pre, or of: stream", "conflicting-fields")
            found.append((part, problem))
    return found


def nesting_problems(mixer: MixerSpec, path: str = "", depth: int = 1) -> Iterator[Problem]:
    """Mixers inside mixers inside mixers, more levels than a layer has use for."""
    for name, part in mixer.parts().items():
        if depth == MAX_NESTING:
            what = f"mixers nested deeper than {MAX_NESTING} levels"
            yield Problem(f"{path}{name}", what, "several layers, or one mixer with more parts", "too-deep")
            return
        yield from nesting_problems(part, f"{path}{name}.", depth + 1)


def block_findings(block: BlockSpec, hidden_size: int, kind: str | None) -> list[Finding]:
    """The same as findings, by path below the block."""
    return [
        Finding(problem.code, problem.what, (part, *steps_of(problem.field)), problem.hint)
        for part, problem in block_problems(block, hidden_size, kind)
    ]


def name_findings(names: Iterable[str]) -> list[Finding]:
    """Names that blocks cannot have, by path below `blocks`."""
    found = []
    for name in islice(names, MAX_ERRORS):
        if name in (*RESERVED, EMBEDDING):
            what = f"{name} is a word of the language, not a block's name"
            found.append(Finding("out-of-range", what, (name,), "give the block another name", key=True))
        elif not re.fullmatch(NAME_PATTERN, name):
            found.append(
                Finding("out-of-range", f"{shown(name)} is not a block's name", (name,), NAME_HINT, key=True)
            )
    return found


def layer_findings(layers: Sequence[Any], blocks: Mapping[str, Any]) -> list[Finding]:
    """Layers that name no block, and too many layers, by path below `layers`; what is no layer at all is passed over."""
    found = list(_name_findings(layers, blocks))
    count = 0
    for index, item in enumerate(layers):
        if isinstance(item, Mapping) and "block" in item:
            named: list[tuple[Path_, Any]] = [((index, "block"), item["block"])]
            count += 1
        elif isinstance(item, Mapping):
            pattern, repeat = item.get("pattern"), item.get("repeat")
            names = pattern if isinstance(pattern, list) else []
            named = [((index, "pattern", place), name) for place, name in enumerate(names)]
            count += len(named) * (repeat if type(repeat) is int else 1)
        else:
            named, count = [((index,), item)], count + 1
        for path, name in named:
            if isinstance(name, str) and name not in blocks and len(found) < MAX_ERRORS:
                what, hint = unknown_block(name, blocks)
                found.append(Finding("unknown-block", what, path, hint))
    if count > MAX_LAYERS:
        found.append(Finding("out-of-range", f"{count:,} layers; at most {MAX_LAYERS:,}", ()))
    return found


def _name_findings(layers: Sequence[Any], blocks: Mapping[str, Any]) -> Iterator[Finding]:
    """Names of layers that are a block's already, or another layer's."""
    first: dict[str, int] = {}
    for index, item in enumerate(layers):
        name = item.get("name") if isinstance(item, Mapping) else None
        if not isinstance(name, str):
            continue
        owner = f"layers.{first[name]}" if name in first else "a block" if name in blocks else None
        if owner is not None or name == EMBEDDING:
            what = f"{shown(name)} is the name of {owner or 'the embedded tokens'} already"
            yield Finding("duplicate-name", what, (index, "name"), "give the layer another name")
        first.setdefault(name, index)


def unknown_block(name: str, blocks: Sequence[str] | Mapping[str, Any]) -> tuple[str, str]:
    """Words and hint for a block that is not defined."""
    close = nearest(name, blocks)
    hint = f"did you mean {close}?" if close else f"the blocks are {', '.join(list(blocks)[:20])}"
    return f"there is no block {shown(name)}", hint


def vocabulary_findings(vocab_size: int, tokenizer: object, search: Any) -> list[Finding]:
    """A vocabulary too small for the tokenizer or a task."""
    if tokenizer == "bytes" and vocab_size < BYTES:
        what = f"{vocab_size} is too small for the bytes tokenizer, which has {BYTES} tokens"
        return [Finding("tokenizer-mismatch", what, (), f"vocab_size: {BYTES}")]
    most = max((task for _, task in tasks_of(search)), key=lambda task: task.ids, default=None)
    if most is not None and most.ids > vocab_size:
        what = f"{vocab_size} is too small for {most.told}, which needs {most.ids} tokens"
        return [Finding("out-of-range", what, (), f"vocab_size: {most.ids}, or {most.fewer}")]
    return []


def search_findings(search: Any, blocks: Mapping[str, Any], *, is_open: bool) -> list[Finding]:
    """What does not hold in a `search` in full (see `short_forms`), by path below it."""
    found = []
    for path, task in tasks_of(search):
        found += [
            Finding("out-of-range", what, (*path, field), hint) for field, what, hint in task.all_misfits()
        ]
    for path, budget in items_of(search, "budgets"):
        name = budget.get("relative_to")
        if isinstance(name, str) and blocks and not names_file(name):
            found += [one.below((*path, "relative_to")) for one in _relative_findings(name, blocks)]
    if isinstance(search, Mapping):
        found += _evaluator_findings(search.get("evaluator"), [task for _, task in items_of(search, "tasks")])
    if isinstance(search, Mapping) and "latency_model" in search and search.get("latency") != "model":
        what, hint = "there is a latency model, and latency is not model", "latency: model"
        found.append(Finding("conflicting-fields", what, ("latency_model",), hint))
    if isinstance(search, Mapping) and not is_open and search.get("trials") != 1:
        what = "there is nothing to search: the model leaves nothing open"
        hint = "put a choice, int, float or placement inside model; heddle train takes a plain model"
        found.append(Finding("bad-space", what, (), hint, key=True))
    return found


def _evaluator_findings(name: object, tasks: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    """An evaluator that there is not, or that cannot score a task."""
    if not isinstance(name, str) or re.fullmatch(OWN_EVALUATOR, name):
        return
    if name not in EVALUATORS:
        hint = meant(name, list(EVALUATORS)) or f"{', '.join(EVALUATORS)}, or module:function"
        yield Finding("unknown-kind", f"there is no evaluator {shown(name)}", ("evaluator",), hint)
    elif name in OF_ANSWERS:
        for kind in (task["kind"] for task in tasks if task["kind"] in WITHOUT_ANSWERS):
            what = f"{name} scores right and wrong answers, and {kind} has none"
            yield Finding("conflicting-fields", what, ("evaluator",), f"evaluator: train, or no {kind} task")
            return


def reach_problems(spec: Spec) -> Iterator[tuple[Path_, str, str]]:
    """Tasks that ask for what stands further back than any layer carries it: path in the file, words and hint."""
    if spec.search is None:
        return
    model = spec.model
    site = Site(model.hidden_size, 0, 1, model.norm_eps, model.context_length)
    seen = reach(layers_of(model), site)
    for index, task in enumerate(spec.search.tasks):
        if seen is not None and seen < task.back:
            what = f"the layers together see {seen} tokens back, and {task.kind} asks for what stood up to {task.back} back"
            yield ("search", "tasks", index), what, "a wider window, one layer without, or more layers"


def risk_problems(mixer: MixerSpec, path: str = "") -> Iterator[Problem]:
    """What may go wrong of a mixer and of those that it is made of, by path inside it."""
    yield from (replace(one, field=f"{path}{one.field}") for one in mixer.risks())
    for name, part in mixer.parts().items():
        yield from risk_problems(part, f"{path}{name}.")


def items_of(search: Any, key: str) -> Iterator[tuple[Path_, Mapping[str, Any]]]:
    """The mappings in a list of `search`, each with its path below it."""
    items = search.get(key) if isinstance(search, Mapping) else None
    for index, item in enumerate(items[:MAX_ERRORS] if isinstance(items, list) else []):
        if isinstance(item, Mapping):
            yield (key, index), item


def tasks_of(search: Any) -> Iterator[tuple[Path_, TaskSchema]]:
    """The tasks, of all rungs, whose fields are all of their types; of the others the schema tells."""
    for path, task in items_of(search, "tasks"):
        with suppress(ValidationError):
            yield path, TASKS[task["kind"]].model_validate(task)
    rungs = search.get("rungs") if isinstance(search, Mapping) else None
    for at, rung in items_of(rungs, "before"):
        for path, own in tasks_of({"tasks": rung.get("tasks")}):
            yield ("rungs", *at, *path), own


def _lonely_findings(name: str, blocks: Mapping[str, Any]) -> Iterator[Finding]:
    """What a model of one block alone would take from layers that it has not."""
    block = blocks[name]
    if block is None:
        return
    for one in references_of(Layer(0, name, None, block)):
        if one.name != EMBEDDING:
            what = f"a model of {name!r} alone has no earlier layer to take {one.what} from"
            yield Finding("reference-direction", what, (), "name a block that stands by itself")


def _relative_findings(name: str, blocks: Mapping[str, Any]) -> list[Finding]:
    known = [f"all-{block}" for block in blocks]
    if name in known:
        return list(_lonely_findings(name.removeprefix("all-"), blocks))
    close = f"all-{name}" if name in blocks else nearest(name, known)
    hint = f"did you mean {close}?" if close else f"one of {', '.join(known[:20])}"
    return [
        Finding(
            "unknown-block",
            f"{shown(name)} names no model; it is all-, then a block, or a spec file",
            (),
            hint,
        )
    ]
