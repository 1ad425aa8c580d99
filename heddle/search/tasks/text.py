"""Language modelling on real text, scored in bits a byte, so that models of different tokenizers compare."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from heddle.compose.train import IGNORE
from heddle.errors import HeddleError, Where
from heddle.search.tasks.scoring import judge, ratio_with_error
from heddle.search.tasks.task import Score, Task, digest_of, seed_of
from heddle.search.tasks.tokens import Ids, Tokens

# Raised with every change of the sampling or of the held-out windows, so that old scores are not taken for
# new ones.
REVISION = 1
HELD_OUT = 256
FEWEST_WINDOWS = 8
# A repeat of this many tokens counts as "seen before in the window".
GRAM = 4


class Text(Task):
    """Predict each next token of a window of `sequence_length` tokens.

    Training windows start anywhere in the train split. Held-out: up to 256 windows spread evenly over the
    validation split, without overlap; each is scored alone, so the first tokens have little before them.
    bits_per_byte is the sum of their losses in bits over the bytes of the scored text; its error counts
    windows.

    Extras: `repeated_bits_per_byte`, at the positions whose last 4 tokens stood earlier in the same window
    (where looking back pays: the "AR hits" of arXiv 2312.04927), `other_bits_per_byte` at the rest, and
    `repeated_share` of the labels.

    Chance: every id of the vocabulary equally likely, so log2(vocabulary) bits a token: 8 bits a byte for
    bytes.

    Shapes:  inputs, targets: [B, T] int64; every position is a target.
    """

    name = "text"
    metric = "bits_per_byte"
    higher_is_better = False
    best = 0.0

    def __init__(self, tokens: Tokens, *, sequence_length: int, vocab_size: int) -> None:
        _check_size("train", len(tokens.train), sequence_length)
        _check_size("validation", len(tokens.validation), sequence_length)
        self.tokens, self.sequence_length = tokens, sequence_length
        bytes_per_token = float(tokens.validation_bytes.sum(dtype=np.int64)) / len(tokens.validation)
        self.chance = math.log2(vocab_size) / bytes_per_token
        self.digest = digest_of("text", REVISION, tokens.digest, sequence_length, vocab_size, HELD_OUT)
        self._placed: dict[torch.device, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Copies on devices stay here: another process makes its own.
        return {**self.__dict__, "_placed": {}}

    def sample(self, batch: int, *, seed: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        ids = self._train_on(torch.device(device))
        generator = torch.Generator(ids.device).manual_seed(seed_of("text", "sample", seed))
        last = len(ids) - self.sequence_length
        starts = torch.randint(last, (batch, 1), generator=generator, device=ids.device)
        windows = ids[starts + torch.arange(self.sequence_length + 1, device=ids.device)].long()
        return windows[:, :-1], windows[:, 1:]

    def held_out(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        windows = torch.from_numpy(self.windows_of(self.tokens.validation).astype(np.int64)).to(device)
        return windows[:, :-1], windows[:, 1:]

    def evaluate(self, model: nn.Module, *, device: torch.device | str) -> Score:
        inputs, targets = self.held_out(device)
        losses, _ = judge(model, inputs, targets)
        bits = losses / math.log(2.0)
        sizes = torch.from_numpy(self.windows_of(self.tokens.validation_bytes)[:, 1:].astype(np.float64))
        value, se = ratio_with_error(bits.sum(dim=1).tolist(), sizes.sum(dim=1).tolist())
        repeated = previous_gram(inputs.cpu()) >= 0
        extras = {"repeated_share": float(repeated.double().mean())}
        for name, slice_ in (("repeated_bits_per_byte", repeated), ("other_bits_per_byte", ~repeated)):
            if float(sizes[slice_].sum()):
                extras[name] = float(bits[slice_].sum() / sizes[slice_].sum())
        return Score(value, se, len(inputs), extras)

    def oracle(self, inputs: Tensor) -> Tensor:
        """Finds each window in the corpus and reads off what comes next; -100 for one in neither split.

        Where the corpus holds a window twice and goes on differently, the first is taken.
        """
        return torch.from_numpy(np.stack([self._look_up(row) for row in inputs.cpu().numpy()]))

    def reach(self, inputs: Tensor) -> Tensor:
        """To the start of the latest earlier repeat of the last 4 tokens; 0 where there is none."""
        previous = previous_gram(inputs)
        places = torch.arange(inputs.shape[1], device=inputs.device)
        return torch.where(previous >= 0, places - previous + GRAM - 1, 0)

    def _train_on(self, device: torch.device) -> Tensor:
        if device not in self._placed:
            self._placed[device] = torch.from_numpy(_indexable(self.tokens.train)).to(device)
        return self._placed[device]

    def windows_of(self, values: Ids, most: int = HELD_OUT) -> Ids:
        """`most` windows of an array that runs along the validation split, or as many as there are. [windows, T + 1]"""
        size = self.sequence_length + 1
        starts = np.linspace(0, len(values) - size, min(most, len(values) // size)).astype(np.int64)
        return np.asarray(values[starts[:, None] + np.arange(size)])

    def _look_up(self, row: Ids) -> Ids:
        for ids in (self.tokens.train, self.tokens.validation):
            start = _find(ids, row.astype(ids.dtype))
            if start >= 0:
                return np.asarray(ids[start + 1 : start + 1 + len(row)].astype(np.int64))
        return np.full(len(row), IGNORE, dtype=np.int64)


def previous_gram(inputs: Tensor) -> Tensor:
    """Where the 4-gram that ends at each position last ended before, or -1. [B, T] int64"""
    previous = torch.full_like(inputs, -1)
    if inputs.shape[1] < GRAM:
        return previous
    # Four ids below 2^16 fill an int64 exactly; larger ones are mixed by an odd factor, with chance
    # collisions alone.
    base = 1 << 16 if int(inputs.max()) < 1 << 16 else 1_000_003
    grams = torch.zeros_like(inputs[:, GRAM - 1 :])
    for offset in range(GRAM):
        grams = grams * base + inputs[:, offset : inputs.shape[1] - GRAM + 1 + offset]
    ordered, order = grams.sort(dim=1, stable=True)
    same = ordered[:, 1:] == ordered[:, :-1]
    earlier = torch.where(same, order[:, :-1] + GRAM - 1, -1)
    previous[:, GRAM - 1 :].scatter_(1, order[:, 1:], earlier)
    return previous


def _find(ids: Ids, row: Ids) -> int:
    """The first place where `row` stands in `ids` with a token after it, or -1."""
    haystack, needle, width = ids.tobytes(), row.tobytes(), ids.itemsize
    start = haystack.find(needle)
    # A match in the middle of an id is none.
    while start >= 0 and start % width:
        start = haystack.find(needle, start + 1)
    return start // width if 0 <= start < len(haystack) - len(needle) else -1


def _indexable(ids: Ids) -> Ids:
    """A copy that torch may own, in a type that it can gather from."""
    return ids.astype(np.uint8 if ids.dtype == np.uint8 else np.int32)


def _check_size(split: str, tokens: int, sequence_length: int) -> None:
    needed = FEWEST_WINDOWS * (sequence_length + 1)
    if tokens < needed:
        raise HeddleError(
            "corpus-too-small",
            f"the {split} split has {tokens} tokens, {FEWEST_WINDOWS} windows of this length need {needed}",
            where=Where(path="data.source"),
            hint="more text, or a smaller data.sequence_length",
        )
