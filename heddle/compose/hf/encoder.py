"""Bidirectional encoders: logits for every token, or the scores of classes for a sequence. Neither has a cache."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import MaskedLMOutput, SequenceClassifierOutput
from transformers.utils.generic import can_return_tuple

from heddle.compose.hf.config import HeddleConfig
from heddle.compose.hf.model import (
    HeddleModel,
    HeddleModelOutput,
    HeddlePreTrainedModel,
    HeddleWithHead,
    real_tokens,
    scaled_logits,
)
from heddle.compose.hf.packed import KEYS, PACKED, QUERIES
from heddle.compose.modules.precision import wide
from heddle.compose.modules.readout import readout_module
from heddle.errors import HeddleError


class HeddleForMaskedLM(HeddleWithHead):
    """An encoder with an output head: what stands at each place, from the tokens on both sides."""

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        cu_seqlens: Tensor | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """Logits [B, T, vocab].

        `attention_mask` [B, T] is 0 at padding, on the left or on the right; `cu_seqlens` and `position_ids` are those of
        `HeddleModel`. With `labels` [B, T] also the mean loss of the
        tokens at their own places; -100 is ignored, as is usual where nothing was masked.

        Raises:
            HeddleError: "bad-argument".
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            output_hidden_states=output_hidden_states,
            cu_seqlens=cu_seqlens,
            **{name: kwargs.get(name) for name in (QUERIES, KEYS, "position_ids")},
        )
        logits = self.logits(outputs.last_hidden_state)
        loss = None if labels is None else _loss(logits.flatten(0, 1), labels.flatten(), outputs.aux_loss)
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


class HeddleForSequenceClassification(HeddlePreTrainedModel):
    """An encoder with a readout: which of `config.num_labels` classes a sequence is of."""

    def __init__(self, config: HeddleConfig) -> None:
        super().__init__(config)
        if config.readout is None:
            raise HeddleError(
                "bad-argument", "this configuration has no readout", hint="HeddleForMaskedLM has its classes"
            )
        self.model = HeddleModel(config)
        self.readout = readout_module(config.hidden_size, config.readout)
        self.classifier = nn.Linear(self.readout.width, config.num_labels)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Logits [B, classes]; with `labels` [B] also the mean cross-entropy.

        `attention_mask` [B, T] is 0 at padding, on the left or on the right. With a `cls` readout, hidden states have one
        token more.

        Raises:
            HeddleError: "bad-argument".
        """
        if any(kwargs.get(name) is not None for name in PACKED):
            what = "a readout is of a whole row, so there are no packed documents (cu_seqlens)"
            raise HeddleError("bad-argument", what, hint="one sequence a row, with an attention_mask")
        logits, outputs = self.classified(input_ids, attention_mask, inputs_embeds, output_hidden_states)
        loss = None if labels is None else _loss(logits, labels, outputs.aux_loss)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)

    def classified(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
    ) -> tuple[Tensor, HeddleModelOutput]:
        """Logits [B, classes], and what the layers gave."""
        x = self.model.embedded(input_ids, inputs_embeds)
        real = None if attention_mask is None else real_tokens(attention_mask, x.shape[1])
        x, real = self.readout.opened(x, real)
        outputs = self.model(
            inputs_embeds=x, attention_mask=real, use_cache=False, output_hidden_states=output_hidden_states
        )
        hidden = self.readout(outputs.last_hidden_state, real)
        return scaled_logits(self.config, self.classifier(hidden)), outputs


def _loss(logits: Tensor, labels: Tensor, aux_loss: Tensor | None) -> Tensor:
    """The mean cross-entropy, in float32.  Shapes:  logits: [N, classes];  labels: [N]"""
    loss = F.cross_entropy(wide(logits), labels)
    return loss if aux_loss is None else loss + aux_loss
