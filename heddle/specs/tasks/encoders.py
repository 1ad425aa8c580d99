"""Tasks of encoders, which see a sequence whole: what stood where it is masked, and what class it is of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from heddle.specs.tasks.base import Misfit, Rate, Rates, TaskSchema, Tokens, counted


class MaskedBytesTask(TaskSchema):
    """Masked language modelling on `data` (BERT, arXiv 1810.04805); scored in bits per byte of what is asked for.

    With a readout one byte of a window is masked, and the readout names it.
    """

    model_kind: ClassVar[Literal["causal_lm", "encoder"]] = "encoder"
    kind: Literal["masked_bytes"] = "masked_bytes"
    share: Annotated[
        float,
        Field(
            gt=0, le=1, description="Share of the tokens that is asked for; with a readout it is one token."
        ),
    ] = 0.15
    tokens: Tokens = None
    learning_rate: Rate = None
    learning_rates: Rates = None


class ParagraphTopicTask(TaskSchema):
    """The topic of most paragraphs of a document made of topics' words and common words, named by a readout."""

    fewer: ClassVar[str] = "fewer topics or words"
    model_kind: ClassVar[Literal["causal_lm", "encoder"]] = "encoder"
    needs_readout: ClassVar[bool] = True
    kind: Literal["paragraph_topic"] = "paragraph_topic"
    topics: Annotated[int, counted(4096, "Topics, the classes (a count).", least=2)] = 4
    topic_words: Annotated[int, counted(4096, "Words of each topic (a count).")] = 4
    common_words: Annotated[int, counted(65_536, "Words that are of no topic (a count).")] = 32
    paragraphs: Annotated[int, counted(65_536, "Paragraphs of a document (a count).")] = 8
    paragraph_length: Annotated[
        int, counted(65_536, "Tokens of a paragraph, its mark included.", least=2)
    ] = 8
    majority: Annotated[
        int, counted(65_536, "Paragraphs of the topic asked for; every other topic has fewer.", least=2)
    ] = 3
    tokens: Tokens = None
    learning_rate: Rate = None
    learning_rates: Rates = None

    @property
    def ids(self) -> int:
        return 1 + self.topics * self.topic_words + self.common_words

    def classes(self, vocab_size: int) -> int:  # noqa: ARG002
        return self.topics

    def misfits(self) -> Iterator[Misfit]:
        if self.majority > self.paragraphs:
            what = f"{self.paragraphs} paragraphs are no {self.majority}"
            yield "majority", what, f"majority: {self.paragraphs}, or paragraphs: {self.majority}"
            return
        most = self.majority + (self.topics - 1) * (self.majority - 1)
        if self.paragraphs > most:
            what = f"{self.topics} topics with fewer than {self.majority} paragraphs each but one fill no {self.paragraphs}"
            yield "paragraphs", what, f"paragraphs: {most}, or a larger majority"
