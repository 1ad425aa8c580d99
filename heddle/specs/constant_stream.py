"""The constant stream of Deconstructing Attention (arXiv 2510.11602): who reads it, and where it cannot be.

A sequence of its own runs through the layers beside the text, the same for every text. Mixers with `qk_source: constant` make
queries and keys of what it is at their layer; with the input of the last such layer it ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from heddle.specs.kinds import MixerSpec, Problem

CONSTANT = "constant"


def reads_constant(mixer: MixerSpec) -> bool:
    """Whether it, or a part of it, makes queries and keys of the constant stream."""
    return getattr(mixer, "qk_source", None) == CONSTANT or any(map(reads_constant, mixer.parts().values()))


def last_reader(mixers: Sequence[MixerSpec]) -> int:
    """The last of the layers with these mixers that reads the constant stream; -1 if none does."""
    return max((index for index, mixer in enumerate(mixers) if reads_constant(mixer)), default=-1)


def encoder_problems(mixer: MixerSpec, path: str = "mixer") -> Iterator[Problem]:
    """What in `mixer`, which stands at `path`, reads a constant stream: an encoder has none, for there later tokens change it."""
    for name, part in mixer.parts().items():
        yield from encoder_problems(part, f"{path}.{name}")
    if getattr(mixer, "qk_source", None) == CONSTANT:
        what = "the constant stream is of causal language models: in an encoder its length would change it"
        yield Problem(
            f"{path}.qk_source", what, "position, or kind: causal_lm in model", "conflicting-fields"
        )


def token_problems(fields: Mapping[str, Any]) -> Iterator[Problem]:
    """Constant tokens that are none of the vocabulary, among the fields of a model; fields that are not known are left out."""
    vocab_size, tokens = fields.get("vocab_size"), fields.get("constant_tokens") or ()
    for index, token in enumerate(tokens):
        if vocab_size is not None and token >= vocab_size:
            what = f"token {token} is none of a vocabulary of {vocab_size}"
            yield Problem(f"constant_tokens.{index}", what, f"ids from 0 to {vocab_size - 1}", "out-of-range")
            return
