"""A model checked part by part: each scalar, each block, the layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from heddle.specs.checks import block_findings, layer_findings, name_findings
from heddle.specs.constant_stream import token_problems
from heddle.specs.explain import Finding, check_field, check_fields, check_schema, missing, shown
from heddle.specs.layer import OneLayer, Repeat
from heddle.specs.model import MAX_BLOCKS, BlockSpec, ModelSpec
from heddle.specs.model_kind import readout_problems
from heddle.specs.pattern import overridden
from heddle.specs.reader import HOLE, MAX_ERRORS, Path_, steps_of

PARTS = ("blocks", "layers")


@dataclass(frozen=True, slots=True)
class ModelParts:
    """The valid parts of a model (of an invalid block the name alone), and what is wrong, by path below `model`.

    `kind` is that of the model, None if it is not known.
    """

    fields: Mapping[str, Any]
    blocks: Mapping[str, BlockSpec | None]
    layers: list[str | Repeat | OneLayer] | None
    findings: list[Finding]
    kind: str | None = None


def check_parts(model: Any, *, has_layers: bool) -> ModelParts:
    """`model` is resolved data; without `has_layers` the layers are not looked at."""
    if not isinstance(model, Mapping):
        wrong = (
            [] if model is HOLE else [Finding("wrong-type", f"expected a mapping, got {shown(model)}", ())]
        )
        return ModelParts({}, {}, None, wrong)
    fields, found = check_fields(ModelSpec, model, leave=PARTS)
    for name in PARTS:
        if name not in model and (name != "layers" or has_layers):
            found.append(missing(name, ModelSpec))
    known = fields if "kind" in model else {**fields, "kind": ModelSpec.model_fields["kind"].default}
    blocks, wrong = check_blocks(model.get("blocks", HOLE), known)
    found += wrong
    found += [
        Finding(one.code, one.what, steps_of(one.field), one.hint)
        for one in (*readout_problems(known), *token_problems(known))
    ]
    layers = None
    if has_layers and "layers" in model:
        layers, wrong = check_layers(model["layers"], blocks)
        found += wrong
        found += override_findings(model["layers"], model.get("blocks"), blocks, known)
    return ModelParts(fields, blocks, layers, found, known.get("kind"))


def check_blocks(data: Any, fields: Mapping[str, Any]) -> tuple[dict[str, BlockSpec | None], list[Finding]]:
    """Each block by itself, in a model of these fields; findings by path below `model`."""
    at: Path_ = ("blocks",)
    if data is HOLE:
        return {}, []
    if not isinstance(data, Mapping) or not data:
        got = "there are none" if data in ({}, None) else f"got {shown(data)}"
        hint = "blocks: {full: {mixer: {kind: attention, heads: 4}, channel: {kind: swiglu}}}"
        return {}, [Finding("wrong-type", f"blocks are a mapping of names to blocks; {got}", at, hint)]
    if len(data) > MAX_BLOCKS:
        return dict.fromkeys(data), [
            Finding("out-of-range", f"{len(data):,} blocks; at most {MAX_BLOCKS}", at)
        ]
    found = [one.below(at) for one in name_findings(data)]
    blocks: dict[str, BlockSpec | None] = {}
    for name, value in data.items():
        if len(found) > MAX_ERRORS:
            return {**dict.fromkeys(data), **blocks}, found
        blocks[name], wrong = check_block(value, fields)
        found += [one.below((*at, name)) for one in wrong]
    return blocks, found


def check_block(data: Any, fields: Mapping[str, Any]) -> tuple[BlockSpec | None, list[Finding]]:
    """One block of a model of these fields; findings by path below it. Without a hidden size, sizes are not compared."""
    block, found = check_schema(BlockSpec, data, "block")
    if block is HOLE:
        return None, found
    hidden_size = fields.get("hidden_size")
    return block, [] if hidden_size is None else block_findings(block, hidden_size, fields.get("kind"))


def override_findings(
    layers: Any, data: Any, blocks: Mapping[str, BlockSpec | None], fields: Mapping[str, Any]
) -> list[Finding]:
    """What is wrong with the overrides of single layers, by path below `model`; `data` is that of the blocks."""
    found: list[Finding] = []
    for index, item in enumerate(layers if isinstance(layers, list) else []):
        override = item.get("override") if isinstance(item, Mapping) else None
        name = item.get("block") if isinstance(item, Mapping) else None
        # What is wrong with the block itself is told there.
        if not isinstance(override, Mapping) or not override or blocks.get(str(name)) is None:
            continue
        at: Path_ = ("layers", index, "override")
        block, wrong = check_block(overridden(data[name], override), fields)
        found += [replace(one, path=(*at, *_told_in(override, one))) for one in wrong]
        if block is not None and block.shared:
            what = "layers of a shared block have one set of weights, so none of them can differ"
            found.append(
                Finding("conflicting-fields", what, at, "a block of its own for this layer", key=True)
            )
        if len(found) > MAX_ERRORS:
            break
    return found


def _told_in(override: Mapping[str, Any], finding: Finding) -> Path_:
    """As much of its path as stands in the override, and the field that is missing there."""
    held: Any = override
    for size, step in enumerate(finding.path):
        if not isinstance(held, Mapping) or step not in held:
            return finding.path if finding.code == "missing-field" else finding.path[:size]
        held = held[step]
    return finding.path


def check_layers(
    data: Any, blocks: Mapping[str, Any]
) -> tuple[list[str | Repeat | OneLayer] | None, list[Finding]]:
    """The list of layers; findings by path below `model`."""
    if isinstance(data, Mapping):
        what, hint = (
            "layers are a list, or {placement: …} and nothing else",
            "layers: [{repeat: 3, pattern: [linear, full]}]",
        )
        return None, [Finding("bad-placement", what, ("layers",), hint)]
    layers, found = check_field(ModelSpec, "layers", data)
    # Without blocks every name would be unknown, and that there are none is told already.
    if isinstance(data, list) and blocks:
        found += layer_findings(data, blocks)
    return None if layers is HOLE else layers, [one.below(("layers",)) for one in found]
