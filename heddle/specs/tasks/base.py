"""What the tasks of a search share: their common fields, and what each tells the checks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from heddle.specs.base import Count, Schema

Tokens = Annotated[Count | None, Field(description="Tokens to train on; null: train.tokens.")]
Rate = Annotated[
    float | None, Field(gt=0, le=10, description="Highest learning rate; null: train.learning_rate.")
]
Rates = Annotated[
    list[Annotated[float, Field(gt=0, le=10)]] | None,
    Field(
        min_length=2,
        max_length=16,
        description="Learning rates, rising: each is trained, and the best score counts; null: learning_rate alone.",
    ),
]
Length = Annotated[int, Field(ge=4, le=10**6, description="Tokens of a sequence.")]
# A field, what is wrong with it, and what would be right.
Misfit = tuple[str, str, str]


def counted(most: int, description: str, *, least: int = 1) -> Any:
    """The limits of a field that counts something."""
    return Field(ge=least, le=most, description=description)


class TaskSchema(Schema):
    """What every task tells the checks; a task of the user's own data asks for nothing."""

    fewer: ClassVar[str] = "fewer symbols"
    # The kind of model that can be trained for it.
    model_kind: ClassVar[Literal["causal_lm", "encoder"]] = "causal_lm"
    needs_readout: ClassVar[bool] = False

    @property
    def told(self) -> str:
        """The task in a message."""
        return str(getattr(self, "kind", ""))

    @property
    def ids(self) -> int:
        """Token ids it needs: 0 … ids - 1."""
        return 0

    @property
    def back(self) -> int:
        """How many tokens back what an answer rests on may stand; 0: nothing is asked for."""
        return 0

    def classes(self, vocab_size: int) -> int:
        """Classes that a readout must have to answer it."""
        return vocab_size

    def misfits(self) -> Iterator[Misfit]:
        """Fields that do not go together."""
        yield from ()
