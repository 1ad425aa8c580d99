"""Multi-query associative recall: read key-value pairs, then answer keys with values (arXiv 2312.04927)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from heddle.compose.train import IGNORE
from heddle.errors import HeddleError, Where
from heddle.search.tasks.drawing import covering, distinct, generator_for
from heddle.search.tasks.scoring import accuracy, judge, ratio_with_error
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

    With `overwritten` so many further pairs tell keys again, each with a value of its own: the n + overwritten pairs are in
    random order, every key is told at least once, and what was told last is asked for. Key i is then the i-th of those first
    told. (Zoology's forgetting.) With `key_tokens=2` a key is one of ⌈√n⌉ first tokens and one of as many second ones, so that
    neither says which key it is; pairs and slots have three tokens, and the target stands at the key's second. (Zoology's
    compositional keys.)

    Training mixes in easier rows, as Zoology's state trade-off does: half of the batches are as above, a
    quarter has half the pairs in half the length, a quarter a fourth in a fourth. With full rows alone small
    models sit on a plateau and leave it by luck of the seed (docs/decisions/0004-quickstart-tasks.md). With
    `easy_first` the first share of a training's steps has an eighth of the pairs in an eighth of the length
    alone. The held-out rows are all full.

    Chance: the score of the best guesser who knows the format, so answers with one of the n values written,
    and knows where in the sequence it stands, but not which key it reads. Slots near the context more often
    hold early keys, so this lies above 1/n; it is measured on 20,000 layouts (half to choose the guesses,
    half to score them). Of a key that was told again the guesser takes the last value, too.

    Extras: with `overwritten` the `overwritten_accuracy`, over the keys that were told again.

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
        overwritten: int = 0,
        key_tokens: int = 1,
    ) -> None:
        self._form = Form(
            vocab_size,
            pairs,
            length,
            random_non_queries,
            gap_power,
            overwritten=overwritten,
            width=key_tokens,
        )
        _check(self._form)
        self.easy_first = easy_first
        self.vocab_size, self.pairs, self.sequence_length = vocab_size, pairs, length
        self._easier = tuple(self._form.divided(by) for by in DIVISORS)
        self.chance = self._form.chance()
        parts = ["mqar", REVISION, vocab_size, pairs, length, random_non_queries, HELD_OUT]
        parts += [gap_power] if gap_power != GAP_POWER else []
        parts += ["easy first", easy_first] if easy_first else []
        parts += ["overwritten", overwritten] if overwritten else []
        self.digest = digest_of(*parts, *(["key tokens", key_tokens] if key_tokens > 1 else []))

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
        inputs, targets = self.held_out(device)
        if not self._form.overwritten:
            return accuracy(model, inputs, targets)
        _, hits = judge(model, inputs, targets)
        asked = (targets >= 0).cpu()
        value, se = ratio_with_error(hits.sum(dim=1).tolist(), asked.sum(dim=1).tolist())
        again = asked & torch.tensor([self._told_again(row) for row in inputs.tolist()])
        return Score(value, se, len(inputs), {"overwritten_accuracy": float(hits[again].double().mean())})

    def oracle(self, inputs: Tensor) -> Tensor:
        """Answers wherever the query region shows a key of the context, also where a random token is one."""
        return torch.tensor([self._solve(row) for row in inputs.tolist()])

    def reach(self, inputs: Tensor) -> Tensor:
        return torch.tensor([self._lags(row) for row in inputs.tolist()])

    @staticmethod
    def _rows(form: Form, tokens: int, seed: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        return form.draw(max(1, tokens // form.length), generator_for("mqar", "sample", seed, device))

    def _solve(self, row: list[int]) -> list[int]:
        return [IGNORE if found is None else row[found + self._form.width] for found in self._told(row)]

    def _lags(self, row: list[int]) -> list[int]:
        # The key lies further back than its value, and the answer rests on both.
        return [0 if found is None else place - found for place, found in enumerate(self._told(row))]

    def _told(self, row: list[int]) -> list[int | None]:
        """For each token where the pair begins that last told the key ending there; None where no key of the context ends."""
        tellings = self._tellings(row)
        return [tellings[key][-1] if key in tellings else None for key in self._read(row)]

    def _told_again(self, row: list[int]) -> list[bool]:
        """For each token whether the key that ends there was told twice or more."""
        tellings = self._tellings(row)
        return [len(tellings.get(key, ())) > 1 for key in self._read(row)]

    def _tellings(self, row: list[int]) -> dict[tuple[int, ...], list[int]]:
        """Where in the context the pairs of each key begin."""
        found: dict[tuple[int, ...], list[int]] = {}
        for place in range(0, self._form.context, self._form.pair_tokens):
            found.setdefault(tuple(row[place : place + self._form.width]), []).append(place)
        return found

    def _read(self, row: list[int]) -> list[tuple[int, ...]]:
        """For each token the key that ends there, if it is one; nothing in the context, nor where the key would begin there."""
        first = self._form.context + self._form.width - 1
        return [()] * first + [
            tuple(row[end + 1 - self._form.width : end + 1]) for end in range(first, len(row))
        ]


@dataclass(frozen=True, slots=True)
class Form:
    """The shape of the sequences of one difficulty, and how they are drawn."""

    vocab_size: int
    pairs: int
    length: int
    random_non_queries: bool
    gap_power: float
    overwritten: int = 0
    width: int = 1

    @property
    def facts(self) -> int:
        """Pairs of the context, those that tell a key again included."""
        return self.pairs + self.overwritten

    @property
    def pair_tokens(self) -> int:
        """Tokens of a key and its value."""
        return self.width + 1

    @property
    def context(self) -> int:
        """Tokens before the query region."""
        return self.pair_tokens * self.facts

    @property
    def slots(self) -> int:
        """Places in the query region that may hold a query."""
        return (self.length - self.context) // self.pair_tokens

    @property
    def side(self) -> int:
        """Tokens that stand first in keys of two, and as many that stand second."""
        return math.isqrt(self.pairs - 1) + 1

    @property
    def key_symbols(self) -> int:
        """Tokens that keys are made of."""
        return self.pairs if self.width == 1 else 2 * self.side

    def divided(self, by: int) -> Form:
        """A form with a share of the pairs, at least one, in the same share of the length."""
        pairs = max(1, self.pairs // by)
        length = self.length * pairs // self.pairs
        return replace(self, pairs=pairs, length=length, overwritten=self.overwritten * pairs // self.pairs)

    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs and targets, int64 [B, length]."""
        device, half = generator.device, self.vocab_size // 2
        shape = (batch, self.length)
        keys = self._keys(batch, generator)
        values = half + distinct(batch, self.vocab_size - half, self.facts, generator)
        if self.random_non_queries:
            inputs = torch.randint(self.vocab_size, shape, generator=generator, device=device)
        else:
            inputs = torch.zeros(shape, dtype=torch.int64, device=device)
        told, last = self._order(batch, generator)
        pairs = torch.cat(
            [keys.gather(1, told[..., None].expand(-1, -1, self.width)), values[..., None]], dim=2
        )
        inputs[:, : self.context] = pairs.flatten(1)
        ends = self.context + self.pair_tokens * self.layout(batch, generator) + self.width - 1
        for token in range(self.width):
            inputs.scatter_(1, ends + 1 - self.width + token, keys[..., token])
        targets = torch.full(shape, IGNORE, device=device)
        return inputs, targets.scatter_(1, ends, values.gather(1, last))

    def _keys(self, batch: int, generator: torch.Generator) -> Tensor:
        """The keys of each sequence, all different. [B, n, width]"""
        symbols = 1 + distinct(batch, self.vocab_size // 2 - 1, self.key_symbols, generator)
        if self.width == 1:
            return symbols[..., None]
        cells = distinct(batch, self.side**2, self.pairs, generator)
        return torch.stack(
            [symbols.gather(1, cells // self.side), symbols.gather(1, self.side + cells % self.side)], dim=2
        )

    def _order(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Which key each pair of the context tells [B, facts], and which pair tells each key last [B, n]."""
        places = torch.arange(self.facts, device=generator.device).expand(batch, -1)
        if not self.overwritten:
            return places, places
        drawn = covering(batch, self.facts, self.pairs, generator)
        none = places.new_full((batch, self.pairs), self.facts)
        # Keys are numbered as they first appear.
        number = none.scatter_reduce(1, drawn, places, "amin").argsort(dim=1).argsort(dim=1)
        told = number.gather(1, drawn)
        return told, torch.zeros_like(none).scatter_reduce(1, told, places, "amax")

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


def _check(form: Form) -> None:
    most, least = form.length // form.pair_tokens, form.facts + form.pairs
    if least > most:
        fewer = (most - form.overwritten) // 2
        raise HeddleError(
            "out-of-range",
            f"mqar: {form.facts} pairs and their queries do not fit into {form.length} tokens",
            where=Where(path="search.tasks"),
            hint=f"length >= {form.pair_tokens * least}" + (f", or pairs <= {fewer}" if fewer > 0 else ""),
        )
    keys, values = form.vocab_size // 2 - 1, form.vocab_size - form.vocab_size // 2
    if form.key_symbols > keys or form.facts > values:
        what = f"mqar: a vocabulary of {form.vocab_size} has no {form.key_symbols} tokens for keys and {form.facts} values"
        raise HeddleError(
            "out-of-range",
            f"{what} (but {max(0, keys)} and {values})",
            where=Where(path="search.tasks"),
            hint="fewer pairs, or a larger model.vocab_size",
        )
