"""Tasks of state tracking: what have all tokens so far come to?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from heddle.specs.tasks.base import Length, Misfit, Rate, Rates, TaskSchema, TestLengths, Tokens

# Elements of the groups of `word_problem`.
GROUP_ORDERS = {"S3": 6, "S5": 120, "A5": 60, "Z60": 60, "A4xZ5": 60}


class ParityTask(TaskSchema):
    """Running parity of bits (state tracking; arXiv 2411.12537)."""

    kind: Literal["parity"] = "parity"
    length: Length = 32
    test_lengths: TestLengths = None
    tokens: Tokens = None
    learning_rate: Rate = None
    learning_rates: Rates = None

    @property
    def ids(self) -> int:
        return 2

    @property
    def back(self) -> int:
        return self.length - 1


class WordProblemTask(TaskSchema):
    """Running product of the elements of a finite group (state tracking; arXiv 2404.08819)."""

    fewer: ClassVar[str] = "a smaller group"
    kind: Literal["word_problem"] = "word_problem"
    group: Annotated[Literal["S3", "S5", "A5", "Z60", "A4xZ5"], Field(description="The group.")] = "S5"
    moves: Annotated[
        Literal["all", "swaps"],
        Field(description="Tokens: all elements, or the identity and the swaps of two, for S3 and S5."),
    ] = "all"
    length: Length = 16
    test_lengths: TestLengths = None
    tokens: Tokens = None
    learning_rate: Rate = None
    learning_rates: Rates = None

    @property
    def ids(self) -> int:
        return GROUP_ORDERS[self.group]

    @property
    def back(self) -> int:
        return self.length - 1

    def misfits(self) -> Iterator[Misfit]:
        if self.moves == "swaps" and not self.group.startswith("S"):
            yield (
                "moves",
                f"no element of {self.group} swaps two and leaves the rest",
                "moves: all, or group: S5",
            )


class ModularArithmeticTask(TaskSchema):
    """Value of a sum of products and differences of digits, modulo 5 (arXiv 2207.02098)."""

    kind: Literal["modular_arithmetic"] = "modular_arithmetic"
    length: Annotated[
        int, Field(ge=4, le=10**4, description="Tokens of a sequence: digits, operators and =.")
    ] = 32
    test_lengths: TestLengths = None
    tokens: Tokens = None
    learning_rate: Rate = None
    learning_rates: Rates = None

    @property
    def ids(self) -> int:
        return 9

    @property
    def back(self) -> int:
        return self.length - 1

    def misfits(self) -> Iterator[Misfit]:
        if self.length % 2:
            what = f"digits, the operators between them and = are an even number, not {self.length}"
            yield "length", what, f"length: {self.length + 1}"
