"""What the tasks of a search share: their common fields, and what each tells the checks."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, ValidationError

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
TestLengths = Annotated[
    list[Annotated[int, Field(ge=4, le=10**6)]] | None,
    Field(
        min_length=1,
        max_length=8,
        description="Other lengths, rising, at which the trained model is scored too, beside the score; null: none.",
    ),
]
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
    # The field that `test_lengths` takes the place of, where a task has those.
    length_field: ClassVar[str] = "length"

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

    @property
    def other_lengths(self) -> list[int]:
        """Lengths beside its own at which a trained model is scored."""
        return list(getattr(self, "test_lengths", None) or ())

    def at_length(self, length: int) -> Self:
        """The same task with sequences of another length."""
        return self.model_copy(update={self.length_field: length, "test_lengths": None})

    def all_misfits(self) -> Iterator[Misfit]:
        """Fields that do not go together, also at the lengths of `test_lengths`."""
        own = list(self.misfits())
        yield from own
        lengths = self.other_lengths
        trained = getattr(self, self.length_field, None)
        if trained in lengths or any(low >= high for low, high in pairwise(lengths)):
            right = sorted(set(lengths) - {trained})
            what = f"they rise, and none is the {self.length_field} that is trained, {trained}"
            yield "test_lengths", what, f"test_lengths: {right or 'null'}"
        for length in [] if own else lengths:
            wrong = self._limit(length)
            found = [what for _, what, _ in self.at_length(length).misfits()] if wrong is None else [wrong]
            for what in found:
                yield "test_lengths", f"at {length}: {what}", f"lengths that fit, as {trained} does"

    def _limit(self, length: int) -> str | None:
        """What the field that a length stands for has against it."""
        try:
            type(self).model_validate(self.at_length(length).model_dump())
        except ValidationError as error:
            return f"{self.length_field}: {error.errors()[0]['msg']}"
        return None
