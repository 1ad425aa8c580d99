"""The constant behind a variable, over several assignments, among other chains (RULER, arXiv 2404.06654)."""

from __future__ import annotations

import torch
from torch import Tensor

from heddle.compose.train import IGNORE
from heddle.search.tasks.drawing import distinct, picked, places
from heddle.search.tasks.generated import Generated
from heddle.specs.tasks import VariableTrackingTask

NOISE, DEFINE, SET, ASK = range(4)


class VariableTracking(Generated[VariableTrackingTask]):
    """RULER's variable tracking with tokens for words.

    Ids: filler, DEFINE, SET, ASK, then names, then constants. Each of c chains is DEFINE x0 constant, then h times SET x(i)
    x(i-1); names differ, constants differ. The statements of all chains are mixed at random, each chain in its order, with
    filler between them; the end is ASK x(h) of one chain, and the target of the last token is its constant.

    Chance: 1/c, one of the constants written.
    """

    name = "variable_tracking"

    def __init__(self, spec: VariableTrackingTask, *, vocab_size: int) -> None:
        super().__init__(spec, vocab_size=vocab_size, sequence_length=spec.length)
        self.chance = 1.0 / spec.chains

    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        s, device = self.spec, generator.device
        names = 4 + distinct(batch, s.names, s.facts, generator).view(batch, s.chains, s.hops + 1)
        constants = 4 + s.names + distinct(batch, s.constants, s.chains, generator)
        verbs = torch.full_like(names, SET)
        verbs[..., 0] = DEFINE
        facts = torch.stack([verbs, names, torch.cat([constants[..., None], names[..., :-1]], dim=2)], dim=3)
        # Random times, in order within each chain.
        times = torch.rand(names.shape, generator=generator, device=device).sort(dim=2).values.flatten(1)
        order = times.argsort(dim=1)[..., None].expand(-1, -1, 3)
        start = places(batch, s.length - 2 - 2 * s.facts, s.facts, generator)
        start = start + 2 * torch.arange(s.facts, device=device)
        where = (start[..., None] + torch.arange(3, device=device)).flatten(1)
        inputs = torch.full((batch, s.length), NOISE, device=device)
        inputs.scatter_(1, where, facts.flatten(1, 2).gather(1, order).flatten(1))
        inputs[:, -2] = ASK
        inputs[:, -1] = names[:, 0, -1]
        targets = torch.full_like(inputs, IGNORE)
        targets[:, -1] = constants[:, 0]
        return inputs, targets

    def solve(self, row: list[int]) -> list[int]:
        return [IGNORE] * (len(row) - 1) + [self._origin(row)[1]]

    def lags(self, row: list[int]) -> list[int]:
        return [0] * (len(row) - 1) + [len(row) - 1 - self._origin(row)[0]]

    def guess(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        first = 4 + self.spec.names
        written = [[token for token in row if token >= first] for row in inputs.tolist()]
        return picked(written, inputs.shape[1], generator)

    def _origin(self, row: list[int]) -> tuple[int, int]:
        """Where the first name of the chain that is asked for stands, and its constant."""
        known: dict[int, tuple[int, int]] = {}
        for place, token in enumerate(row[:-2]):
            if token in (DEFINE, SET):
                name, said = row[place + 1 : place + 3]
                known[name] = (place + 1, said) if token == DEFINE else known[said]
        return known[row[-1]]
