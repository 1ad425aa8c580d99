"""The most frequent word of a sequence (RULER, arXiv 2404.06654)."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from heddle.compose.train import IGNORE
from heddle.search.tasks.drawing import distinct, picked
from heddle.search.tasks.generated import Generated
from heddle.specs.tasks import CommonWordsTask

ASK = 0


class CommonWords(Generated[CommonWordsTask]):
    """RULER's common words with tokens for words and one word to name: the control, in which a mean over all tokens is
    enough and attention must not win.

    Ids: 0 asks, then words. A sequence holds `words` different ones in random order, one of them `common_repeats` times,
    the others `repeats` times; at the asking token, the last, the target is the common one.

    Chance: one of the words written.
    """

    name = "common_words"

    def __init__(self, spec: CommonWordsTask, *, vocab_size: int) -> None:
        super().__init__(spec, vocab_size=vocab_size, sequence_length=spec.back + 1)
        self.chance = 1.0 / spec.words

    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        s, device = self.spec, generator.device
        words = 1 + distinct(batch, s.symbols, s.words, generator)
        often = torch.full((s.words,), s.repeats, device=device)
        often[0] = s.common_repeats
        text = words.repeat_interleave(often, dim=1, output_size=s.back)
        order = torch.rand(text.shape, generator=generator, device=device).argsort(dim=1)
        inputs = torch.cat([text.gather(1, order), torch.full_like(words[:, :1], ASK)], dim=1)
        targets = torch.full_like(inputs, IGNORE)
        targets[:, -1] = words[:, 0]
        return inputs, targets

    def solve(self, row: list[int]) -> list[int]:
        return [IGNORE] * (len(row) - 1) + [Counter(row).most_common(1)[0][0]]

    def lags(self, row: list[int]) -> list[int]:
        return [0] * (len(row) - 1) + [len(row) - 1]

    def guess(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        return picked([sorted(set(row) - {ASK}) for row in inputs.tolist()], inputs.shape[1], generator)
