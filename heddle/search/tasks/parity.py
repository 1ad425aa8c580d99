"""Running parity of bits: the smallest state that a model may track (arXiv 2411.12537)."""

from __future__ import annotations

from itertools import accumulate
from operator import xor

import torch
from torch import Tensor

from heddle.compose.train import IGNORE
from heddle.search.tasks.drawing import uniform
from heddle.search.tasks.generated import Generated
from heddle.specs.tasks import ParityTask


class Parity(Generated[ParityTask]):
    """y_t = x_1 ⊕ … ⊕ x_t of random bits x.

    Training labels every position. Scored are the later half of the positions: short prefixes can be learnt by heart. Needs
    a transition with a negative eigenvalue, or depth.

    Chance: 1/2.
    """

    name = "parity"

    def __init__(self, spec: ParityTask, *, vocab_size: int) -> None:
        super().__init__(spec, vocab_size=vocab_size, sequence_length=spec.length)
        self.chance = 0.5

    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        inputs, targets = self.lesson(batch, generator)
        targets[:, : self.spec.length // 2] = IGNORE
        return inputs, targets

    def lesson(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        bits = uniform(2, (batch, self.spec.length), generator)
        return bits, bits.cumsum(dim=1) % 2

    def solve(self, row: list[int]) -> list[int]:
        return list(accumulate(row, xor))

    def lags(self, row: list[int]) -> list[int]:
        return list(range(len(row)))

    def guess(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        return torch.randint(2, inputs.shape, generator=generator)
