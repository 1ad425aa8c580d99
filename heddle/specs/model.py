"""The model part of a spec: named blocks, and the layers made of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from heddle.specs.base import Name, Schema
from heddle.specs.channel import Channel
from heddle.specs.kinds import ChannelSpec, MixerSpec
from heddle.specs.layer import MAX_LAYERS, LayerItem, Reference
from heddle.specs.mixers import KINDS, Mixer
from heddle.specs.readout import Readout

MAX_BLOCKS = 256

MIXERS: dict[str, type[MixerSpec]] = {one.model_fields["kind"].default: one for one in KINDS}
CHANNELS: dict[str, type[ChannelSpec]] = {one.model_fields["kind"].default: one for one in get_args(Channel)}


Factor = Annotated[float, Field(ge=-1e6, le=1e6)]


class Residual(Schema):
    """x = stream · (x or norm(x)) + branch · part(norm(x)). MiniMax-01 (arXiv 2501.08313) takes the normed input."""

    of: Annotated[
        Literal["stream", "normed"],
        Field(
            description="What goes past the part: the stream itself, or its norm (then norms stand before)."
        ),
    ] = "stream"
    stream: Annotated[Factor, Field(description="Factor of what goes past.")] = 1.0
    branch: Annotated[
        Factor, Field(description="Factor of the part's output (Granite: residual_multiplier).")
    ] = 1.0


class Skip(Schema):
    """x = a · x + b · s before the layer, a and b learned: s is what an earlier layer gave to the stream."""

    source: Annotated[
        Reference,
        Field(description="The nearest earlier layer of this name or block; embedding: the embedded tokens."),
    ]
    init: Annotated[Factor, Field(description="Where b begins; a begins at 1.")] = 0.0


class BlockSpec(Schema):
    """One kind of layer, by default pre-norm:  x += mixer(norm(x));  x += channel(norm(x))."""

    mixer: Annotated[
        Mixer, Field(discriminator="kind", description="What mixes along time; `kind` says which.")
    ]
    channel: Annotated[
        Channel, Field(discriminator="kind", description="What mixes features; `kind` says which.")
    ]
    norm: Annotated[
        Literal["rmsnorm", "layernorm"],
        Field(description="The norms of the mixer and of the channel block."),
    ] = "rmsnorm"
    norm_placement: Annotated[
        Literal["pre", "post", "sandwich"],
        Field(description="Norms before a part, after it (on its output alone), or both."),
    ] = "pre"
    residual: Annotated[
        Residual | None, Field(description="How a part's output joins the stream; null: it is added.")
    ] = None
    channel_residual: Annotated[
        Residual | None, Field(description="The same for the channel block; null: as residual.")
    ] = None
    skip: Annotated[
        Skip | None, Field(description="Adds what an earlier layer gave to the stream; null: nothing.")
    ] = None
    shared: Annotated[
        bool, Field(description="All layers of this block have one set of weights (Zamba, arXiv 2405.16712).")
    ] = False


class ModelSpec(Schema):
    """A causal language model, or a bidirectional encoder. Only this part of a spec is hashed."""

    kind: Annotated[
        Literal["causal_lm", "encoder"],
        Field(
            description="causal_lm: logits of the next token; encoder: all tokens at once, where mixers may see later ones."
        ),
    ] = "causal_lm"
    readout: Annotated[
        Readout | None,
        Field(
            description="Of an encoder: how a sequence becomes scores of classes; null: logits for every token instead."
        ),
    ] = None
    vocab_size: Annotated[int, Field(ge=2, le=2**22, description="Tokens the model knows (a count).")]
    hidden_size: Annotated[
        int, Field(ge=1, le=65_536, description="Width of the residual stream, in features.")
    ]
    context_length: Annotated[
        int, Field(ge=1, le=10**8, description="Longest sequence the model is meant for, in tokens.")
    ] = 32_768
    tie_embeddings: Annotated[bool, Field(description="Use the embedding's weight as output head.")] = True
    norm_eps: Annotated[float, Field(gt=0, le=0.1, description="Added under the root of every norm.")] = 1e-6
    embedding_multiplier: Annotated[Factor, Field(description="Factor of the embedded tokens.")] = 1.0
    logit_multiplier: Annotated[Factor, Field(description="Factor of the logits.")] = 1.0
    logit_softcap: Annotated[
        float | None,
        Field(
            gt=0,
            le=1e6,
            description="Logits become c · tanh(logits / c), after their factor; null: they stay.",
        ),
    ] = None
    constant_tokens: Annotated[
        list[Annotated[int, Field(ge=0, lt=2**22)]] | None,
        Field(
            min_length=1,
            max_length=65_536,
            description="Token ids that the constant stream is made of, begun again behind the last; null: a fixed random row "
            "for each position. For qk_source: constant.",
        ),
    ] = None
    blocks: Annotated[
        dict[Name, BlockSpec],
        Field(min_length=1, max_length=MAX_BLOCKS, description="The kinds of layers, by names of your own."),
    ]
    layers: Annotated[
        list[LayerItem],
        Field(min_length=1, max_length=MAX_LAYERS, description="Block names and repeats, first layer first."),
    ]

    def written(self) -> dict[str, Any]:
        return {name: one for name, one in super().written().items() if (name, one) != ("kind", "causal_lm")}
