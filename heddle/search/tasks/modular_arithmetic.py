"""Value of an expression of digits modulo 5 (arXiv 2207.02098)."""

from __future__ import annotations

import torch
from torch import Tensor

from heddle.compose.train import IGNORE
from heddle.search.tasks.drawing import generator_for, uniform
from heddle.search.tasks.generated import Generated
from heddle.search.tasks.task import seed_of
from heddle.specs.tasks import ModularArithmeticTask

MODULUS = 5
PLUS, MINUS, TIMES, EQUALS = 5, 6, 7, 8


class ModularArithmetic(Generated[ModularArithmeticTask]):
    """d op d op … d =, with the target at the last token: the value modulo 5, products before sums, no brackets.

    Ids: digits 0..4, then + - * and =. A training batch has a random number of digits from two to that of the held-out
    sequences: alone, the longest would teach nothing.

    Chance: the likeliest value; 0 is likelier than the others, since products make it.
    """

    name = "modular_arithmetic"

    def __init__(self, spec: ModularArithmeticTask, *, vocab_size: int) -> None:
        super().__init__(spec, vocab_size=vocab_size, sequence_length=spec.length)
        self._digits = spec.length // 2
        likely = likely_values(self._digits)
        self.chance = max(likely)
        self._likeliest = likely.index(self.chance)

    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return _draw(batch, self._digits, generator)

    def training_batch(self, tokens: int, *, seed: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        digits = 2 + seed_of(self.name, "digits", seed) % (self._digits - 1)
        rows = max(1, tokens // (2 * digits))
        return _draw(rows, digits, generator_for(self.name, "sample", seed, device))

    def solve(self, row: list[int]) -> list[int]:
        total, term = 0, row[0]
        for operator, digit in zip(row[1:-1:2], row[2::2], strict=True):
            if operator == TIMES:
                term *= digit
            else:
                total, term = total + term, digit if operator == PLUS else -digit
        return [IGNORE] * (len(row) - 1) + [(total + term) % MODULUS]

    def lags(self, row: list[int]) -> list[int]:
        return [0] * (len(row) - 1) + [len(row) - 1]

    def guess(self, inputs: Tensor, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        return torch.full(inputs.shape, self._likeliest)


def likely_values(digits: int) -> list[float]:
    """How likely each value of a random expression is: a walk over sums so far and open terms, both modulo 5."""
    states = {(0, digit): 1.0 / MODULUS for digit in range(MODULUS)}
    for _ in range(digits - 1):
        after: dict[tuple[int, int], float] = {}
        for (total, term), share in states.items():
            for digit in range(MODULUS):
                closed = (total + term) % MODULUS
                for state in (
                    (closed, digit),
                    (closed, -digit % MODULUS),
                    (total, term * digit % MODULUS),
                ):
                    after[state] = after.get(state, 0.0) + share / (3 * MODULUS)
        states = after
    values = [0.0] * MODULUS
    for (total, term), share in states.items():
        values[(total + term) % MODULUS] += share
    return values


def _draw(batch: int, digits: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    numbers = uniform(MODULUS, (batch, digits), generator)
    operators = PLUS + uniform(3, (batch, digits), generator)
    operators[:, -1] = EQUALS
    total, term = torch.zeros_like(numbers[:, 0]), numbers[:, 0]
    for operator, digit in zip(operators[:, :-1].unbind(1), numbers[:, 1:].unbind(1), strict=True):
        is_product = operator == TIMES
        signed = torch.where(operator == MINUS, -digit, digit)
        total = torch.where(is_product, total, total + term)
        term = torch.where(is_product, term * digit % MODULUS, signed)
    inputs = torch.stack([numbers, operators], dim=2).flatten(1)
    targets = torch.full_like(inputs, IGNORE)
    targets[:, -1] = (total + term) % MODULUS
    return inputs, targets
