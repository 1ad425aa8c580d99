"""Needles in a haystack: the value of one key among noise and other needles (RULER, arXiv 2404.06654)."""

from __future__ import annotations

import torch
from torch import Tensor

from heddle.compose.train import IGNORE
from heddle.search.tasks.drawing import distinct, picked, places, uniform
from heddle.search.tasks.generated import Generated
from heddle.specs.tasks import NiahTask

KEY, VALUE = 0, 1


class Niah(Generated[NiahTask]):
    """RULER's needle in a haystack with tokens for words, teacher-forced and scored token by token.

    Ids: the marks KEY and VALUE, then the symbols of keys, of values, of the noise. With keys and values of m tokens a
    needle is KEY k1 … km VALUE v1 … vm; the needles of a sequence have different keys and stand at uniform depths in noise.
    At the end KEY k1 … km VALUE v1 … v(m-1) asks for one of them: the targets of the last m tokens are its value.

    Chance: a token of the value pool, or with several needles the value of one of them: 1/n + (1 - 1/n)/V.
    """

    name = "niah"

    def __init__(self, spec: NiahTask, *, vocab_size: int) -> None:
        super().__init__(spec, vocab_size=vocab_size, sequence_length=spec.length)
        alone = 1.0 / spec.values
        self.chance = alone if spec.needles == 1 else (1.0 + (spec.needles - 1) * alone) / spec.needles
        self._first_value = 2 + spec.keys
        self._question = spec.length - 2 * spec.width - 1

    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        s, m = self.spec, self.spec.width
        keys = 2 + _digits(distinct(batch, s.keys**m, s.needles, generator), s.keys, m)
        values = self._first_value + uniform(s.values, (batch, s.needles, m), generator)
        marks = torch.zeros(batch, s.needles, 1, dtype=torch.int64, device=generator.device)
        needles = torch.cat([marks + KEY, keys, marks + VALUE, values], dim=2)
        noise = s.length - s.least
        start = places(batch, noise + s.needles, s.needles, generator)
        start = start + (2 * m + 1) * torch.arange(s.needles, device=generator.device)
        where = start[..., None] + torch.arange(2 * m + 2, device=generator.device)
        inputs = self._first_value + s.values + uniform(s.noise_symbols, (batch, s.length), generator)
        inputs.scatter_(1, where.flatten(1), needles.flatten(1))
        asked = uniform(s.needles, (batch, 1, 1), generator).expand(-1, 1, 2 * m + 2)
        asked = needles.gather(1, asked).squeeze(1)
        inputs[:, self._question :] = asked[:, :-1]
        targets = torch.full_like(inputs, IGNORE)
        targets[:, -m:] = asked[:, -m:]
        return inputs, targets

    def solve(self, row: list[int]) -> list[int]:
        m, start = self.spec.width, self._needle(row)
        return [IGNORE] * (len(row) - m) + row[start + m + 2 : start + 2 * m + 2]

    def lags(self, row: list[int]) -> list[int]:
        m, start = self.spec.width, self._needle(row)
        return [0] * (len(row) - m) + [len(row) - m + index - start for index in range(m)]

    def guess(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        s, m = self.spec, self.spec.width
        if s.needles == 1:
            return self._first_value + torch.randint(s.values, inputs.shape, generator=generator)
        answers = torch.zeros(inputs.shape, dtype=torch.int64)
        rows = [self._starts(row) for row in inputs.tolist()]
        chosen = picked(rows, 1, generator)
        answers[:, -m:] = inputs.cpu().gather(1, chosen + m + 2 + torch.arange(m))
        return answers

    def _starts(self, row: list[int]) -> list[int]:
        return [place for place, token in enumerate(row[: self._question]) if token == KEY]

    def _needle(self, row: list[int]) -> int:
        """Where the needle stands that the question asks for."""
        asked = row[self._question + 1 : self._question + 1 + self.spec.width]
        (found,) = (
            place for place in self._starts(row) if row[place + 1 : place + 1 + self.spec.width] == asked
        )
        return found


def _digits(numbers: Tensor, base: int, width: int) -> Tensor:
    """The digits of numbers below base**width. [..., width]"""
    powers = base ** torch.arange(width, device=numbers.device)
    return numbers[..., None] // powers % base
