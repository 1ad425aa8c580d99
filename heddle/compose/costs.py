"""What a planned model costs to run, as closed forms. Needs no torch.

FLOPs: a multiply-add counts 2; norms, activations and softmaxes are left out. Training counts the forward pass, and twice as
much for the backward pass, which multiplies each weight's input and output gradient once more; optimizer and recomputation
are left out.

Bytes moved are what no implementation can do without, each tensor touched once:

    decode   every weight that a step uses, once for the whole batch (a shared block once for each of its layers), and for
             each sequence its embedding row, the cache that is read (`MixerSpec.read_bytes`) and what is written to it
    prefill  every weight once; for each sequence the stream, read and written by every mixer and channel block, read once
             more by a skip, by what makes q and k of the embedded tokens, and by the last norm, written by the embedding from
             as many rows; and the caches, written once

The constant stream is one sequence more in the layers that it runs through, whatever the batch; its FLOPs are spread over the
tokens of the text. A layer that reads it holds its input of it, too; the last such layer does no more with it.

What happens inside a block is taken to stay on the chip, and logits are left out: a prefill needs those of one token.
"""

from __future__ import annotations

from dataclasses import dataclass

from heddle.compose.passes.count_costs import norm_parameters, own_parameters
from heddle.compose.passes.graph import ChannelBlock, MixerBlock
from heddle.specs.constant_stream import reads_constant
from heddle.specs.model import ModelSpec

# How much a forward and a backward pass cost, in forward passes.
TRAINING = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What costs depend on beside the model: tokens so far, sequences at once, bytes of a number.

    `decodes` is false for a model that has all its tokens at once.
    """

    context: int
    batch: int
    element: int
    decodes: bool


def layer_cost(mixer: MixerBlock, channel: ChannelBlock | None, setting: Setting) -> dict[str, float]:
    """The costs of one layer."""
    spec, site, context, element = mixer.spec, mixer.site, setting.context, setting.element
    halves = 0 if channel is None else channel.spec.flops(site)
    held = {True: 0, False: 0}
    for state in mixer.states or ():
        held[state.grows] += state.bytes(context, element)
    # Of a layer that reads another one's keys nothing is held.
    away = spec.host_bytes(site, context, element) if held[True] else 0
    prefill: float = spec.prefill_flops(site, context) + halves
    decode: float = spec.flops(site, context) + halves
    sequences = _sequences(mixer, setting)
    if mixer.constant:
        prefill, decode = (one * sequences / setting.batch for one in (prefill, decode))
    cost = {
        "prefill_flops_per_token": prefill,
        "decode_flops_per_token": decode,
        "train_flops_per_token": TRAINING * prefill,
        "cache_bytes": sequences * (held[True] - away) + context * _constant_row(mixer, element),
        "cache_bytes_per_token": spec.cache_bytes_per_token(site, element),
        "state_bytes": sequences * held[False],
        "host_bytes": sequences * away,
        "decode_bytes": _decode_bytes(mixer, channel, setting),
        "prefill_bytes": _prefill_bytes(mixer, channel, setting),
    }
    return _as_asked(cost, setting)


def _sequences(mixer: MixerBlock, setting: Setting) -> int:
    """How many run through a layer: those of the batch, and perhaps the constant stream."""
    return setting.batch + (1 if mixer.constant else 0)


def _constant_row(mixer: MixerBlock, element: int) -> int:
    """Bytes of a token of the constant stream that a layer which reads it holds."""
    return mixer.site.hidden_size * element if reads_constant(mixer.spec) else 0


def _decode_bytes(mixer: MixerBlock, channel: ChannelBlock | None, setting: Setting) -> float:
    spec, site, element = mixer.spec, mixer.site, setting.element
    read = spec.read_bytes(site, setting.context, element)
    # What a step writes is what a first token leaves: its own part of what grows, and all of what does not.
    written = sum(state.bytes(1, element) for state in mixer.states or ())
    sequences = _sequences(mixer, setting)
    moved = sequences * (read + written) + _constant_row(mixer, element)
    return element * _weights(mixer, channel, sequences) + moved


def _prefill_bytes(mixer: MixerBlock, channel: ChannelBlock | None, setting: Setting) -> float:
    sequences = _sequences(mixer, setting)
    tokens = sequences * setting.context
    # Streams of earlier layers, by a skip or as what queries and keys are made of.
    taken = sum(one.what == "stream" for one in mixer.spec.references()) + (mixer.skip is not None)
    streams = 2 + (0 if channel is None else 2) + taken
    written = sum(state.bytes(setting.context, setting.element) for state in mixer.states or ())
    weights = _weights(mixer, channel, tokens)
    stream = streams * tokens * mixer.site.hidden_size
    # The text reads what the constant stream wrote.
    rows = 2 * setting.context * _constant_row(mixer, setting.element)
    return setting.element * (weights + stream) + rows + sequences * (written if setting.decodes else 0)


def _weights(mixer: MixerBlock, channel: ChannelBlock | None, tokens: int) -> int:
    """Parameters that a pass over `tokens` tokens reads, the layer's own or not, and what is frozen."""
    count = own_parameters(mixer) + mixer.spec.frozen_params(mixer.site)
    if channel is not None:
        spared = channel.spec.params(channel.site) - channel.spec.params_read(channel.site, tokens)
        count += own_parameters(channel) - spared
    return count


def ends_cost(model: ModelSpec, setting: Setting, table: int = 0) -> dict[str, float]:
    """The costs of what stands before and after the layers: embedding, last norm, and what makes logits.

    `table` counts the parameters that all layers share.
    """
    width, element, tokens = model.hidden_size, setting.element, setting.batch * setting.context
    if model.readout is None:
        flops: float = 2 * width * model.vocab_size
        head = width * model.vocab_size
    else:
        # It works once for a sequence, and is spread over its tokens.
        flops = model.readout.flops(width, setting.context) / max(setting.context, 1)
        head = model.readout.params(width) + (model.readout.width(width) + 1) * model.readout.classes
    weights = head + norm_parameters("rmsnorm", width) + table
    cost: dict[str, float] = {
        "prefill_flops_per_token": flops,
        "decode_flops_per_token": flops,
        "train_flops_per_token": TRAINING * flops,
        "cache_bytes": 0,
        "cache_bytes_per_token": 0,
        "state_bytes": 0,
        "host_bytes": 0,
        "decode_bytes": element * (weights + setting.batch * width),
        "prefill_bytes": element * (weights + 3 * tokens * width),
    }
    return _as_asked(cost, setting)


# What a model that has all its tokens at once does not do.
DECODING = (
    "decode_flops_per_token", "cache_bytes", "cache_bytes_per_token", "state_bytes", "host_bytes", "decode_bytes",
)  # fmt: skip


def _as_asked(cost: dict[str, float], setting: Setting) -> dict[str, float]:
    return cost if setting.decodes else cost | dict.fromkeys(DECODING, 0)
