"""Scores of a model on held-out examples, with errors that count independent units."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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

    Shapes:  inputs: [B, T], targets: [B, T] or of classes [B, 1], on the model's device;  losses (float64), hits (bool): as
    targets, on the CPU.
    """
    losses = torch.zeros(targets.shape, dtype=torch.float64)
    hits = torch.zeros(targets.shape, dtype=torch.bool)

    def write(at: _Labels, logits: Tensor) -> None:
        found = F.cross_entropy(logits, at.ids, reduction="none").double().cpu()
        losses[at.rows].view(-1)[at.places] = found
        hits[at.rows].view(-1)[at.places] = (logits.argmax(dim=-1) == at.ids).cpu()

    _over_rows(model, inputs, targets, write)
    _check_finite(losses)
    return losses, hits


def predicted_means(model: nn.Module, inputs: Tensor, targets: Tensor, first: int, levels: Tensor) -> Tensor:
    """The mean of `levels` under the model's probabilities for ids first, first + 1, …; other ids left out.

    Shapes:  inputs, targets: [B, T], one label a row;  levels: [n] float64;  out: [B] float64 on the CPU.
    """
    means = torch.zeros(len(inputs), dtype=torch.float64)

    def write(at: _Labels, logits: Tensor) -> None:
        shares = logits[:, first : first + len(levels)].double().softmax(dim=1).cpu()
        means[at.rows] = shares @ levels

    _over_rows(model, inputs, targets, write)
    _check_finite(means)
    return means


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


@dataclass(frozen=True, slots=True)
class _Labels:
    """The labels of a few rows: their flat places among these rows, and the token ids asked for."""

    rows: slice
    places: Tensor | slice
    ids: Tensor


def _over_rows(
    model: nn.Module, inputs: Tensor, targets: Tensor, write: Callable[[_Labels, Tensor], None]
) -> None:
    """Hands `write` a few rows' labels and the logits there, in float32 and eval mode; `model` keeps its mode."""
    labels_per_row = int((targets >= 0).sum(dim=1).max())
    rows = _rows_at_once(inputs.shape[1], labels_per_row, _vocab_size(model))
    training = model.training
    model.eval()
    with torch.no_grad():
        for start in range(0, len(inputs), rows):
            piece = slice(start, start + rows)
            positions = labelled_positions(targets[piece])
            logits = labelled_logits(model, inputs[piece], positions).float()
            flat = targets[piece].reshape(-1)
            ids = flat if positions is None else flat[positions]
            write(_Labels(piece, slice(None) if positions is None else positions.cpu(), ids), logits)
    model.train(training)


def _check_finite(found: Tensor) -> None:
    if not bool(found.isfinite().all()):
        raise HeddleError(
            "loss-not-finite", "the trained model's loss on the held-out examples is not finite"
        )


def _vocab_size(model: nn.Module) -> int:
    """Answers there are: tokens, or classes of a readout."""
    head = "classifier" if hasattr(model, "classified") else "lm_head"
    return int(model.get_parameter(f"{head}.weight").shape[0])


def _rows_at_once(sequence_length: int, labels_per_row: int, vocab_size: int) -> int:
    return max(
        1, min(TOKENS_AT_ONCE // sequence_length, LOGITS_AT_ONCE // max(1, labels_per_row * vocab_size))
    )
