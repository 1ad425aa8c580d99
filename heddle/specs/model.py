"""The model part of a spec: named blocks, and the layers made of them."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field

from heddle.specs.base import Name, Schema
from heddle.specs.channel import Channel
from heddle.specs.kinds import ChannelSpec, MixerSpec
from heddle.specs.layer import MAX_LAYERS, LayerItem
from heddle.specs.mixers import Mixer

MAX_BLOCKS = 256

MIXERS: dict[str, type[MixerSpec]] = {one.model_fields["kind"].default: one for one in get_args(Mixer)}
CHANNELS: dict[str, type[ChannelSpec]] = {one.model_fields["kind"].default: one for one in get_args(Channel)}


class BlockSpec(Schema):
    """One kind of layer, pre-norm:  x += mixer(norm(x));  x += channel(norm(x))."""

    mixer: Annotated[
        Mixer, Field(discriminator="kind", description="What mixes along time; `kind` says which.")
    ]
    channel: Annotated[
        Channel, Field(discriminator="kind", description="What mixes features; `kind` says which.")
    ]
    norm: Annotated[
        Literal["rmsnorm", "layernorm"],
        Field(description="The norm before the mixer and before the channel block."),
    ] = "rmsnorm"


class ModelSpec(Schema):
    """A causal language model. Only this part of a spec is hashed."""

    vocab_size: Annotated[int, Field(ge=2, le=2**22, description="Tokens the model knows (a count).")]
    hidden_size: Annotated[
        int, Field(ge=1, le=65_536, description="Width of the residual stream, in features.")
    ]
    context_length: Annotated[
        int, Field(ge=1, le=10**8, description="Longest sequence the model is meant for, in tokens.")
    ] = 32_768
    tie_embeddings: Annotated[bool, Field(description="Use the embedding's weight as output head.")] = True
    norm_eps: Annotated[float, Field(gt=0, le=0.1, description="Added under the root of every norm.")] = 1e-6
    blocks: Annotated[
        dict[Name, BlockSpec],
        Field(min_length=1, max_length=MAX_BLOCKS, description="The kinds of layers, by names of your own."),
    ]
    layers: Annotated[
        list[LayerItem],
        Field(min_length=1, max_length=MAX_LAYERS, description="Block names and repeats, first layer first."),
    ]
