"""Running product of the elements of a finite group (arXiv 2404.08819)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, permutations, product
from typing import Any

import torch
from torch import Tensor

from heddle.compose.train import IGNORE
from heddle.search.tasks.drawing import uniform
from heddle.search.tasks.generated import Generated
from heddle.specs.tasks import WordProblemTask

Element = Any


@dataclass(frozen=True, slots=True)
class Group:
    """A finite group: its elements, the identity first, and `after(x, y)`, which does y and then x."""

    elements: tuple[Element, ...]
    after: Callable[[Element, Element], Element]

    def table(self) -> Tensor:
        """`table[x, y]` is the number of x after y. [n, n] int64"""
        number = {element: index for index, element in enumerate(self.elements)}
        return torch.tensor([[number[self.after(x, y)] for y in self.elements] for x in self.elements])


class WordProblem(Generated[WordProblemTask]):
    """y_t = x_t ∘ … ∘ x_1, tokens and targets being the numbers of group elements.

    With `moves: swaps` the tokens are the identity and the transpositions alone: a mixer that reflects, as the delta rule
    with beta up to 2, then needs one layer. Training labels every position. Scored are the later half.

    Chance: the likeliest element at each scored position, from the distribution of the product there; 1/|G| where all
    elements may stand.
    """

    name = "word_problem"

    def __init__(self, spec: WordProblemTask, *, vocab_size: int) -> None:
        super().__init__(spec, vocab_size=vocab_size, sequence_length=spec.length)
        self._group = group_of(spec.group)
        self._table = self._group.table()
        moves = list(range(len(self._group.elements)))
        if spec.moves == "swaps":
            moves = [index for index in moves if _moved(self._group.elements[index]) in (0, 2)]
        self._moves = torch.tensor(moves)
        likeliest = self._likely().max(dim=1)
        self._guess = likeliest.indices
        self.chance = float(likeliest.values[spec.length // 2 :].mean())

    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        inputs, targets = self.lesson(batch, generator)
        targets[:, : self.spec.length // 2] = IGNORE
        return inputs, targets

    def lesson(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        table, moves = self._table.to(generator.device), self._moves.to(generator.device)
        inputs = moves[uniform(len(moves), (batch, self.spec.length), generator)]
        states = [inputs[:, 0]]
        for token in inputs[:, 1:].unbind(dim=1):
            states.append(table[token, states[-1]])
        return inputs, torch.stack(states, dim=1)

    def solve(self, row: list[int]) -> list[int]:
        elements = self._group.elements
        states = accumulate((elements[index] for index in row), lambda state, x: self._group.after(x, state))
        return [elements.index(state) for state in states]

    def lags(self, row: list[int]) -> list[int]:
        return list(range(len(row)))

    def guess(self, inputs: Tensor, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        return self._guess.expand(len(inputs), -1)

    def _likely(self) -> Tensor:
        """How likely each element is as the product at each position. [T, n] float64"""
        now = torch.zeros(len(self._table), dtype=torch.float64)
        now[self._moves] = 1.0 / len(self._moves)
        found = [now]
        for _ in range(self.spec.length - 1):
            now = torch.zeros_like(now).index_add_(
                0, self._table[self._moves].flatten(), now.repeat(len(self._moves)) / len(self._moves)
            )
            found.append(now)
        return torch.stack(found)


def group_of(name: str) -> Group:
    """The group of that name: S3, S5, A5 by permutations, Z60 by addition, A4xZ5 by pairs of both."""
    if name == "Z60":
        return Group(tuple(range(60)), _added)
    if name == "A4xZ5":
        pairs = tuple(product(filter(_is_even, permutations(range(4))), range(5)))
        return Group(pairs, _both)
    every = permutations(range(int(name[1:])))
    return Group(tuple(filter(_is_even, every) if name[0] == "A" else every), _composed)


def _composed(x: tuple[int, ...], y: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(x[i] for i in y)


def _added(x: int, y: int) -> int:
    return (x + y) % 60


def _both(x: tuple[tuple[int, ...], int], y: tuple[tuple[int, ...], int]) -> tuple[tuple[int, ...], int]:
    return _composed(x[0], y[0]), (x[1] + y[1]) % 5


def _moved(element: tuple[int, ...]) -> int:
    return sum(image != place for place, image in enumerate(element))


def _is_even(element: tuple[int, ...]) -> bool:
    inversions = sum(element[i] > element[j] for j in range(len(element)) for i in range(j))
    return inversions % 2 == 0
