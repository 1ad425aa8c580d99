"""Recall where keys and values are one to three tokens long (MAD, arXiv 2403.17844)."""

from __future__ import annotations

from itertools import permutations

import torch
from torch import Tensor

from heddle.compose.train import IGNORE
from heddle.search.tasks.drawing import covering, distinct, uniform
from heddle.search.tasks.generated import Generated
from heddle.specs.tasks import FuzzyRecallTask

PAD = 0
WIDTH = 3
NONE = -1


class FuzzyRecall(Generated[FuzzyRecallTask]):
    """MAD's fuzzy recall.

    Ids: 0 pads, then the symbols of keys, then those of values. A key is one to three different key symbols, a value one to
    three different value symbols, so the change of pool tells where each ends. A sequence shows every pair of its own
    dictionary at least once, in random order, then asks for a key of three symbols whose value has three: the
    question is the key and the first two symbols of the value, and the targets at its last three tokens are the symbols of
    the value. Padded on the left.

    Chance: the mean of 1/n, 1/(n-1) and 1/(n-2) for n value symbols, since a value repeats none.
    """

    name = "fuzzy_recall"

    def __init__(self, spec: FuzzyRecallTask, *, vocab_size: int) -> None:
        super().__init__(spec, vocab_size=vocab_size, sequence_length=spec.length)
        self.chance = sum(1.0 / (spec.value_symbols - known) for known in range(WIDTH)) / WIDTH

    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        s, device = self.spec, generator.device
        keys, values = (_words(n).to(device) for n in (s.key_symbols, s.value_symbols))
        key, value = _dictionary(batch, (keys, values), s, generator)
        which = covering(batch, s.slots, s.pairs, generator)[..., None].expand(-1, -1, WIDTH)
        shown = torch.cat([key.gather(1, which), value.gather(1, which)], dim=2).flatten(1)
        tokens = torch.cat([shown, key[:, 0], value[:, 0, : WIDTH - 1]], dim=1)
        # A stable sort brings what is no token to the left and leaves the rest in order.
        order = (tokens != NONE).int().sort(dim=1, stable=True).indices
        inputs = torch.full((batch, s.length), PAD, device=device)
        inputs[:, s.length - tokens.shape[1] :] = tokens.gather(1, order).clamp(min=PAD)
        targets = torch.full((batch, s.length), IGNORE, device=device)
        targets[:, -WIDTH:] = value[:, 0]
        return inputs, targets

    def solve(self, row: list[int]) -> list[int]:
        pairs = self._pairs(row)
        (_, asked, _), shown = pairs[-1], pairs[:-1]
        value_of = {key: value for _, key, value in shown}
        return [IGNORE] * (len(row) - WIDTH) + list(value_of[asked])

    def lags(self, row: list[int]) -> list[int]:
        pairs = self._pairs(row)
        start = max(place for place, key, _ in pairs[:-1] if key == pairs[-1][1])
        return [0] * (len(row) - WIDTH) + [len(row) - WIDTH + i - start for i in range(WIDTH)]

    def guess(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        first = 1 + self.spec.key_symbols
        known = inputs[:, -2:].cpu() - first
        weights = torch.ones(len(inputs), WIDTH, self.spec.value_symbols)
        weights[:, 1:].scatter_(2, known[:, None, :1].expand(-1, 2, 1), 0.0)
        weights[:, 2:].scatter_(2, known[:, None, 1:], 0.0)
        drawn = torch.multinomial(weights.flatten(0, 1), 1, generator=generator).view(-1, WIDTH)
        answers = torch.zeros(inputs.shape, dtype=torch.int64)
        answers[:, -WIDTH:] = first + drawn
        return answers

    def _pairs(self, row: list[int]) -> list[tuple[int, tuple[int, ...], tuple[int, ...]]]:
        """Where each pair stands, its key and its value; the last is the question."""
        first_value = 1 + self.spec.key_symbols
        found: list[tuple[int, list[int], list[int]]] = []
        for place, token in enumerate(row):
            if token == PAD:
                continue
            if token < first_value and (not found or found[-1][2]):
                found.append((place, [], []))
            _, key, value = found[-1]
            (key if token < first_value else value).append(token)
        return [(place, tuple(key), tuple(value)) for place, key, value in found]


def _words(symbols: int) -> Tensor:
    """All words of one to three different symbols from 0, the longest last; -1 where a word has ended. [words, 3]"""
    words = [word for width in range(1, WIDTH + 1) for word in permutations(range(symbols), width)]
    return torch.tensor([[*word, *[NONE] * (WIDTH - len(word))] for word in words])


def _dictionary(
    batch: int, words: tuple[Tensor, Tensor], spec: FuzzyRecallTask, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Different keys and their values as tokens; the first of each has three symbols. [batch, pairs, 3] each"""
    made = []
    for table, symbols, first_id in zip(
        words, (spec.key_symbols, spec.value_symbols), (1, 1 + spec.key_symbols), strict=True
    ):
        longest = symbols * (symbols - 1) * (symbols - 2)
        asked = len(table) - longest + uniform(longest, (batch, 1), generator)
        if first_id == 1:
            others = distinct(batch, len(table) - 1, spec.pairs - 1, generator)
            others = others + (others >= asked)
        else:
            others = uniform(len(table), (batch, spec.pairs - 1), generator)
        chosen = table[torch.cat([asked, others], dim=1)]
        made.append(torch.where(chosen == NONE, NONE, chosen + first_id))
    return made[0], made[1]
