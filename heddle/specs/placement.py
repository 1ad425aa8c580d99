"""Reads the placement of a model's layers, and says what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

from heddle.specs.base import nearest
from heddle.specs.checks import unknown_block
from heddle.specs.explain import meant, shown
from heddle.specs.layer import MAX_LAYERS
from heddle.specs.open_values import PLACEMENT, OpenValues
from heddle.specs.reader import HOLE, MAX_ERRORS, Path_
from heddle.specs.space import Placement

MAX_BLOCKS_PLACED = 16
FIELDS = ("length", "of", "count")
EXAMPLE = "{placement: {length: 12, of: [linear, full], count: {full: {int: [1, 4]}}}}"


def find_placement(found: OpenValues) -> Placement | None:
    """The placement of the model; None if there is none or it is wrong, and then `found` has the findings."""
    if not found.has_placement:
        return None
    model, before = found.document.data["model"], len(found.findings)
    data = _fields(found, model["layers"])
    if data is None:
        return None
    length = _length(found, data["length"]) if "length" in data else None
    of = _names(found, data["of"], model.get("blocks")) if "of" in data else None
    count = data.get("count", {})
    if count is HOLE:
        return None
    if not isinstance(count, dict):
        what = f"expected a mapping of blocks to counts, got {shown(count)}"
        found.fail("wrong-type", what, (*PLACEMENT, "count"), "count: {full: {int: [1, 4]}}")
    if length is None or of is None or len(found.findings) > before:
        return None
    counts = {name: _count(found, name, value, of) for name, value in islice(count.items(), MAX_ERRORS)}
    rest = [name for name in of if name not in count]
    if len(rest) != 1 and len(found.findings) == before:
        told = "every block of it has one" if not rest else f"{', '.join(rest)} have none"
        what = f"one block of `of` has no count and takes the rest, but {told}"
        found.fail("bad-placement", what, (*PLACEMENT, "count" if "count" in data else "of"))
    known = {name: one for name, one in counts.items() if one is not None}
    # A count that is no form is told already, and not known.
    if len(found.findings) > before or len(known) < len(count):
        return None
    _check_room(found, length, known)
    return None if len(found.findings) > before else Placement(length, tuple(of), rest[0], known)


def _fields(found: OpenValues, layers: dict[str, Any]) -> dict[str, Any] | None:
    """The mapping behind `placement`, its field names checked."""
    for key in islice(layers, MAX_ERRORS):
        if key != "placement":
            what = f"there is no field {shown(key)} beside placement"
            found.fail("unknown-field", what, (*PLACEMENT[:-1], key), EXAMPLE, key=True)
    data = layers["placement"]
    if data is HOLE:
        return None
    if not isinstance(data, dict):
        found.fail("wrong-type", f"expected a mapping, got {shown(data)}", PLACEMENT, EXAMPLE)
        return None
    for key in islice(data, MAX_ERRORS):
        if key not in FIELDS:
            what = f"there is no field {shown(key)} in a placement"
            found.fail("unknown-field", what, (*PLACEMENT, key), meant(key, list(FIELDS)), key=True)
    for key in ("length", "of"):
        if key not in data:
            found.fail("missing-field", f"{key!r} is missing", (*PLACEMENT, key), EXAMPLE, key=True)
    return data


def _length(found: OpenValues, length: Any) -> int | None:
    if type(length) is int and 1 <= length <= MAX_LAYERS:
        return length
    if length is HOLE:
        return None
    hint = "search each depth by a file of its own" if isinstance(length, dict) else None
    what = f"length is a whole number from 1 to {MAX_LAYERS:,}, got {shown(length)}"
    found.fail("bad-placement", what, (*PLACEMENT, "length"), hint)
    return None


def _names(found: OpenValues, of: Any, blocks: Any) -> list[str] | None:
    path: Path_ = (*PLACEMENT, "of")
    if of is HOLE or (isinstance(of, list) and HOLE in of):
        return None
    if not isinstance(of, list) or not all(isinstance(name, str) for name in of):
        found.fail(
            "bad-placement", f"`of` is a list of block names, got {shown(of)}", path, "of: [linear, full]"
        )
        return None
    if not 1 <= len(of) <= MAX_BLOCKS_PLACED:
        found.fail("bad-placement", f"`of` has {len(of)} blocks; 1 to {MAX_BLOCKS_PLACED} are allowed", path)
        return None
    known = blocks if isinstance(blocks, dict) else None
    for index, name in enumerate(of):
        if name in of[:index]:
            found.fail("bad-placement", f"{shown(name)} stands here twice", (*path, index), "name it once")
        elif known and name not in known:
            what, hint = unknown_block(name, known)
            found.fail("unknown-block", what, (*path, index), hint)
    return of


def _count(found: OpenValues, name: str, value: Any, of: list[str]) -> int | str | None:
    """The count of a block, or the name of its parameter."""
    path: Path_ = (*PLACEMENT, "count", name)
    if name not in of:
        close = nearest(name, of)
        hint = f"did you mean {close}?" if close else f"`of` has {', '.join(of)}"
        found.fail("bad-placement", f"{shown(name)} is not in `of`", path, hint, key=True)
        return None
    if path in found.broken or value is HOLE:
        return None
    parameter = found.parameters.get(path)
    ends = [value] if parameter is None else list(parameter.choices or (parameter.low, parameter.high))
    ends += [parameter.otherwise] if parameter is not None and parameter.when else []
    is_float = parameter is not None and parameter.kind == "float"
    if is_float or any(type(end) is not int or end < 0 for end in ends):
        what = "a count is a whole number of at least 0, or a range of them"
        found.fail("bad-placement", what, path, "2, or {int: [1, 4]}")
        return None
    return value if parameter is None else parameter.name


def _check_room(found: OpenValues, length: int, counts: Mapping[str, int | str]) -> None:
    """That each count fits beside the smallest ones of the others."""
    by_name = {parameter.name: parameter for parameter in found.parameters.values()}
    least, most = {}, {}
    for name, count in counts.items():
        least[name], most[name] = by_name[count].ends() if isinstance(count, str) else (count, count)
    if sum(least.values()) > length:
        what = f"the counts are at least {sum(least.values())} together, and there are {length} layers"
        found.fail("bad-placement", what, (*PLACEMENT, "count"))
        return
    for name, high in most.items():
        room = length - sum(low for other, low in least.items() if other != name)
        if high > room:
            left = (
                f"{room} layers are left beside the others" if len(most) > 1 else f"there are {length} layers"
            )
            what = f"{shown(name)} may stand {high} times, and {left}"
            found.fail("bad-placement", what, (*PLACEMENT, "count", name))
