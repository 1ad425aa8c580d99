"""The most frequent words of a sequence whose counts fall by a power law (RULER, arXiv 2404.06654)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from heddle.compose.train import IGNORE
from heddle.search.tasks.drawing import distinct, picked
from heddle.search.tasks.generated import Generated
from heddle.specs.tasks import FrequentWordsTask


class FrequentWords(Generated[FrequentWordsTask]):
    """RULER's frequent words with tokens for words: like `common_words` a histogram, but of counts that lie near each other.

    Ids: the marks of the answers 1 … k, the noise, then words. The word of rank r stands as often as the zeta law says,

        c_r = ⌊N · r^-alpha / ζ(alpha)⌋,   r = 2, 3, … while c_r ≥ 1,

    of N = T - k tokens in random order; the noise, rank 1, takes those that are left, as RULER's "..." does. Then follow the k
    marks, and the target of mark i is the i-th most frequent word behind the noise. RULER takes them in any order.

    Chance: one of the words written.

    Extras: `drawn_token_accuracy`, what one scores who names a random one of the tokens that are words.
    """

    name = "frequent_words"

    def __init__(self, spec: FrequentWordsTask, *, vocab_size: int) -> None:
        super().__init__(spec, vocab_size=vocab_size, sequence_length=spec.length)
        self.chance = 1.0 / len(spec.counts)
        self._first_word = spec.answers + 1

    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        s, device = self.spec, generator.device
        counts, context = torch.tensor(s.counts, device=device), s.length - s.answers
        words = self._first_word + distinct(batch, s.symbols, len(s.counts), generator)
        inputs = torch.full((batch, s.length), s.answers, device=device)
        told = words.repeat_interleave(counts, dim=1, output_size=sum(s.counts))
        places = torch.rand(batch, context, generator=generator, device=device).argsort(dim=1)
        inputs.scatter_(1, places[:, : told.shape[1]], told)
        inputs[:, context:] = torch.arange(s.answers, device=device)
        targets = torch.full_like(inputs, IGNORE)
        targets[:, context:] = words[:, : s.answers]
        return inputs, targets

    def solve(self, row: list[int]) -> list[int]:
        k = self.spec.answers
        counts = Counter(token for token in row if token >= self._first_word)
        return [IGNORE] * (len(row) - k) + [word for word, _ in counts.most_common(k)]

    def lags(self, row: list[int]) -> list[int]:
        context = len(row) - self.spec.answers
        return [0] * context + list(range(context, len(row)))

    def guess(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        written = [sorted({token for token in row if token >= self._first_word}) for row in inputs.tolist()]
        return picked(written, inputs.shape[1], generator)

    def baselines(self, inputs: Tensor, targets: Tensor) -> Mapping[str, float]:  # noqa: ARG002
        counts = self.spec.counts
        return {"drawn_token_accuracy": sum(counts[: self.spec.answers]) / self.spec.answers / sum(counts)}
