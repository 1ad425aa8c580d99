"""A fixed map of keys to values that the weights must hold (MAD, arXiv 2403.17844)."""

from __future__ import annotations

import torch
from torch import Tensor

from heddle.compose.train import IGNORE
from heddle.search.tasks.drawing import generator_for, uniform
from heddle.search.tasks.generated import Generated
from heddle.specs.tasks import MemorizationTask

INSERT = 0


class Memorization(Generated[MemorizationTask]):
    """MAD's memorization: what the channels can store, without any help of the context.

    Ids: 0 asks, then the keys, then the values. A map that is drawn once and is the same in every sequence, on every machine
    and for every seed gives each key a value. A sequence is random keys, each followed by the asking token, where the
    target is the key's value. Training and held-out sequences share the map, as they must.

    Chance: one of the values.
    """

    name = "memorization"

    def __init__(self, spec: MemorizationTask, *, vocab_size: int) -> None:
        super().__init__(spec, vocab_size=vocab_size, sequence_length=spec.length)
        self.chance = 1.0 / spec.values
        drawn = uniform(spec.values, (spec.keys,), generator_for(self.name, "map", 0, "cpu"))
        self._map = 1 + spec.keys + drawn

    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        s, device = self.spec, generator.device
        keys = uniform(s.keys, (batch, s.length // 2), generator)
        inputs = torch.stack([1 + keys, torch.full_like(keys, INSERT)], dim=2).flatten(1)
        values = self._map.to(device)[keys]
        return inputs, torch.stack([torch.full_like(keys, IGNORE), values], dim=2).flatten(1)

    def solve(self, row: list[int]) -> list[int]:
        known = self._map.tolist()
        return [
            known[before - 1] if token == INSERT else IGNORE
            for before, token in zip([INSERT, *row], row, strict=False)
        ]

    def lags(self, row: list[int]) -> list[int]:
        return [int(token == INSERT) for token in row]

    def guess(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        return 1 + self.spec.keys + torch.randint(self.spec.values, inputs.shape, generator=generator)
