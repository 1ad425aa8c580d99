"""Tasks and budgets as users write them, `text` or `decode_ms: {…}`, brought to the one form the schema knows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from heddle.specs.explain import Finding, meant, shown
from heddle.specs.reader import HOLE, Path_
from heddle.specs.search import BUDGETS
from heddle.specs.tasks import TASKS


def full_search(search: Any) -> tuple[Any, list[Finding], dict[Path_, Path_]]:
    """`search` with tasks and budgets in full; what is wrong with their form; where their fields stand in the file.

    Paths are below `search`.
    """
    found: list[Finding] = []
    moves: dict[Path_, Path_] = {}
    if not isinstance(search, dict):
        return search, found, moves
    made = dict(search)
    for key, tag, names in (("tasks", "kind", tuple(TASKS)), ("budgets", "phase", tuple(BUDGETS))):
        if isinstance(search.get(key), list):
            made[key] = _all_full(search[key], (tag, names), (key,), found, moves)
    rungs = search.get("rungs")
    if isinstance(rungs, dict) and isinstance(rungs.get("before"), list):
        made["rungs"] = {**rungs, "before": list(rungs["before"])}
        for index, rung in enumerate(rungs["before"]):
            if isinstance(rung, dict) and isinstance(rung.get("tasks"), list):
                path = ("rungs", "before", index, "tasks")
                full = _all_full(rung["tasks"], ("kind", tuple(TASKS)), path, found, moves)
                made["rungs"]["before"][index] = {**rung, "tasks": full}
    return made, found, moves


def _all_full(
    items: Sequence[Any],
    of: tuple[str, Sequence[str]],
    below: Path_,
    found: list[Finding],
    moves: dict[Path_, Path_],
) -> list[Any]:
    """The items of the list at `below` in full, by (tag, names); what is wrong goes to `found`, places to `moves`."""
    made: list[Any] = []
    tag, names = of
    for index, item in enumerate(items):
        if item is HOLE or (isinstance(item, dict) and HOLE in item.values()):
            made.append(HOLE)
            continue
        full = _full(item, tag, names)
        path = (*below, index)
        if isinstance(full, Finding):
            found.append(full.below(path))
            made.append(HOLE)
            continue
        if isinstance(item, dict):
            moves[path] = (*path, full[tag])
        made.append(full)
    return made


def _full(item: Any, tag: str, names: Sequence[str]) -> dict[str, Any] | Finding:
    is_task = tag == "kind"
    word = "task" if is_task else "budget"
    example = "mqar, or {mqar: {pairs: 8}}" if is_task else "{decode_ms: {at_most: 20, context: 8192}}"
    if isinstance(item, str) and is_task:
        return (
            {tag: item}
            if item in names
            else Finding("unknown-kind", f"there is no task {item!r}", (), meant(item, list(names)))
        )
    if not isinstance(item, dict) or len(item) != 1:
        got = f"a mapping of {len(item)}" if isinstance(item, dict) else shown(item)
        return Finding("wrong-type", f"a {word} is written {example}; this is {got}", ())
    name, fields = next(iter(item.items()))
    if name not in names:
        return Finding(
            "unknown-kind", f"there is no {word} {shown(name)}", (name,), meant(name, list(names)), key=True
        )
    # `- text:` with nothing behind it is a text task without fields.
    fields = {} if fields is None and is_task else fields
    if not isinstance(fields, dict):
        return Finding("wrong-type", f"expected a mapping, got {shown(fields)}", (name,), example)
    if tag in fields:
        return Finding("unknown-field", f"there is no field {tag!r} here", (name, tag), key=True)
    return {tag: name, **fields}
