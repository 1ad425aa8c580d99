"""How a model generates: the ids of its special tokens, and of generation_config.json what is plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from heddle.compose.hf.checkpoint import CONFIG, read_json
from heddle.errors import HeddleError, Where

FILE = "generation_config.json"
IDS = ("pad_token_id", "bos_token_id", "eos_token_id")
# Fields that decide which tokens are written. The others choose a kind of cache, another model beside it or code of a hub, or
# what is returned.
KEPT = frozenset(
    (
        *IDS, "forced_bos_token_id", "forced_eos_token_id", "max_length", "max_new_tokens", "min_length", "min_new_tokens",
        "early_stopping", "do_sample", "num_beams", "use_cache", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p",
        "epsilon_cutoff", "eta_cutoff", "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "bad_words_ids",
        "renormalize_logits", "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens",
        "begin_suppress_tokens", "sequence_bias",
    )
)  # fmt: skip
# What a file has beside its fields.
_NOTES = ("_from_model_config", "transformers_version")


@dataclass(frozen=True, slots=True)
class Generation:
    """The ids that config.json has, which may be lists, and the fields of generation_config.json; `left` are those of its fields
    that were not taken."""

    ids: Mapping[str, Any]
    fields: Mapping[str, Any]
    left: tuple[str, ...] = ()


def read_generation(folder: Path, stored: Mapping[str, Any], full: Mapping[str, Any]) -> Generation:
    """How the model of a folder generates; `stored` is its config.json, `full` the same with the defaults of its class.

    Without a generation_config.json transformers takes the fields of that name in config.json.

    Raises:
        HeddleError: "import-mismatch" for fields that transformers refuses, and what `read_json` raises.
    """
    file = folder / FILE
    told = read_json(file) if file.is_file() else {name: stored.get(name) for name in KEPT}
    fields = {name: value for name, value in told.items() if name in KEPT and value is not None}
    try:
        GenerationConfig(**fields)
    # Its checks compare what they are given: a string with a number raises a TypeError.
    except (TypeError, ValueError) as error:
        file = file if file.is_file() else folder / CONFIG
        what = f"{file.name} is refused by GenerationConfig: {error}"
        raise HeddleError("import-mismatch", what, where=Where(file=str(file))) from error
    left = (name for name, value in told.items() if name not in KEPT and name not in _NOTES and value)
    return Generation({name: full.get(name) for name in IDS}, fields, tuple(sorted(left)))
