"""Recall of values in a stream of key-value pairs, with or without noise between them (MAD, arXiv 2403.17844)."""

from __future__ import annotations

import torch
from torch import Tensor

from heddle.compose.train import IGNORE
from heddle.search.tasks.drawing import covering, distinct, picked, places, uniform
from heddle.search.tasks.generated import Generated
from heddle.specs.tasks import InContextRecallTask


class InContextRecall(Generated[InContextRecallTask]):
    """MAD's in-context recall, and with `noise` its noisy recall.

    With K keys and V values: ids 0..K-1 are keys, then V values, then the noise. Each sequence gives every key a value of its
    own and is T/2 slots of two tokens: key and value, or in round(noise · T/2) slots, at random places, two random noise
    tokens. The earlier half of the pairs shows every key at least once; in the later half each pair is a question: at a
    key the target is its value, which the next token shows.

    MAD draws values with replacement, noise slots independently, and asks wherever a key was seen before; here the
    values differ, so that chance is exact, and the numbers of noise slots and of questions are the same in every row.

    Chance: 1/K, one of the values written.
    """

    name = "in_context_recall"

    def __init__(self, spec: InContextRecallTask, *, vocab_size: int) -> None:
        super().__init__(spec, vocab_size=vocab_size, sequence_length=spec.length)
        self.chance = 1.0 / spec.keys

    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        s, device = self.spec, generator.device
        clean = s.slots - s.noise_slots
        shown = covering(batch, clean - s.asked, s.keys, generator)
        keys = torch.cat([shown, uniform(s.keys, (batch, s.asked), generator)], dim=1)
        values = s.keys + distinct(batch, s.values, s.keys, generator).gather(1, keys)
        slots = s.keys + s.values + uniform(s.noise_symbols, (batch, s.slots, 2), generator)
        where = places(batch, s.slots, clean, generator)
        slots.scatter_(1, where[..., None].expand(-1, -1, 2), torch.stack([keys, values], dim=2))
        targets = torch.full((batch, s.length), IGNORE, device=device)
        targets.scatter_(1, 2 * where[:, clean - s.asked :], values[:, clean - s.asked :])
        return slots.reshape(batch, s.length), targets

    def solve(self, row: list[int]) -> list[int]:
        value_of: dict[int, int] = {}
        answers = [IGNORE] * len(row)
        for place in range(0, len(row), 2):
            key, value = row[place : place + 2]
            if key < self.spec.keys:
                answers[place] = value_of.get(key, IGNORE)
                value_of[key] = value
        return answers

    def lags(self, row: list[int]) -> list[int]:
        last: dict[int, int] = {}
        lags = [0] * len(row)
        for place in range(0, len(row), 2):
            if row[place] < self.spec.keys:
                lags[place] = place - last.get(row[place], place)
                last[row[place]] = place
        return lags

    def guess(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        values = range(self.spec.keys, self.spec.keys + self.spec.values)
        return picked([sorted(set(row) & set(values)) for row in inputs.tolist()], inputs.shape[1], generator)
