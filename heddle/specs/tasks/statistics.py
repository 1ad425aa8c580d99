"""Tasks of weights and of averages: what is learnt by heart, what is counted, what is fitted."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from heddle.specs.tasks.base import Length, Misfit, Rate, Rates, TaskSchema, TestLengths, Tokens, counted


class TextTask(TaskSchema):
    """Language modelling on `data`; scored in bits per byte."""

    kind: Literal["text"] = "text"
    tokens: Tokens = None
    learning_rate: Rate = None
    learning_rates: Rates = None


class MemorizationTask(TaskSchema):
    """A fixed map of keys to values, held by weights alone: nothing in a sequence tells it (MAD, arXiv 2403.17844)."""

    fewer: ClassVar[str] = "fewer keys or values"
    kind: Literal["memorization"] = "memorization"
    keys: Annotated[int, counted(65_536, "Keys of the map (a count).")] = 127
    values: Annotated[int, counted(65_536, "Values of the map (a count).", least=2)] = 128
    length: Length = 32
    tokens: Tokens = None
    learning_rate: Rate = None
    learning_rates: Rates = None

    @property
    def ids(self) -> int:
        return 1 + self.keys + self.values

    @property
    def back(self) -> int:
        return 1

    def misfits(self) -> Iterator[Misfit]:
        if self.length % 2:
            what = f"{self.length} tokens are no whole pairs of a key and its question"
            yield "length", what, f"length: {self.length + 1}"


class CommonWordsTask(TaskSchema):
    """The most frequent word: a histogram, which needs no attention (RULER, arXiv 2404.06654)."""

    kind: Literal["common_words"] = "common_words"
    symbols: Annotated[int, counted(65_536, "Words to draw from (a count).", least=2)] = 64
    words: Annotated[int, counted(65_536, "Different words of a sequence (a count).", least=2)] = 16
    repeats: Annotated[int, counted(1000, "How often each word stands, but one.")] = 3
    common_repeats: Annotated[int, counted(10_000, "How often the common one stands.", least=2)] = 18
    tokens: Tokens = None
    learning_rate: Rate = None
    learning_rates: Rates = None

    @property
    def ids(self) -> int:
        return self.symbols + 1

    @property
    def back(self) -> int:
        return (self.words - 1) * self.repeats + self.common_repeats

    def misfits(self) -> Iterator[Misfit]:
        if self.words > self.symbols:
            what = f"{self.symbols} symbols are no {self.words} words"
            yield "words", what, f"symbols: {self.words}, or words: {self.symbols}"
        if self.common_repeats <= self.repeats:
            what = f"the common word stands {self.common_repeats} times, the others {self.repeats}"
            yield "common_repeats", what, f"common_repeats: {self.repeats + 1}"


class FrequentWordsTask(TaskSchema):
    """The most frequent words behind the noise, whose counts fall by a power law (RULER, arXiv 2404.06654)."""

    kind: Literal["frequent_words"] = "frequent_words"
    symbols: Annotated[int, counted(65_536, "Words to draw from (a count).", least=2)] = 64
    answers: Annotated[int, counted(64, "Words asked for (a count), the most frequent first.")] = 3
    alpha: Annotated[
        float, Field(gt=1, le=8, description="Exponent: the word of rank r stands in proportion to r^-alpha.")
    ] = 2.0
    length: Length = 256
    test_lengths: TestLengths = None
    tokens: Tokens = None
    learning_rate: Rate = None
    learning_rates: Rates = None

    @property
    def ids(self) -> int:
        return self.answers + 1 + self.symbols

    @property
    def back(self) -> int:
        return self.length - 1

    @property
    def counts(self) -> list[int]:
        """How often each word stands, from rank 2 on; rank 1 is the noise."""
        first = (self.length - self.answers) / zeta(self.alpha)
        found: list[int] = []
        while (
            len(found) <= self.symbols and (count := int(first * math.pow(len(found) + 2, -self.alpha))) > 0
        ):
            found.append(count)
        return found

    def misfits(self) -> Iterator[Misfit]:
        counts = self.counts
        if len(counts) > self.symbols:
            what = f"{self.symbols} symbols are too few words for {self.length} tokens"
            yield "symbols", what, "more symbols, a smaller length, or a larger alpha"
            return
        asked = counts[: self.answers + 1]
        if len(asked) <= self.answers or len(set(asked)) < len(asked):
            what = f"in {self.length} tokens the {self.answers + 1} most frequent words do not all stand differently often"
            yield "length", what, "a greater length, or fewer answers"


def zeta(alpha: float) -> float:
    """Σ n^-alpha over n = 1, 2, … for alpha > 1, by the sum of Euler and Maclaurin behind the first 63 terms."""
    n = 64
    head = math.fsum(math.pow(k, -alpha) for k in range(1, n))
    at_n = math.pow(n, -alpha)
    return head + at_n * (n / (alpha - 1) + 1 / 2 + alpha / (12 * n))


class InContextRegressionTask(TaskSchema):
    """Linear regression from examples in context (arXiv 2208.01066), its numbers written as tokens; scored by squared error."""

    fewer: ClassVar[str] = "fewer dimensions or levels"
    kind: Literal["in_context_regression"] = "in_context_regression"
    dimensions: Annotated[int, counted(10, "Dimensions of x, each +1 or -1 (a count).")] = 5
    examples: Annotated[int, counted(10**5, "Examples before the question (a count).")] = 40
    noise: Annotated[float, Field(gt=0, le=10, description="Variance of the noise of y.")] = 0.1
    levels: Annotated[int, counted(4096, "Values that y is rounded to (a count).", least=8)] = 64
    tokens: Tokens = None
    learning_rate: Rate = None
    learning_rates: Rates = None

    @property
    def ids(self) -> int:
        return int(2**self.dimensions) + self.levels

    @property
    def back(self) -> int:
        return 2 * self.examples
