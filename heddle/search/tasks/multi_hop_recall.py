"""Lookups one after the other in a permutation that the sequence tells (arXiv 2402.08164, 2412.02975)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from heddle.compose.train import IGNORE
from heddle.search.tasks.drawing import distinct, generator_for, picked
from heddle.search.tasks.generated import Generated
from heddle.search.tasks.mqar import DIVISORS, EASIEST
from heddle.search.tasks.task import seed_of
from heddle.specs.tasks import MultiHopRecallTask

END = 0


class MultiHopRecall(Generated[MultiHopRecallTask]):
    """Facts (a, f(a)) of a permutation f in random order, then questions: a key k whose targets are f(k), f(f(k)), … .

    Ids: END, the marks of hops 2 … H, then symbols. Layout of a sequence with n facts and q questions of H hops:

        a1 f(a1) END a2 f(a2) END … an f(an) END | k1 mark2 … markH | … | kq mark2 … markH

    END tells apart where a symbol is asked about and where it is the answer, which no relative position does.

    f is one cycle through n random symbols, so no chain comes back within its hops, and the keys of a sequence differ. The
    target of a key is f of it, that of mark h is f applied h times. Answers are never written: what hop h looks up must have
    been found by a layer below, so each hop asks for one more layer that can look up, or for chains of facts put together first,
    which takes the logarithm of the hops (arXiv 2402.09268) but sees only facts that stand before. (Sequential composition of
    functions, arXiv 2402.08164 and 2412.02975, or pointer chasing; the k-hop induction heads of arXiv 2402.09268 are its kin.)

    f is no nearer backwards than forwards, which is why there are more than twice as many facts as hops: of five facts the
    fourth hop would be the one fact that ends with the key.

    Training mixes in easier rows as `mqar` does: half of the batches are as above, a quarter has half the facts and
    questions in half the length, a quarter a fourth, but one fact more than hops at least. With `easy_first` the first share of a
    training's steps has an eighth alone. The held-out rows are all full. That the last hops of the easiest rows are lookups
    backwards does no harm: with twice as many facts there, or with fewer hops, trainings learn fewer hops of full rows.

    Chance: 1/n, one of the symbols written. Who sees that the key itself is no answer scores 1/(n-1).

    Extras: `hop_1_accuracy` … `hop_H_accuracy`.
    """

    name = "multi_hop_recall"
    revision = 4

    def __init__(self, spec: MultiHopRecallTask, *, vocab_size: int) -> None:
        super().__init__(spec, vocab_size=vocab_size, sequence_length=spec.length)
        self.chance = 1.0 / spec.facts

    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return self._drawn(self.spec, batch, generator)

    def training_batch(self, tokens: int, *, seed: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        return self._rows(DIVISORS[seed_of(self.name, "form", seed) % len(DIVISORS)], tokens, seed, device)

    def batch_at(
        self, done: float, tokens: int, *, seed: int, device: torch.device | str
    ) -> tuple[Tensor, Tensor]:
        if done < self.spec.easy_first:
            return self._rows(EASIEST, tokens, seed, device)
        return self.training_batch(tokens, seed=seed, device=device)

    def solve(self, row: list[int]) -> list[int]:
        return [IGNORE if answer is None else answer for answer, _ in self._chains(row)]

    def lags(self, row: list[int]) -> list[int]:
        return [
            0 if answer is None else place - first for place, (answer, first) in enumerate(self._chains(row))
        ]

    def guess(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        written = inputs[:, 0 : 3 * self.spec.facts : 3].tolist()
        return picked(written, inputs.shape[1], generator)

    def parts(self, hits: Tensor) -> Mapping[str, float]:
        right = hits[:, 3 * self.spec.facts :].reshape(-1, self.spec.hops).double().mean(dim=0)
        return {f"hop_{hop}_accuracy": share for hop, share in enumerate(right.tolist(), 1)}

    def _rows(self, by: int, tokens: int, seed: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        form = divided(self.spec, by)
        length = max(form.length, -(-self.spec.length // by))
        drawn = self._drawn(form, max(1, tokens // length), generator_for(self.name, "sample", seed, device))
        fill = (0, length - form.length)
        return F.pad(drawn[0], fill, value=END), F.pad(drawn[1], fill, value=IGNORE)

    def _drawn(
        self, form: MultiHopRecallTask, batch: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        device, facts, hops = generator.device, form.facts, form.hops
        cycle = self.spec.hops + distinct(batch, form.symbols, facts, generator)
        order = distinct(batch, facts, facts, generator)
        pair = [cycle.gather(1, order), cycle.gather(1, (order + 1) % facts)]
        told = torch.stack([*pair, torch.full_like(order, END)], dim=2).flatten(1)
        # Where in the cycle each question begins, and where its hops end.
        start = distinct(batch, facts, form.questions, generator)[..., None]
        ends = (start + torch.arange(1, hops + 1, device=device)) % facts
        keys = cycle.gather(1, start[..., 0])[..., None]
        marks = torch.arange(1, hops, device=device).expand(batch, form.questions, -1)
        asked = torch.cat([keys, marks], dim=2).flatten(1)
        answers = cycle.gather(1, ends.flatten(1))
        return torch.cat([told, asked], dim=1), torch.cat([torch.full_like(told, IGNORE), answers], dim=1)

    def _chains(self, row: list[int]) -> list[tuple[int | None, int]]:
        """For each token the answer, None where there is none, and where the first fact stands that it rests on."""
        context = 3 * self.spec.facts
        facts = {row[place]: (row[place + 1], place) for place in range(0, context, 3)}
        found: list[tuple[int | None, int]] = [(None, 0)] * context
        for question in range(context, len(row), self.spec.hops):
            at: int | None = row[question]
            first = question
            for _ in range(self.spec.hops):
                at, place = facts.get(at, (None, 0)) if at is not None else (None, 0)
                first = min(first, place)
                found.append((at, first))
        return found


def divided(form: MultiHopRecallTask, by: int) -> MultiHopRecallTask:
    """The form with a share of the questions and of the facts, one fact more than hops at least."""
    facts, questions = max(-(-form.facts // by), form.hops + 1), -(-form.questions // by)
    return form.model_copy(update={"facts": facts, "questions": questions})
