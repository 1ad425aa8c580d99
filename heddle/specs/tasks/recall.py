"""Tasks of recall: what stood beside a key before?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from heddle.specs.tasks.base import Length, Misfit, Rate, Rates, TaskSchema, TestLengths, Tokens, counted


class MqarTask(TaskSchema):
    """Multi-query associative recall (arXiv 2312.04927), generated as it is needed; scored by accuracy."""

    fewer: ClassVar[str] = "fewer pairs"
    kind: Literal["mqar"] = "mqar"
    pairs: Annotated[int, Field(ge=1, le=65_536, description="Key-value pairs of a sequence (a count).")] = 8
    length: Annotated[
        int,
        Field(
            ge=4,
            le=10**6,
            description="Tokens of a sequence, at least (key_tokens + 1) × (2 × pairs + overwritten).",
        ),
    ] = 64
    overwritten: Annotated[
        int,
        Field(
            ge=0,
            le=65_536,
            description="Further pairs that tell one of the keys again (a count); the value told last is asked for.",
        ),
    ] = 0
    key_tokens: Annotated[
        Literal[1, 2],
        Field(description="Tokens of a key; of two, each is shared by some √pairs keys."),
    ] = 1
    easy_first: Annotated[
        float,
        Field(
            ge=0,
            lt=1,
            description=(
                "The share of a training's steps that come first and have an eighth of the pairs in an eighth of the length: "
                "most small models leave the plateau of full rows by luck alone."
            ),
        ),
    ] = 0.0
    tokens: Tokens = None
    learning_rate: Rate = None
    learning_rates: Rates = None

    @property
    def told(self) -> str:
        again = f" and {self.overwritten} told again" if self.overwritten else ""
        return f"mqar with {self.pairs} pairs{again}"

    @property
    def ids(self) -> int:
        # A vocabulary of V has V/2 - 1 tokens for keys; the rest are values and the filler.
        keys = self.pairs if self.key_tokens == 1 else 2 * (math.isqrt(self.pairs - 1) + 1)
        return max(2 * (keys + 1), 2 * (self.pairs + self.overwritten) - 1)

    @property
    def back(self) -> int:
        return self.length - 1

    def misfits(self) -> Iterator[Misfit]:
        pair = self.key_tokens + 1
        least = pair * (2 * self.pairs + self.overwritten)
        if least > self.length:
            fewer = (self.length // pair - self.overwritten) // 2
            again = f" and {self.overwritten} told again" if self.overwritten else ""
            what = f"{self.pairs} pairs{again} need {least} tokens, and length is {self.length}"
            yield "pairs", what, f"length: {least}" + (f", or pairs: {fewer}" if fewer > 0 else "")


class InContextRecallTask(TaskSchema):
    """Recall of values that keys were followed by before, in a stream of pairs with or without noise (MAD, arXiv 2403.17844)."""

    fewer: ClassVar[str] = "fewer keys, values or noise_symbols"
    kind: Literal["in_context_recall"] = "in_context_recall"
    keys: Annotated[int, counted(4096, "Keys (a count); each has a value in every sequence.")] = 8
    values: Annotated[int, counted(4096, "Values (a count), at least `keys`.")] = 8
    length: Length = 128
    noise: Annotated[
        float,
        Field(ge=0, le=0.9, description="Share of the pairs that are noise; MAD's noisy recall has 0.2."),
    ] = 0.0
    noise_symbols: Annotated[int, counted(4096, "Symbols of the noise (a count).")] = 16
    tokens: Tokens = None
    learning_rate: Rate = None
    learning_rates: Rates = None

    @property
    def ids(self) -> int:
        return self.keys + self.values + (self.noise_symbols if self.noise_slots else 0)

    @property
    def slots(self) -> int:
        """Pairs of a sequence, noise included."""
        return self.length // 2

    @property
    def noise_slots(self) -> int:
        """Pairs that are noise."""
        return round(self.noise * self.slots)

    @property
    def asked(self) -> int:
        """Pairs whose value is asked for: the later half of those that are no noise."""
        return (self.slots - self.noise_slots) // 2

    @property
    def back(self) -> int:
        return self.length - 2

    def misfits(self) -> Iterator[Misfit]:
        if self.length % 2:
            yield "length", f"{self.length} tokens are no whole pairs", f"length: {self.length + 1}"
        clean = self.slots - self.noise_slots
        if clean - self.asked < self.keys:
            what = f"{clean} pairs without noise show {clean - self.asked} before the first question, {self.keys} keys need more"
            yield "length", what, "a greater length, fewer keys, or less noise"
        if self.values < self.keys:
            what = f"{self.values} values cannot differ for {self.keys} keys"
            yield "values", what, f"values: {self.keys}, or keys: {self.values}"


class FuzzyRecallTask(TaskSchema):
    """Recall where keys and values are one to three tokens long (MAD, arXiv 2403.17844)."""

    fewer: ClassVar[str] = "fewer key_symbols or value_symbols"
    kind: Literal["fuzzy_recall"] = "fuzzy_recall"
    key_symbols: Annotated[int, counted(16, "Symbols that keys are made of (a count).", least=3)] = 7
    value_symbols: Annotated[int, counted(16, "Symbols that values are made of (a count).", least=3)] = 7
    pairs: Annotated[int, counted(1024, "Different keys of a sequence (a count).")] = 8
    length: Length = 128
    tokens: Tokens = None
    learning_rate: Rate = None
    learning_rates: Rates = None

    @property
    def ids(self) -> int:
        return 1 + self.key_symbols + self.value_symbols

    @property
    def slots(self) -> int:
        """Pairs shown before the question, which takes five tokens; a pair takes six at most."""
        return (self.length - 5) // 6

    @property
    def back(self) -> int:
        return self.length - 1

    def misfits(self) -> Iterator[Misfit]:
        if self.slots < self.pairs:
            what = f"{self.pairs} pairs and a question need {6 * self.pairs + 5} tokens, and length is {self.length}"
            yield "pairs", what, f"length: {6 * self.pairs + 5}, or pairs: {max(1, self.slots)}"
        n = self.key_symbols
        keys = n + n * (n - 1) + n * (n - 1) * (n - 2)
        if self.pairs > keys:
            yield "pairs", f"{n} symbols make {keys} keys, not {self.pairs}", f"pairs: {keys}"


class NiahTask(TaskSchema):
    """Needles in a haystack: the value of one key among noise and other needles (RULER, arXiv 2404.06654)."""

    fewer: ClassVar[str] = "fewer keys, values or noise_symbols"
    kind: Literal["niah"] = "niah"
    needles: Annotated[int, counted(4096, "Needles in the haystack (a count); one is asked for.")] = 1
    width: Annotated[int, counted(4, "Tokens of a key, and of a value.")] = 1
    keys: Annotated[int, counted(4096, "Symbols of the keys (a count).")] = 16
    values: Annotated[int, counted(4096, "Symbols of the values (a count).", least=2)] = 16
    noise_symbols: Annotated[int, counted(4096, "Symbols of the noise (a count).")] = 32
    length: Length = 512
    test_lengths: TestLengths = None
    tokens: Tokens = None
    learning_rate: Rate = None
    learning_rates: Rates = None

    @property
    def ids(self) -> int:
        return 2 + self.keys + self.values + self.noise_symbols

    @property
    def back(self) -> int:
        return self.length - 1

    @property
    def least(self) -> int:
        """Tokens of the needles and of the question."""
        return self.needles * (2 * self.width + 2) + 2 * self.width + 1

    def misfits(self) -> Iterator[Misfit]:
        if self.length < self.least:
            what = (
                f"{self.needles} needles and a question need {self.least} tokens, and length is {self.length}"
            )
            yield "needles", what, f"length: {self.least}, or fewer needles"
        different = self.keys**self.width
        if self.needles > different:
            what = f"{self.keys} symbols make {different} keys, not {self.needles}"
            yield "keys", what, f"keys: {math.ceil(self.needles ** (1 / self.width))}, or fewer needles"


class VariableTrackingTask(TaskSchema):
    """The constant behind a variable, over several hops, among other chains (RULER, arXiv 2404.06654)."""

    fewer: ClassVar[str] = "fewer names or constants"
    kind: Literal["variable_tracking"] = "variable_tracking"
    hops: Annotated[int, counted(64, "Assignments between the constant and the variable asked for.")] = 3
    chains: Annotated[int, counted(1024, "Chains (a count); one is asked for.", least=2)] = 4
    names: Annotated[int, counted(4096, "Names of variables (a count).")] = 32
    constants: Annotated[int, counted(4096, "Constants (a count).", least=2)] = 16
    length: Length = 256
    test_lengths: TestLengths = None
    tokens: Tokens = None
    learning_rate: Rate = None
    learning_rates: Rates = None

    @property
    def ids(self) -> int:
        return 4 + self.names + self.constants

    @property
    def back(self) -> int:
        return self.length - 2

    @property
    def facts(self) -> int:
        """Statements of a sequence, three tokens each."""
        return self.chains * (self.hops + 1)

    def misfits(self) -> Iterator[Misfit]:
        least = 3 * self.facts + 2
        if self.length < least:
            what = f"{self.facts} statements and a question need {least} tokens, and length is {self.length}"
            yield "chains", what, f"length: {least}, or fewer chains or hops"
        if self.names < self.facts:
            what = f"{self.chains} chains of {self.hops} hops name {self.facts} variables, and names is {self.names}"
            yield "names", what, f"names: {self.facts}"
        if self.constants < self.chains:
            what = f"{self.chains} chains end at as many constants, and constants is {self.constants}"
            yield "constants", what, f"constants: {self.chains}"


class MultiHopRecallTask(TaskSchema):
    """Lookups one after the other in a permutation that the sequence tells: f(k), f(f(k)), … (arXiv 2402.08164, 2412.02975)."""

    fewer: ClassVar[str] = "fewer symbols or hops"
    kind: Literal["multi_hop_recall"] = "multi_hop_recall"
    facts: Annotated[int, counted(4096, "Facts of a sequence (a count), more than 2 × hops.", least=3)] = 16
    hops: Annotated[int, counted(64, "Answers to a question (a count), each one lookup deeper.")] = 3
    questions: Annotated[int, counted(4096, "Questions of a sequence (a count), at most `facts`.")] = 8
    symbols: Annotated[
        int, counted(65_536, "Symbols that facts are made of (a count), at least `facts`.", least=3)
    ] = 64
    easy_first: Annotated[
        float,
        Field(
            ge=0,
            lt=1,
            description="The share of a training's steps that come first and have an eighth of the facts and questions.",
        ),
    ] = 0.0
    tokens: Tokens = None
    learning_rate: Rate = None
    learning_rates: Rates = None

    @property
    def ids(self) -> int:
        return self.hops + self.symbols

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return 3 * self.facts + self.questions * self.hops

    @property
    def back(self) -> int:
        return self.length - 1

    def misfits(self) -> Iterator[Misfit]:
        if self.facts <= 2 * self.hops:
            what = f"{self.hops} hops in a cycle of {self.facts} facts are as near backwards"
            yield "facts", what, f"facts: {2 * self.hops + 1}, or fewer hops"
        if self.questions > self.facts:
            what = f"{self.questions} questions ask for different keys, and facts is {self.facts}"
            yield "questions", what, f"questions: {self.facts}, or facts: {self.questions}"
        if self.symbols < self.facts:
            what = f"{self.facts} facts name as many symbols, and symbols is {self.symbols}"
            yield "symbols", what, f"symbols: {self.facts}"
