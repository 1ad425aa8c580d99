"""Repeat the data that stand among blanks, in order (arXiv 2312.00752, 2403.17844)."""

from __future__ import annotations

import torch
from torch import Tensor

from heddle.compose.train import IGNORE
from heddle.search.tasks.drawing import places, uniform
from heddle.search.tasks.generated import Generated
from heddle.specs.tasks import SelectiveCopyingTask


class SelectiveCopying(Generated[SelectiveCopyingTask]):
    """Selective copying in the layout of MAD, with data anywhere among the blanks.

    Ids: symbols from 0, then the blank, then the token that asks for the copy. n random symbols stand at random places
    among the T - 2n - 1 blanks; then the asking token and n blanks, at which the targets are the symbols in order. A filter
    that is the same at all places cannot do it, since the gaps differ.

    Chance: one of the symbols.
    """

    name = "selective_copying"

    def __init__(self, spec: SelectiveCopyingTask, *, vocab_size: int) -> None:
        super().__init__(spec, vocab_size=vocab_size, sequence_length=spec.length)
        self.chance = 1.0 / spec.symbols
        self._context = spec.length - spec.data_tokens - 1

    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        s = self.spec
        data = uniform(s.symbols, (batch, s.data_tokens), generator)
        inputs = torch.full((batch, s.length), s.symbols, device=generator.device)
        inputs.scatter_(1, places(batch, self._context, s.data_tokens, generator), data)
        inputs[:, self._context] = s.symbols + 1
        targets = torch.full_like(inputs, IGNORE)
        targets[:, self._context + 1 :] = data
        return inputs, targets

    def solve(self, row: list[int]) -> list[int]:
        data = [token for token in row[: self._context] if token < self.spec.symbols]
        return [IGNORE] * (self._context + 1) + data

    def lags(self, row: list[int]) -> list[int]:
        where = [place for place, token in enumerate(row[: self._context]) if token < self.spec.symbols]
        first = self._context + 1
        return [0] * first + [first + index - place for index, place in enumerate(where)]

    def guess(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        return torch.randint(self.spec.symbols, inputs.shape, generator=generator)
