"""Checks what layers take from each other at other settings than the defaults, and orders the layers of a placement."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from heddle.specs.checks import block_problems
from heddle.specs.layer import Site
from heddle.specs.model import BlockSpec, ModelSpec
from heddle.specs.model_parts import ModelParts, check_block, check_layers
from heddle.specs.open_values import BLOCKS, MODEL, OpenValues
from heddle.specs.order import Order, order_of
from heddle.specs.parameter import Parameter, settings
from heddle.specs.pattern import layers_of
from heddle.specs.reader import Path_
from heddle.specs.references import BadLink, bad_links, links

# Other settings that are tried before an option is called impossible, and layers that are looked at for all options of a file.
TRIES = 200
ALL_LAYERS = 40_000
# What of a block has no say in what its layers take and give.
ASIDE = ("channel", "norm", "norm_placement", "residual", "channel_residual")


def order_at(found: OpenValues, values: Mapping[str, Any]) -> Order:
    """The order that the layers of a placement must keep at `values`."""
    placement = found.placement
    return (
        Order()
        if placement is None
        else order_of({name: _block(found, name, values) for name in placement.of})
    )


def arranged(found: OpenValues, values: Mapping[str, Any]) -> list[str] | None:
    """The layers of a placement at `values`: evenly spread, as far as each stands after what it takes from."""
    if found.placement is None:
        return None
    return order_at(found, values).mended(found.placement.uniform(found.space.held(values)))


def _block(found: OpenValues, name: str, values: Mapping[str, Any]) -> BlockSpec | None:
    model = found.document.data["model"]
    blocks = model.get("blocks") if isinstance(model, dict) else None
    if not isinstance(blocks, dict) or name not in blocks:
        return None
    return check_block(found.fill((*BLOCKS, name), values, {}), {})[0]


class References:
    """What is wrong between the layers of a file at given values, and whether other values mend it.

    Each option is tried with the rest at its default. Where something is wrong then, only what the layers in question take
    and give is varied: parameters of their blocks, of the layers, and the hidden size. What cannot be tried in full is let
    through, and met by the search.
    """

    def __init__(self, found: OpenValues, parts: ModelParts) -> None:
        self.found, self.parts = found, parts
        self._left = ALL_LAYERS
        self._defaults = found.space.at({})
        # What is wrong at the defaults is told by the plan, and nothing else until it is mended.
        found_wrong = self._bad({})
        self._is_right = found_wrong is not None and next(found_wrong, None) is None

    def wrong(self, values: Mapping[str, Any], fixed: frozenset[str]) -> list[tuple[str, BadLink]]:
        """What is wrong at all settings that have these values for `fixed`: each with the block that takes."""
        found = list(self._bad(values) or ()) if self._is_right else []
        return found if found and not self._can_be_mended(found, values, fixed) else []

    def _can_be_mended(
        self, wrong: list[tuple[str, BadLink]], values: Mapping[str, Any], fixed: frozenset[str]
    ) -> bool:
        blocks = {block for block, _ in wrong} | {link.link.reference.name for _, link in wrong}
        near = [one for path, one in self.found.parameters.items() if _matters(path, blocks)]
        near = [one for one in near if one.name not in fixed]
        for setting in settings(near, TRIES) if near else ():
            found = self._bad({**values, **setting})
            if found is not None and next(found, None) is None:
                return True
        return self._left <= 0 or _ways(near) > TRIES

    def _bad(self, values: Mapping[str, Any]) -> Iterator[tuple[str, BadLink]] | None:
        """What is wrong between the layers, each with the block that takes; None where there is no model to look at."""
        model = None if self._left <= 0 else self._model(values)
        if model is None:
            return None
        try:
            layers = layers_of(model)
        except (ValidationError, KeyError, TypeError):
            # An override that does not fit its block or has a hole, or a name of no block: told elsewhere.
            return None
        self._left -= len(layers)
        site = Site(model.hidden_size, 0, len(layers))
        return ((layers[one.link.layer].block, one) for one in bad_links(layers, links(layers), site))

    def _changed(self, values: Mapping[str, Any]) -> list[Path_]:
        """Where parameters stand that are not as at the defaults."""
        (opened, held), (before, default) = self.found.space.at(values), self._defaults
        return [
            path
            for path, one in self.found.parameters.items()
            if held[one.name] != default[one.name] or (one.name in opened) != (one.name in before)
        ]

    def _model(self, values: Mapping[str, Any]) -> ModelSpec | None:
        """What layers are made of at `values`; None if it cannot be built."""
        parts, found, changed = self.parts, self.found, self._changed(values)
        size = parts.fields.get("hidden_size")
        if any(path[1] == "hidden_size" for path in changed):
            size = found.fill((*MODEL, "hidden_size"), values, {})
        names = {str(path[2]) for path in changed if path[:2] == BLOCKS}
        blocks = {
            name: _block(found, name, values) if name in names else block
            for name, block in parts.blocks.items()
        }
        known = {name: block for name, block in blocks.items() if block is not None}
        if type(size) is not int or size < 1 or len(known) < len(blocks):
            return None
        # What is as at the defaults was found right there.
        again = names if size == parts.fields.get("hidden_size") else known
        if any(block_problems(known[name], size, parts.kind) for name in again):
            return None
        layers: Any = arranged(found, values)
        if layers is None and not any(path[1] == "layers" for path in changed):
            layers = parts.layers
        elif layers is None:
            layers, told = check_layers(found.fill((*MODEL, "layers"), values, {}), known)
            layers = None if told else layers
        if layers is None:
            return None
        fields = {**parts.fields, "hidden_size": size, "blocks": known, "layers": layers}
        return ModelSpec.model_construct(**fields)


def _matters(path: Path_, blocks: set[str]) -> bool:
    """Whether a parameter has a say in what layers of these blocks take and give, or in where they stand."""
    if path[:2] == BLOCKS:
        return path[2] in blocks and (len(path) < 4 or path[3] not in ASIDE)
    return path[1] in ("hidden_size", "layers")


def _ways(near: list[Parameter]) -> float:
    """How many settings there are; a float or a long range is never tried in full."""
    return math.prod(one.size() if one.size() <= 64 else math.inf for one in near)
