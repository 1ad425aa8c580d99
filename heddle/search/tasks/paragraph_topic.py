"""Which topic most paragraphs of a document have: a label that stands nowhere in it (the task of arXiv 2509.15448's kind)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from heddle.search.tasks.drawing import distinct, uniform
from heddle.search.tasks.generated import Generated
from heddle.specs.tasks import ParagraphTopicTask


class ParagraphTopic(Generated[ParagraphTopicTask]):
    """A document of paragraphs, each of one topic; the class is the topic of most paragraphs.

    Ids: 0 begins a paragraph, then the words of the first topic, of the second …, then common words. `majority` paragraphs are of
    the topic asked for, every other topic has fewer, and their order is random. A paragraph holds 1 to all words of its topic,
    each number equally likely, the rest are common ones, in random order. So a topic with few but wordy paragraphs may have more
    words than the one asked for: words have to be gathered by paragraphs.

    Extras: `word_count_accuracy`, what one scores who counts the words of the document and no paragraphs.

    Chance: one of the topics.

    Shapes:  inputs: [B, paragraphs · paragraph_length];  targets: [B, 1]
    """

    name = "paragraph_topic"

    def __init__(self, spec: ParagraphTopicTask, *, vocab_size: int) -> None:
        super().__init__(spec, vocab_size=vocab_size, sequence_length=spec.paragraphs * spec.paragraph_length)
        self.chance = 1.0 / spec.topics

    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        s, words = self.spec, self.spec.paragraph_length - 1
        asked = uniform(s.topics, (batch, 1), generator)
        topics = self._topics_with(asked, generator)
        shape = (batch, s.paragraphs, words)
        of_topic = 1 + topics[:, :, None] * s.topic_words + uniform(s.topic_words, shape, generator)
        common = 1 + s.topics * s.topic_words + uniform(s.common_words, shape, generator)
        count = 1 + uniform(words, (batch, s.paragraphs, 1), generator)
        ranks = torch.rand(shape, generator=generator, device=generator.device).argsort(dim=-1)
        text = torch.where(ranks < count, of_topic, common)
        inputs = torch.cat([torch.zeros_like(text[:, :, :1]), text], dim=-1).flatten(1)
        return inputs, asked

    def solve(self, row: list[int]) -> list[int]:
        size = self.spec.paragraph_length
        paragraphs = [row[start : start + size] for start in range(0, len(row), size)]
        return [_commonest([_commonest(self._topics_of(one)) for one in paragraphs])]

    def lags(self, row: list[int]) -> list[int]:
        return [len(row) - 1]

    def guess(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        return torch.randint(self.spec.topics, (len(inputs), 1), generator=generator)

    def baselines(self, inputs: Tensor, targets: Tensor) -> Mapping[str, float]:
        counted = [_commonest(self._topics_of(row)) for row in inputs.tolist()]
        hits = torch.tensor(counted)[:, None] == targets.cpu()
        return {"word_count_accuracy": float(hits.double().mean())}

    def _topics_with(self, asked: Tensor, generator: torch.Generator) -> Tensor:
        """The topic of each paragraph, those of `asked` [B, 1] in the majority. [B, paragraphs]"""
        s, batch, fewer = self.spec, len(asked), self.spec.majority - 1
        others = distinct(batch, (s.topics - 1) * fewer, s.paragraphs - s.majority, generator) // fewer
        others = others + (others >= asked)
        topics = torch.cat([asked.expand(-1, s.majority), others], dim=1)
        return topics.gather(1, distinct(batch, s.paragraphs, s.paragraphs, generator))

    def _topics_of(self, words: list[int]) -> list[int]:
        """The topics of the words that have one."""
        s = self.spec
        return [(word - 1) // s.topic_words for word in words if 1 <= word <= s.topics * s.topic_words]


def _commonest(numbers: list[int]) -> int:
    return Counter(numbers).most_common(1)[0][0]
