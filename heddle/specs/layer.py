"""Where a block stands in the model, and the items a `layers` list is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag

from heddle.specs.base import Name, Schema

MAX_LAYERS = 4096


@dataclass(frozen=True, slots=True)
class Site:
    """What the model around a block tells it: sizes, and which layer of how many it is (counted from 0).

    What a block is (its sizes, problems, parameters, states) is the same at all layers of a model and is asked of one of
    them; only what its masks favour may depend on the layer (`sights`).
    """

    hidden_size: int
    layer_index: int = 0
    layer_count: int = 1
    norm_eps: float = 1e-6
    context_length: int = 32_768


# Not `Name`: a misspelled name is told as an unknown block, with the nearest one.
Reference = Annotated[str, Field(min_length=1, max_length=64)]


class Repeat(Schema):
    """A pattern of blocks, several times."""

    repeat: Annotated[int, Field(ge=1, le=MAX_LAYERS, description="How often the pattern stands.")]
    pattern: Annotated[
        list[Reference],
        Field(min_length=1, max_length=MAX_LAYERS, description="Block names, first layer first."),
    ]


class OneLayer(Schema):
    """One layer that has a name of its own, or differs from its block."""

    block: Annotated[Reference, Field(description="Name of the block.")]
    name: Annotated[
        Name | None, Field(description="A name of the layer's own, for others to take from; null: none.")
    ] = None
    override: Annotated[
        dict[str, Any],
        Field(
            description="Fields of the block that are different here, nested as in the block; a mixer or channel of "
            "another kind takes the place of the whole one."
        ),
    ] = Field(default_factory=dict)


def _form(item: Any) -> str:
    is_repeat = isinstance(item, dict) and "block" not in item and ("repeat" in item or "pattern" in item)
    if is_repeat or isinstance(item, Repeat):
        return "repeat"
    return "layer" if isinstance(item, (dict, OneLayer)) else "name"


# One layer by its block's name or in full, or a repeated pattern of names.
LayerItem = Annotated[
    Annotated[Reference, Tag("name")] | Annotated[Repeat, Tag("repeat")] | Annotated[OneLayer, Tag("layer")],
    Discriminator(_form),
]
