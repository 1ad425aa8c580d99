"""Multi-query associative recall: read key-value pairs, then answer keys with values (arXiv 2312.04927)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from heddle.compose.train import IGNORE
from heddle.errors import HeddleError, Where
from heddle.search.tasks.drawing import distinct, generator_for
from heddle.search.tasks.scoring import accuracy
from heddle.search.tasks.task import Score, Task, digest_of, seed_of

# Raised with every change of the generator or of the held-out set, so that old scores are not taken for new
# ones.
REVISION = 2
# Zoology's: most queries follow the context closely. At 1 all slots are equally likely.
GAP_POWER = 0.01
HELD_OUT = 512
CHANCE_DRAWS = 20_000
# By what pairs and length of a training batch are divided; each entry is equally likely.
DIVISORS = (1, 1, 2, 4)
# And those of the rows that a training with `easy_first` begins with.
EASIEST = 8


class Mqar(Task):
    """Multi-query associative recall with the generator of Zoology (arXiv 2312.04927).

    A vocabulary of V: 0 fills, 1..V/2-1 are keys, V/2..V-1 values. Layout of a sequence of T tokens with n
    pairs:

        k1 v1 k2 v2 … kn vn | (T-2n)/2 slots of two tokens

    n of the slots are drawn without replacement with p(g) ∝ (g+1)^(gap_power - 1), so by default (0.01) most
    queries follow the context closely; the i-th slot drawn holds key i, at its first token, and there the target is the key's
    value. The answer itself is never written. Every other token of the query region is random, or 0 with
    `random_non_queries=False`.

    Training mixes in easier rows, as Zoology's state trade-off does: half of the batches are as above, a
    quarter has half the pairs in half the length, a quarter a fourth in a fourth. With full rows alone small
    models sit on a plateau and leave it by luck of the seed (docs/decisions/0004-quickstart-tasks.md). With
    `easy_first` the first share of a training's steps has an eighth of the pairs in an eighth of the length
    alone. The held-out rows are all full.

    Chance: the score of the best guesser who knows the format, so answers with one of the n values written,
    and knows where in the sequence it stands, but not which key it reads. Slots near the context more often
    hold early keys, so this lies above 1/n; it is measured on 20,000 layouts (half to choose the guesses,
    half to score them).

    Shapes:  inputs, targets: [B, T] int64; n targets a row, -100 elsewhere.
    """

    name = "mqar"
    metric = "accuracy"
    higher_is_better = True
    best = 1.0

    def __init__(
        self,
        *,
        vocab_size: int,
        pairs: int,
        length: int,
        random_non_queries: bool = True,
        gap_power: float = GAP_POWER,
        easy_first: float = 0.0,
    ) -> None:
        _check(vocab_size, pairs, length)
        self.easy_first = easy_first
        self.vocab_size, self.pairs, self.sequence_length = vocab_size, pairs, length
        self._form = Form(vocab_size, pairs, length, random_non_queries, gap_power)
        self._easier = tuple(self._form.divided(by) for by in DIVISORS)
        self.chance = self._form.chance()
        parts = ["mqar", REVISION, vocab_size, pairs, length, random_non_queries, HELD_OUT]
        parts += [gap_power] if gap_power != GAP_POWER else []
        self.digest = digest_of(*parts, *(["easy first", easy_first] if easy_first else []))

    def sample(self, batch: int, *, seed: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        return self._form.draw(batch, generator_for("mqar", "sample", seed, device))

    def training_batch(self, tokens: int, *, seed: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        return self._rows(
            self._easier[seed_of("mqar", "form", seed) % len(self._easier)], tokens, seed, device
        )

    def batch_at(
        self, done: float, tokens: int, *, seed: int, device: torch.device | str
    ) -> tuple[Tensor, Tensor]:
        if done < self.easy_first:
            return self._rows(self._form.divided(EASIEST), tokens, seed, device)
        return self.training_batch(tokens, seed=seed, device=device)

    def held_out(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        # Drawn on the CPU, whose generator gives the same everywhere.
        inputs, targets = self._form.draw(HELD_OUT, generator_for("mqar", "held-out", 0, "cpu"))
        return inputs.to(device), targets.to(device)

    def evaluate(self, model: nn.Module, *, device: torch.device | str) -> Score:
        """Accuracy over all answers; its error counts sequences, whose answers stand or fall together."""
        return accuracy(model, *self.held_out(device))

    def oracle(self, inputs: Tensor) -> Tensor:
        """Answers wherever the query region shows a key of the context, also where a random token is one."""
        return torch.tensor([self._solve(row) for row in inputs.tolist()])

    def reach(self, inputs: Tensor) -> Tensor:
        return torch.tensor([self._lags(row) for row in inputs.tolist()])

    @staticmethod
    def _rows(form: Form, tokens: int, seed: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        return form.draw(max(1, tokens // form.length), generator_for("mqar", "sample", seed, device))

    def _solve(self, row: list[int]) -> list[int]:
        context = 2 * self.pairs
        value_of = dict(zip(row[0:context:2], row[1:context:2], strict=True))
        return [IGNORE] * context + [value_of.get(token, IGNORE) for token in row[context:]]

    def _lags(self, row: list[int]) -> list[int]:
        # The key lies one further back than its value, and the answer rests on both.
        context = 2 * self.pairs
        place_of = {key: 2 * index for index, key in enumerate(row[0:context:2])}
        return [
            place - place_of[token] if place >= context and token in place_of else 0
            for place, token in enumerate(row)
        ]


@dataclass(frozen=True, slots=True)
class Form:
    """The shape of the sequences of one difficulty, and how they are drawn."""

    vocab_size: int
    pairs: int
    length: int
    random_non_queries: bool
    gap_power: float

    @property
    def slots(self) -> int:
        """Places in the query region that may hold a query."""
        return (self.length - 2 * self.pairs) // 2

    def divided(self, by: int) -> Form:
        """A form with a share of the pairs, at least one, in the same share of the length."""
        pairs = max(1, self.pairs // by)
        return replace(self, pairs=pairs, length=self.length * pairs // self.pairs)

    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs and targets, int64 [B, length]."""
        device, n, half = generator.device, self.pairs, self.vocab_size // 2
        shape = (batch, self.length)
        keys = 1 + distinct(batch, half - 1, n, generator)
        values = half + distinct(batch, self.vocab_size - half, n, generator)
        if self.random_non_queries:
            inputs = torch.randint(self.vocab_size, shape, generator=generator, device=device)
        else:
            inputs = torch.zeros(shape, dtype=torch.int64, device=device)
        inputs[:, 0 : 2 * n : 2] = keys
        inputs[:, 1 : 2 * n : 2] = values
        places = 2 * n + 2 * self.layout(batch, generator)
        targets = torch.full(shape, IGNORE, device=device)
        return inputs.scatter_(1, places, keys), targets.scatter_(1, places, values)

    def layout(self, batch: int, generator: torch.Generator) -> Tensor:
        """The slot of each key: slots drawn one by one without replacement, p(g) ∝ (g+1)^(gap_power - 1). [B, n]"""
        weights = torch.arange(1.0, self.slots + 1, device=generator.device).pow(self.gap_power - 1.0)
        # Exponential clocks of these rates ring in the order of such draws.
        clocks = torch.empty(batch, self.slots, device=generator.device).exponential_(generator=generator)
        return (clocks / weights).topk(self.pairs, dim=1, largest=False, sorted=True).indices

    def chance(self) -> float:
        """How often the key that most often fills a slot is the one asked there."""
        generator = generator_for("mqar", "chance", 0, "cpu")
        draws = CHANCE_DRAWS // 2
        keys = torch.arange(self.pairs).expand(draws, -1)
        seen, scored = (
            torch.bincount(
                (self.layout(draws, generator) * self.pairs + keys).reshape(-1),
                minlength=self.slots * self.pairs,
            ).view(self.slots, self.pairs)
            for _ in range(2)
        )
        hits = scored.gather(1, seen.argmax(dim=1, keepdim=True)).sum()
        return max(float(hits / scored.sum()), 1.0 / self.pairs)


def _check(vocab_size: int, pairs: int, length: int) -> None:
    if 4 * pairs > length:
        raise HeddleError(
            "out-of-range",
            f"mqar: {pairs} pairs and their queries do not fit into {length} tokens",
            where=Where(path="search.tasks"),
            hint=f"length >= {4 * pairs}, or pairs <= {length // 4}",
        )
    if pairs > vocab_size // 2 - 1:
        raise HeddleError(
            "out-of-range",
            f"mqar: a vocabulary of {vocab_size} has no {pairs} keys (but {max(0, vocab_size // 2 - 1)})",
            where=Where(path="search.tasks"),
            hint="fewer pairs, or a larger model.vocab_size",
        )
