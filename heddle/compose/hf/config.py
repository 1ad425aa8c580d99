"""The configuration of a Heddle model: what `config.json` of an export holds."""

from __future__ import annotations

from dataclasses import field
from typing import Any, ClassVar

from transformers import PreTrainedConfig


class HeddleConfig(PreTrainedConfig):  # type: ignore[misc]
    """A stack of layers, each with its own mixer and channel block.

    `layers` holds, for each layer, `{"mixer": {"kind", …}, "channel": {"kind", …}, "norm": …}` and what is
    not as in a plain pre-norm layer: the plain data of a resolved spec. There is no `layer_types`:
    transformers would build caches from it, and its vocabulary has neither per-layer windows nor a state that
    counts tokens. The model brings its own (`compose/cache.py`).

    `lower_bounds_width` is how many columns the model's table of lower bounds has, with a row for each layer; 0: there is none.
    `constant_tokens` are those that the constant stream begins with; None: a random row for each position.
    `model_kind` is causal_lm or encoder; `readout` holds, for an encoder that classifies sequences, `{"kind", …}`, and
    `num_labels` the number of classes. `spec` is what all this was made from, `{"version", "model"}` as in a spec file, for
    `heddle import`; nothing here reads it.
    """

    model_type = "heddle"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {"max_position_embeddings": "context_length"}

    vocab_size: int = 256
    hidden_size: int = 64
    num_hidden_layers: int = 0
    context_length: int = 32768
    norm_eps: float = 1e-6
    initializer_range: float = 0.02
    embedding_multiplier: float = 1.0
    logit_multiplier: float = 1.0
    logit_softcap: float | None = None
    lower_bounds_width: int = 0
    constant_tokens: list[int] | None = None
    model_kind: str = "causal_lm"
    readout: dict[str, Any] | None = None
    layers: list[dict[str, Any]] = field(default_factory=list)
    spec: dict[str, Any] | None = None
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.num_hidden_layers = len(self.layers)
        super().__post_init__(**kwargs)
