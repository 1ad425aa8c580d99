"""Scores of a model on held-out examples, with errors that count independent units."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from heddle.compose.train import labelled_logits, labelled_positions
from heddle.errors import HeddleError
from heddle.search.tasks.task import Score

# Tokens that pass through the model at once, and elements of the logits they may make (float32: 64 MiB).
TOKENS_AT_ONCE = 1 << 14
LOGITS_AT_ONCE = 1 << 24


def accuracy(model: nn.Module, inputs: Tensor, targets: Tensor) -> Score:
    """Share of labelled positions whose likeliest token is the target; its error counts sequences."""
    _, hits = judge(model, inputs, targets)
    labels = (targets.cpu() >= 0).sum(dim=1)
    value, se = ratio_with_error(hits.sum(dim=1).tolist(), labels.tolist())
    return Score(value, se, len(inputs))


def judge(model: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Loss in nats and whether the likeliest token is the target; 0 and False where nothing is asked.

    Computed without autocast, a few rows at a time, in eval mode; `model` is left in the mode it was in.

    Shapes:  inputs, targets: [B, T] on the model's device;  losses (float64), hits (bool): [B, T] on the CPU.
    """
    losses, hits = torch.zeros(inputs.shape, dtype=torch.float64), torch.zeros(inputs.shape, dtype=torch.bool)
    labels_per_row = int((targets >= 0).sum(dim=1).max())
    rows = _rows_at_once(inputs.shape[1], labels_per_row, _vocab_size(model))
    training = model.training
    model.eval()
    with torch.no_grad():
        for start in range(0, len(inputs), rows):
            piece = slice(start, start + rows)
            _judge_rows(model, inputs[piece], targets[piece], losses[piece], hits[piece])
    model.train(training)
    if not bool(losses.isfinite().all()):
        raise HeddleError(
            "loss-not-finite", "the trained model's loss on the held-out examples is not finite"
        )
    return losses, hits


def ratio_with_error(sums: Sequence[float], counts: Sequence[float]) -> tuple[float, float]:
    """sum(sums) / sum(counts) and its standard error, the pairs being the independent units.

    Labels of one sequence stand or fall together, so the error counts sequences, not labels: the ratio
    estimator

        r = Σs / Σc,   se² = n/(n-1) · Σ(s_i - r c_i)² / (Σc)²        (Cochran, Sampling Techniques, ch. 6)
    """
    n, total = len(sums), sum(counts)
    assert n >= 2
    assert total > 0
    ratio = sum(sums) / total
    squares = sum((s - ratio * c) ** 2 for s, c in zip(sums, counts, strict=True))
    return ratio, math.sqrt(n / (n - 1) * squares) / total


def _judge_rows(model: nn.Module, inputs: Tensor, targets: Tensor, losses: Tensor, hits: Tensor) -> None:
    """Writes into `losses` and `hits`, which are views of the caller's."""
    positions = labelled_positions(targets)
    logits = labelled_logits(model, inputs, positions).float()
    labels = targets.reshape(-1) if positions is None else targets.reshape(-1)[positions]
    where = slice(None) if positions is None else positions.cpu()
    losses.view(-1)[where] = F.cross_entropy(logits, labels, reduction="none").double().cpu()
    hits.view(-1)[where] = (logits.argmax(dim=-1) == labels).cpu()


def _vocab_size(model: nn.Module) -> int:
    weight = model.get_parameter("lm_head.weight")
    return int(weight.shape[0])


def _rows_at_once(sequence_length: int, labels_per_row: int, vocab_size: int) -> int:
    return max(
        1, min(TOKENS_AT_ONCE // sequence_length, LOGITS_AT_ONCE // max(1, labels_per_row * vocab_size))
    )
