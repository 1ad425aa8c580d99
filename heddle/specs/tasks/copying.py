"""Tasks of copying: what stood at a place before, in the same order?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from heddle.specs.tasks.base import Length, Misfit, Rate, Rates, TaskSchema, TestLengths, Tokens, counted


class SelectiveCopyingTask(TaskSchema):
    """Repeat the data among blanks, in order (arXiv 2312.00752; the layout is MAD's, arXiv 2403.17844)."""

    kind: Literal["selective_copying"] = "selective_copying"
    symbols: Annotated[int, counted(65_536, "Symbols of the data (a count).", least=2)] = 14
    data_tokens: Annotated[int, counted(65_536, "Tokens to copy (a count).")] = 16
    length: Length = 256
    test_lengths: TestLengths = None
    tokens: Tokens = None
    learning_rate: Rate = None
    learning_rates: Rates = None

    @property
    def ids(self) -> int:
        return self.symbols + 2

    @property
    def back(self) -> int:
        return self.length - self.data_tokens

    def misfits(self) -> Iterator[Misfit]:
        least = 2 * self.data_tokens + 1
        if self.length < least:
            what = (
                f"{self.data_tokens} tokens and their copy need {least} tokens, and length is {self.length}"
            )
            yield "data_tokens", what, f"length: {least}, or data_tokens: {(self.length - 1) // 2}"


class InductionHeadsTask(TaskSchema):
    """Say what followed the special token when it first stood (arXiv 2209.11895, 2312.00752)."""

    kind: Literal["induction_heads"] = "induction_heads"
    symbols: Annotated[int, counted(65_536, "Symbols without the special one (a count).", least=2)] = 15
    length: Length = 64
    test_lengths: TestLengths = None
    tokens: Tokens = None
    learning_rate: Rate = None
    learning_rates: Rates = None

    @property
    def ids(self) -> int:
        return self.symbols + 1

    @property
    def back(self) -> int:
        return self.length - 1


class CopyingTask(TaskSchema):
    """Repeat a string after its end: the state of a recurrent mixer must hold all of it (arXiv 2402.01032)."""

    length_field: ClassVar[str] = "data_tokens"
    kind: Literal["copying"] = "copying"
    symbols: Annotated[int, counted(65_536, "Symbols of the string (a count).", least=2)] = 16
    data_tokens: Annotated[int, counted(10**5, "Tokens of the string (a count).", least=2)] = 32
    test_lengths: TestLengths = None
    tokens: Tokens = None
    learning_rate: Rate = None
    learning_rates: Rates = None

    @property
    def ids(self) -> int:
        return self.symbols + 1

    @property
    def back(self) -> int:
        return self.data_tokens
