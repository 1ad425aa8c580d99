"""Repeat a string after its end (arXiv 2402.01032)."""

from __future__ import annotations

import torch
from torch import Tensor

from heddle.compose.train import IGNORE
from heddle.search.tasks.drawing import uniform
from heddle.search.tasks.generated import Generated
from heddle.specs.tasks import CopyingTask


class Copying(Generated[CopyingTask]):
    """n random symbols, a separator, and the symbols again but the last: from the separator on each target is the next
    symbol of the copy.

    Ids: symbols from 0, then the separator; T = 2n. Attention copies any length with a state that grows; a recurrent
    mixer needs a state of n · log2(symbols) bits.

    Chance: one of the symbols.
    """

    name = "copying"

    def __init__(self, spec: CopyingTask, *, vocab_size: int) -> None:
        super().__init__(spec, vocab_size=vocab_size, sequence_length=2 * spec.data_tokens)
        self.chance = 1.0 / spec.symbols

    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        data = uniform(self.spec.symbols, (batch, self.spec.data_tokens), generator)
        separator = torch.full_like(data[:, :1], self.spec.symbols)
        inputs = torch.cat([data, separator, data[:, :-1]], dim=1)
        return inputs, torch.cat([torch.full_like(data, IGNORE), data], dim=1)

    def solve(self, row: list[int]) -> list[int]:
        end = row.index(self.spec.symbols)
        return [IGNORE] * end + row[:end]

    def lags(self, row: list[int]) -> list[int]:
        end = row.index(self.spec.symbols)
        return [0] * end + [end] * end

    def guess(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        return torch.randint(self.spec.symbols, inputs.shape, generator=generator)
