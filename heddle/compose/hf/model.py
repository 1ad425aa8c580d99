"""The model: searched, trained and exported in this one form.

`HeddleForCausalLM` is a `PreTrainedModel` with `GenerationMixin`. `model.model(...)` gives
`last_hidden_state` (after the last norm) and `model.lm_head` turns any rows of it into logits, so that
training need not compute the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from heddle.compose.cache import Call, StateLayer
from heddle.compose.constant_stream import ConstantCache, ConstantStream, RowsLayer, readers_of
from heddle.compose.hf.adopt import adopt
from heddle.compose.hf.aux_losses import missed, told
from heddle.compose.hf.config import HeddleConfig
from heddle.compose.hf.packed import labels_within, packing_of
from heddle.compose.init import fill, initialise
from heddle.compose.modules.layer import STREAM, Again, HeddleLayer
from heddle.compose.modules.lower_bounds import hand_bounds
from heddle.compose.modules.norm import norm_module
from heddle.compose.modules.packing import Packing
from heddle.compose.modules.qk_source import position_rows
from heddle.compose.modules.site import Site
from heddle.errors import HeddleError


@dataclass
class HeddleModelOutput(BaseModelOutputWithPast):  # type: ignore[misc]
    """`aux_loss` is what the layers add to the loss in training, each times its factor; `aux_losses` the mean of each
    kind over the layers, as it is; `packing` where packed documents lie. None where there is none."""

    aux_loss: Tensor | None = None
    aux_losses: dict[str, Tensor] | None = None
    packing: Packing | None = None


class HeddlePreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """What all model classes share. transformers finds embeddings and head by their names, `embed_tokens` and `lm_head`."""

    config: HeddleConfig
    config_class = HeddleConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["HeddleLayer"]
    # transformers casts what is named here back to float32 when a checkpoint is loaded in a narrower type.
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = ["A_log", "dt_bias", "correction"]
    _supports_sdpa = True
    # A recurrent state cannot be rolled back, which assisted decoding would ask for.
    _is_stateful = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        initialise(module, self.config.initializer_range)
        if isinstance(module, HeddleModel) and module.lower_bounds is not None:
            fill(module.lower_bounds, torch.zeros(module.lower_bounds.shape))
        if isinstance(module, HeddleModel) and module.constant_tokens is not None:
            fill(module.constant_tokens, torch.tensor(self.config.constant_tokens))


class HeddleModel(HeddlePreTrainedModel):
    """Embedding, layers and last norm; and, if layers ask for it, the one table of lower bounds of their gates, and a constant
    stream."""

    def __init__(self, config: HeddleConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(self._layer(index) for index in range(config.num_hidden_layers))
        # Streams that a later layer takes up again.
        self.handed_on = {layer["skip"]["source"] for layer in config.layers if layer.get("skip")}
        # What mixers take of earlier ones, by (what, layer).
        self.wanted = frozenset(taken for one in self.layers.modules() for taken in getattr(one, "takes", ()))
        self.constant_readers = readers_of(config.layers)
        self.norm = norm_module("rmsnorm", config.hidden_size, config.norm_eps)
        told = config.constant_tokens
        # On the device, for no step may wait for a copy; and in no checkpoint, for the configuration has them.
        ids = None if told is None else torch.empty(len(told), dtype=torch.int64)
        self.register_buffer("constant_tokens", ids, persistent=False)
        self.constant_tokens: Tensor | None
        self.lower_bounds: nn.Parameter | None = None
        if config.lower_bounds_width > 0:
            self.lower_bounds = nn.Parameter(torch.empty(len(self.layers), config.lower_bounds_width))
            self.lower_bounds._no_weight_decay = True  # type: ignore[attr-defined]
        self.gradient_checkpointing = False
        self.post_init()

    def _layer(self, index: int) -> nn.Module:
        config, layer = self.config, self.config.layers[index]
        if layer.get("weights_of") is not None:
            return Again(layer["weights_of"])
        site = Site(
            config.hidden_size, index, config.num_hidden_layers, config.norm_eps, config.context_length
        )
        return HeddleLayer(site, layer)

    def layer_at(self, index: int) -> Any:
        """The layer that runs at `index`: of a shared block, its first one."""
        layer = self.layers[index]
        return self.layers[layer.layer] if isinstance(layer, Again) else layer

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cu_seqlens: Tensor | None = None,
        **kwargs: Any,
    ) -> HeddleModelOutput:
        """The hidden states after the last norm.

        `attention_mask` [B, earlier tokens + T] is 0 at padding, which may stand on the left and, where no cache is used, on
        the right. Positions count real tokens from 0 unless `position_ids` [B, T] are given. With `cu_seqlens` [N + 1], 0 … T,
        the only row holds N documents, each of which is as if alone; see `packing_of` for what else says so.

        Raises:
            HeddleError: "bad-argument".
        """
        x = self._scaled(self.embedded(input_ids, inputs_embeds))
        packing = packing_of(
            x,
            cu_seqlens,
            kwargs,
            position_ids=position_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
        )
        cache = self._cache(past_key_values, use_cache if packing is None else False)
        call = self._call(
            x, attention_mask, position_ids, 0 if cache is None else cache.get_seq_length(), packing
        )
        constant = self._constant(x, position_ids, cache, packing) if self.constant_readers else None
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        seen: list[Tensor] = []
        for index in range(len(self.layers)):
            seen.append(x)
            if constant is not None and index <= constant.last:
                # It trains with the text, and is none of it: its losses and loads do not count.
                constant.x = self._run(index, constant.x, constant.call, constant.cache_at(index))[0]
                constant.hand(index, call)
            x, losses, targets, loads, members = self._run(
                index, x, call, None if cache is None else cache.layers[index]
            )
            self.layer_at(index).count(loads, members)
            call.losses += losses
            call.targets += targets
        for held in () if cache is None else cache.layers:
            held.advance(x.shape[1])
        x = self.norm(x)
        return HeddleModelOutput(
            last_hidden_state=x,
            past_key_values=cache,
            hidden_states=(*seen, x) if wanted else None,
            packing=packing,
            **told([*call.losses, *missed(call.targets)] if self.training else []),
        )

    def _run(self, index: int, x: Tensor, call: Call, cache: StateLayer | None) -> Any:
        """The stream after a layer, and what the layer tells: losses, targets, loads, members. What it hands on is in `call`."""
        out = self.layer_at(index)(x, call.at(cache, index))
        x, given, *told = (out, {}, [], [], [], []) if isinstance(out, Tensor) else out
        call.handed.update({(what, index): value for what, value in given.items()})
        if index in self.handed_on:
            call.handed[STREAM, index] = x
        return x, *told

    def new_cache_layers(self) -> list[StateLayer]:
        """An empty cache layer for each layer of the model, and behind them one of the constant stream, if there is one."""
        made = [self.layer_at(index).mixer.new_cache() for index in range(len(self.layers))]
        if not self.constant_readers:
            return made
        beside = range(max(self.constant_readers))
        inputs = {index: RowsLayer() for index in self.constant_readers}
        return [*made, ConstantCache([self.layer_at(index).mixer.new_cache() for index in beside], inputs)]

    def filled_cache_layers(self, batch: int, context: int) -> list[StateLayer]:
        """As `new_cache_layers`, of random contents after `context` tokens, whose step repeats."""
        like = self.embed_tokens.weight

        def filled(layers: int, rows: int) -> list[StateLayer]:
            return [self.layer_at(index).mixer.filled_cache(rows, context, like) for index in range(layers)]

        made = filled(len(self.layers), batch)
        if not self.constant_readers:
            return made
        shape = (1, context + 1, self.config.hidden_size)
        inputs = {index: RowsLayer(like.new_empty(shape).normal_()) for index in self.constant_readers}
        return [*made, ConstantCache(filled(max(self.constant_readers), 1), inputs)]

    def embedded(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """The embedded tokens, before their factor: one of both as it is given.  Shapes:  out: [B, T, D]"""
        if (input_ids is None) == (inputs_embeds is None):
            raise HeddleError("bad-argument", "give either input_ids or inputs_embeds")
        return cast(Tensor, self.embed_tokens(input_ids)) if inputs_embeds is None else inputs_embeds

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.config.embedding_multiplier == 1.0 else x * self.config.embedding_multiplier

    def _constant(
        self, x: Tensor, given: Tensor | None, cache: Cache | None, packing: Packing | None
    ) -> ConstantStream:
        """The constant stream of a forward of `x`, before the first layer."""
        past = 0 if cache is None else cache.get_seq_length()
        whole = past + (x.shape[1] if packing is None else max(packing.lengths))
        # Asking a GPU would wait for it, and a look beyond the end fails there by itself.
        if given is not None and given.device.type == "cpu" and not torch.compiler.is_compiling():
            furthest = int(given.max()) if given.numel() else 0
            if furthest >= whole:
                what = f"position {furthest} is given, and the constant stream has run through {whole} tokens"
                raise HeddleError("bad-argument", what, hint="position_ids that count tokens from 0")
        places = torch.arange(past, whole, device=x.device)
        if self.constant_tokens is None:
            rows = position_rows(places[None], x.shape[-1]).to(x.dtype)
        else:
            ids = self.constant_tokens[places % len(self.constant_tokens)]
            rows = self._scaled(self.embed_tokens(ids[None]))
        held = None if cache is None else cache.layers[-1]
        if held is not None and not isinstance(held, ConstantCache):
            raise HeddleError("bad-argument", "this cache is of a model without a constant stream")
        return ConstantStream(rows, self._call(rows, None, None, past), self.constant_readers, held)

    def _cache(self, given: Cache | None, use_cache: bool | None) -> Cache | None:
        """The cache to write to: the one given, a new one, or none."""
        wanted = self.config.use_cache and not self.training if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training:
            # The backward pass runs each layer again, and would write to the cache a second time.
            if given is not None and given.get_seq_length() > 0:
                raise HeddleError("bad-argument", "gradient checkpointing cannot go on from a cache")
            return None
        if given is None:
            return Cache(layers=self.new_cache_layers()) if wanted else None
        adopt(given, self.new_cache_layers())
        return given

    def _call(
        self,
        x: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
        past: int,
        packing: Packing | None = None,
    ) -> Call:
        length = x.shape[1]
        real = None if mask is None else real_tokens(mask, past + length)
        if positions is None and packing is not None:
            positions = packing.places()
        elif positions is None and real is not None:
            positions = (real.long().cumsum(dim=-1) - 1).clamp(min=0)[:, past:]
        elif positions is None:
            positions = torch.arange(past, past + length, device=x.device)[None].expand(x.shape[0], length)
        else:
            # One row may stand for all.
            positions = positions.expand(x.shape[0], -1)
        padding = None if real is None else real[:, past:]
        call = Call(positions, padding, real, packing=packing, wanted=self.wanted)
        if -1 in self.handed_on or (STREAM, -1) in self.wanted:
            call.handed[STREAM, -1] = x
        if self.lower_bounds is not None:
            hand_bounds(self.lower_bounds, call)
        return call


def real_tokens(mask: Tensor, length: int) -> Tensor | None:
    """Where there is a token [B, length], or None if everywhere.

    Raises:
        HeddleError: "bad-argument" for a mask of another shape.
    """
    if mask.dim() != 2 or mask.shape[1] != length:
        raise HeddleError(
            "bad-argument",
            f"attention_mask is {tuple(mask.shape)}, but must be (batch, {length})",
            hint="one column for each token so far, those in the cache included",
        )
    real = mask.bool()
    # Asking waits for the device, and a traced graph cannot ask; the masked path gives the same numbers.
    return None if not torch.compiler.is_compiling() and bool(real.all()) else real


def scaled_logits(config: HeddleConfig, logits: Tensor) -> Tensor:
    """y = factor · logits, and then cap · tanh(y / cap) where the configuration has a soft cap."""
    y = logits if config.logit_multiplier == 1.0 else logits * config.logit_multiplier
    return y if config.logit_softcap is None else config.logit_softcap * torch.tanh(y / config.logit_softcap)


class HeddleWithHead(HeddlePreTrainedModel):
    """The model with an output head: a row of logits for each token."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: HeddleConfig) -> None:
        super().__init__(config)
        self.model = HeddleModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits of hidden states after the last norm.  Shapes:  hidden: [..., D];  out: [..., vocab]"""
        return scaled_logits(self.config, self.lm_head(hidden))


class HeddleForCausalLM(HeddleWithHead, GenerationMixin):  # type: ignore[misc]
    """The model with its output head: what comes next."""

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cu_seqlens: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, vocab].

        `logits_to_keep` asks for those of the last so many tokens (0: all), or of the tokens at its indices.
        With `labels` [B, T] (-100 is ignored) also the mean next-token loss; from one packed document (`cu_seqlens`, as
        `HeddleModel` takes it) to the next nothing is predicted.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cu_seqlens=cu_seqlens,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.logits(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            labels = labels if outputs.packing is None else labels_within(labels, outputs.packing)
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
            loss = loss if outputs.aux_loss is None else loss + outputs.aux_loss
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What `generate` feeds to the next forward.

        Its cache becomes ours before transformers looks at it: for a static one it would build 4-D masks.
        """
        if kwargs.get("past_key_values") is not None:
            adopt(kwargs["past_key_values"], self.model.new_cache_layers())
        return cast(dict[str, Any], super().prepare_inputs_for_generation(*args, **kwargs))

    @torch.no_grad()
    def decode_cache(self, batch: int, context: int) -> Cache:
        """A cache of random contents after `context` tokens, whose decode step can be repeated and captured.

        It has the model's own dtype and device, and stays at `context` tokens however often it is used.
        """
        return Cache(layers=self.model.filled_cache_layers(batch, context))
