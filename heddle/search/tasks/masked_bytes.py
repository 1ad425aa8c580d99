"""Masked language modelling on real text, scored in bits a byte of what was masked (BERT, arXiv 1810.04805)."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from heddle.compose.train import IGNORE
from heddle.errors import HeddleError, Where
from heddle.search.tasks.drawing import distinct, generator_for, uniform
from heddle.search.tasks.scoring import judge, ratio_with_error
from heddle.search.tasks.task import Score, Task, digest_of, seed_of
from heddle.search.tasks.text import HELD_OUT, Text
from heddle.search.tasks.tokens import Ids, Tokens
from heddle.specs.tasks import MaskedBytesTask

# Raised with every change of the masks or of what is held out, so that old scores are not taken for new ones.
REVISION = 1
# Of the tokens asked for so many are masked, and of the others half are random; the rest stand as they are.
MASKED, RANDOM = 0.8, 0.1
# Held-out windows of a readout, which is asked for one token of each.
OF_READOUT = 2048
# A readout learns from windows of the length over one of these, all equally likely.
DIVISORS = (1, 1, 2, 4)


class MaskedBytes(Task):
    """What stood at some places of a window of text: 15 % of its tokens, of which 80 % are masked, 10 % replaced by a token at
    random, 10 % left as they are.

    The mask is the last id of the vocabulary, which the corpus must not hold: with bytes 255, which no UTF-8 has. Windows are
    those of `Text`. bits_per_byte is the sum of the losses at those places, in bits, over the bytes that their tokens stand for.

    With `of_readout` one place of a window is masked, always by the mask, and its token is the class of the window: what an
    encoder with a readout can be asked. It is one label a window, so in training a quarter of the batches are of windows half as
    long, a quarter of a fourth; with whole ones alone small models stay at the unigram for long
    (docs/decisions/0023-encoder-tasks.md). Then 2,048 windows are held out, all whole.

    Extras: `accuracy`, and `unigram_bits_per_byte`, the score of one who knows how often tokens stand in the train split.

    Chance: as of `Text`, every id equally likely.

    Shapes:  inputs: [B, T];  targets: [B, T], with `of_readout` [B, 1]
    """

    name = "masked_bytes"
    metric = "bits_per_byte"
    higher_is_better = False
    best = 0.0

    def __init__(
        self,
        spec: MaskedBytesTask,
        tokens: Tokens,
        *,
        sequence_length: int,
        vocab_size: int,
        of_readout: bool = False,
    ) -> None:
        self.text = Text(tokens, sequence_length=sequence_length, vocab_size=vocab_size)
        self.sequence_length, self.mask, self.of_readout = sequence_length, vocab_size - 1, of_readout
        _check_mask(tokens, self.mask)
        self.asked = 1 if of_readout else max(1, round(spec.share * sequence_length))
        self.chance = self.text.chance
        self.digest = digest_of(self.name, REVISION, self.text.digest, self.asked, of_readout)

    def sample(self, batch: int, *, seed: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        windows, _ = self.text.sample(batch, seed=seed, device=device)
        return self._asked(windows, generator_for(self.name, "sample", seed, device))

    def training_batch(self, tokens: int, *, seed: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        if not self.of_readout:
            return super().training_batch(tokens, seed=seed, device=device)
        windows, _ = self.text.training_batch(tokens, seed=seed, device=device)
        length = max(1, self.sequence_length // DIVISORS[seed_of(self.name, "form", seed) % len(DIVISORS)])
        pieces = windows[:, : self.sequence_length // length * length].reshape(-1, length)
        return self._asked(pieces, generator_for(self.name, "sample", seed, device))

    def held_out(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        windows = torch.from_numpy(self._windows_of(self.text.tokens.validation).astype(np.int64))
        inputs, targets = self._asked(windows, generator_for(self.name, "held-out", 0, "cpu"))
        return inputs.to(device), targets.to(device)

    def evaluate(self, model: nn.Module, *, device: torch.device | str) -> Score:
        inputs, targets = self.held_out(device)
        losses, hits = judge(model, inputs, targets)
        bits, labels = losses / math.log(2.0), targets.cpu()
        places = inputs.cpu() == self.mask if self.of_readout else labels != IGNORE
        bytes_of = self._windows_of(self.text.tokens.validation_bytes).astype(np.float64)
        sizes = (torch.from_numpy(bytes_of) * places).sum(dim=1)
        value, se = ratio_with_error(bits.sum(dim=1).tolist(), sizes.tolist())
        asked = labels != IGNORE
        unigram = float(self._unigram_bits()[labels[asked]].sum() / sizes.sum())
        extras = {"accuracy": float(hits[asked].double().mean()), "unigram_bits_per_byte": unigram}
        return Score(value, se, len(inputs), extras)

    def oracle(self, inputs: Tensor) -> Tensor:
        """The window of the corpus that agrees at most places that are not masked: all its tokens, or with `of_readout` the one
        that is masked. Of several the first is taken."""
        found = torch.from_numpy(np.stack([self._look_up(row) for row in inputs.cpu().numpy()]))
        return found[inputs.cpu() == self.mask][:, None] if self.of_readout else found

    def reach(self, inputs: Tensor) -> Tensor:
        """0: what a masked token rests on is not known."""
        return torch.zeros_like(inputs[:, :1] if self.of_readout else inputs)

    def _asked(self, windows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Windows with places masked, and what stood there."""
        rows, length = windows.shape
        places = distinct(rows, length, self.asked, generator)
        labels = windows.gather(1, places)
        if self.of_readout:
            return windows.scatter(1, places, self.mask), labels
        fate = torch.rand(labels.shape, generator=generator, device=labels.device)
        other = uniform(self.mask, tuple(labels.shape), generator)
        shown = torch.where(fate < MASKED, self.mask, torch.where(fate < MASKED + RANDOM, other, labels))
        targets = torch.full_like(windows, IGNORE).scatter(1, places, labels)
        return windows.scatter(1, places, shown), targets

    def _windows_of(self, values: Ids) -> Ids:
        """The held-out windows of an array that runs along the validation split. [windows, T]"""
        most = OF_READOUT if self.of_readout else HELD_OUT
        return self.text.windows_of(values, most)[:, :-1]

    def _unigram_bits(self) -> Tensor:
        """-log2 of the share of each id in the train split, each counted once more than it stands there."""
        counts = np.bincount(self.text.tokens.train, minlength=self.mask + 1) + 1.0
        return torch.from_numpy(-np.log2(counts / counts.sum()))

    def _look_up(self, row: Ids) -> Ids:
        best, found = -1, row
        for ids in (self.text.tokens.train, self.text.tokens.validation):
            starts = len(ids) - len(row) + 1
            agree = np.zeros(starts, dtype=np.int32)
            for place in np.flatnonzero(row != self.mask):
                agree += ids[place : place + starts] == row[place]
            start = int(agree.argmax())
            if agree[start] > best:
                best, found = int(agree[start]), ids[start : start + len(row)]
        return found.astype(np.int64)


def _check_mask(tokens: Tokens, mask: int) -> None:
    highest = max(int(tokens.train.max()), int(tokens.validation.max()))
    if highest >= mask:
        raise HeddleError(
            "out-of-range",
            f"masked_bytes masks with the last id of the vocabulary, {mask}, and that stands in the text",
            where=Where(path="model.vocab_size"),
            hint=f"model.vocab_size: {mask + 2}",
        )
