"""Which kinds of models can be trained, searched and timed: causal language models, since all tasks are theirs."""

from __future__ import annotations

from heddle.errors import HeddleError
from heddle.specs import SpecFile


def require_causal_lm(file: SpecFile, command: str) -> None:
    """Raises HeddleError "conflicting-fields", at `model.kind`, for a spec that `command` cannot work with."""
    if file.spec.model.kind == "encoder":
        what = f"heddle {command} works with causal language models, and this is an encoder"
        hint = "heddle.compose.build.build gives the module, for a training of your own"
        raise HeddleError("conflicting-fields", what, where=file.where("model.kind"), hint=hint)
