"""Say what followed the special token when it first stood (arXiv 2209.11895, 2312.00752)."""

from __future__ import annotations

import torch
from torch import Tensor

from heddle.compose.train import IGNORE
from heddle.search.tasks.drawing import uniform
from heddle.search.tasks.generated import Generated
from heddle.specs.tasks import InductionHeadsTask


class InductionHeads(Generated[InductionHeadsTask]):
    """Random symbols; the special token stands once at a random place and again at the end, where the target is the
    token that followed it.

    Ids: symbols from 0, then the special token. One question a sequence. Two layers of attention can do it, or one
    behind a short convolution.

    Chance: one of the symbols.
    """

    name = "induction_heads"

    def __init__(self, spec: InductionHeadsTask, *, vocab_size: int) -> None:
        super().__init__(spec, vocab_size=vocab_size, sequence_length=spec.length)
        self.chance = 1.0 / spec.symbols

    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        s = self.spec
        inputs = uniform(s.symbols, (batch, s.length), generator)
        place = uniform(s.length - 2, (batch, 1), generator)
        inputs.scatter_(1, place, s.symbols)
        inputs[:, -1] = s.symbols
        targets = torch.full_like(inputs, IGNORE)
        targets[:, -1:] = inputs.gather(1, place + 1)
        return inputs, targets

    def solve(self, row: list[int]) -> list[int]:
        return [IGNORE] * (len(row) - 1) + [row[row.index(self.spec.symbols) + 1]]

    def lags(self, row: list[int]) -> list[int]:
        return [0] * (len(row) - 1) + [len(row) - 1 - row.index(self.spec.symbols)]

    def guess(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        return torch.randint(self.spec.symbols, inputs.shape, generator=generator)
