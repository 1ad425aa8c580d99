"""What a kind of model can be trained at, and timed in."""

from __future__ import annotations

from collections.abc import Sequence

from heddle.errors import HeddleError
from heddle.specs import MaskedBytesTask, SpecFile, TaskSpec, TextTask


def text_task_of(file: SpecFile) -> TaskSpec:
    """The task that trains the spec's model on the text of its `data`.

    Raises:
        HeddleError: "conflicting-fields", at `model.readout.classes`, for a readout that cannot name every token.
    """
    model = file.spec.model
    if model.kind == "causal_lm":
        return TextTask()
    if model.readout is not None and model.readout.classes < model.vocab_size:
        what = (
            f"an encoder is trained on masked text, of {model.vocab_size} tokens, and this readout tells "
            f"{model.readout.classes} classes apart"
        )
        hint = f"classes: {model.vocab_size}, no readout, or heddle.compose.train for data of your own"
        where = file.where("model.readout.classes")
        raise HeddleError("conflicting-fields", what, where=where, hint=hint)
    return MaskedBytesTask()


def phases_of(file: SpecFile, phases: Sequence[str]) -> tuple[str, ...]:
    """Those of `phases` that the spec's model has: an encoder decodes nothing.

    Raises:
        HeddleError: "conflicting-fields", at `model.kind`, if none is left.
    """
    if file.spec.model.kind == "causal_lm":
        return tuple(phases)
    left = tuple(phase for phase in phases if phase != "decode")
    if not left:
        what, hint = "an encoder decodes nothing, and no other phase is asked for", "prefill or train"
        raise HeddleError("conflicting-fields", what, where=file.where("model.kind"), hint=hint)
    return left
