"""What a network answers before any of it is trained, read out in closed form (arXiv 2307.11353)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from heddle.compose.build import build_causal_lm
from heddle.compose.hf.model import HeddleForCausalLM
from heddle.compose.train import labelled_positions
from heddle.errors import HeddleError, Where
from heddle.search.tasks.scoring import ratio_with_error
from heddle.search.tasks.task import Score, Task
from heddle.search.text_alone import text_alone
from heddle.specs import ModelSpec

# Penalties of the ridge regression, as shares of the mean square of a feature; the best on rows of its own is taken.
PENALTIES = (1e-4, 1e-2, 1.0)
# Labels that the readout is fitted on, and features it may have: more are mixed down at random.
LABELS = 2048
FEATURES = 1024
TOKENS_AT_ONCE = 1 << 14


@dataclass(frozen=True, slots=True)
class _Rows:
    """Features and answers of labelled tokens, and which sequence each is of.  Shapes:  [N, F], [N], [N]"""

    features: Tensor
    answers: Tensor
    sequence: Tensor


def random_feature_score(model: ModelSpec, task: Task, *, seed: int = 0, device: str = "cpu") -> Score:
    """Accuracy of a linear readout of the model's features at random weights; nothing is trained by gradient.

    The features of a token are what every head hands out before its output projection, and the last hidden state. On F
    features Φ of N labelled tokens, and the answers Y as 0 and 1 for each token id,

        W = (ΦᵀΦ + λI)⁻¹ ΦᵀY,        answer = argmax φᵀW

    with λ chosen on sequences of its own; the score is that of the held-out sequences. It sees masks, windows, decays, short
    convolutions and the size of states. It is blind to what weights could learn to select, and to what several layers could
    do together: a filter, never an objective. `normalised` of the score is 0 at the task's chance, and may lie below it.

    Raises `bad-argument` for a task that is not scored by accuracy, and `loss-not-finite`.
    """
    if task.metric != "accuracy":
        what = f"the random-feature probe reads answers, and {task.name} is scored by {task.metric}"
        raise HeddleError("bad-argument", what, where=Where(path="search.tasks"))
    network = build_causal_lm(model, seed=seed, device=device)
    network.eval()
    inputs, targets = task.held_out(device)
    rows = max(2, -(-LABELS // int((targets[0] >= 0).sum())))
    mixed = _Mixing(seed)
    fitted, chosen = (
        _rows(network, *task.sample(count, seed=index, device=device), mixed)
        for index, count in enumerate((rows, max(2, rows // 4)))
    )
    judged = _rows(network, inputs, targets, mixed)
    weights = _best_readout(fitted, chosen, int(max(fitted.answers.max(), judged.answers.max())) + 1)
    hits = _hits(weights, judged)
    labels = torch.ones_like(hits)
    sums, counts = (
        torch.zeros(len(inputs), dtype=hits.dtype).index_add_(0, judged.sequence, one).tolist()
        for one in (hits, labels)
    )
    value, se = ratio_with_error(sums, counts)
    return Score(value, se, len(inputs), {"features": float(judged.features.shape[1] - 1)})


class _Mixing:
    """Brings features of any number to 1,024 at most, by the same random matrix each time."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __call__(self, features: Tensor) -> Tensor:
        if features.shape[1] <= FEATURES:
            return features
        generator = torch.Generator().manual_seed(self._seed)
        matrix = torch.randn(features.shape[1], FEATURES, generator=generator, dtype=features.dtype)
        mixed: Tensor = features @ matrix / features.shape[1] ** 0.5
        return mixed


def _rows(network: HeddleForCausalLM, inputs: Tensor, targets: Tensor, mixed: _Mixing) -> _Rows:
    at_once = max(1, TOKENS_AT_ONCE // inputs.shape[1])
    features = torch.cat(
        [
            mixed(_features(network, inputs[start : start + at_once], targets[start : start + at_once]))
            for start in range(0, len(inputs), at_once)
        ]
    )
    # The likeliest answer of what is no number would be the first.
    if not bool(features.isfinite().all()):
        raise HeddleError(
            "loss-not-finite", "the features that the random-feature probe reads are not finite"
        )
    asked = (targets >= 0).cpu()
    ones = torch.ones(len(features), 1, dtype=features.dtype)
    answers, sequence = targets.cpu()[asked], asked.nonzero()[:, 0]
    return _Rows(torch.cat([features, ones], dim=1), answers, sequence)


@torch.no_grad()
def _features(network: HeddleForCausalLM, inputs: Tensor, targets: Tensor) -> Tensor:
    """Features of the labelled tokens, each part at unit mean square. [N, F] float64 on the CPU"""
    positions = labelled_positions(targets)

    def at_labels(found: Tensor) -> Tensor:
        flat = found.reshape(targets.numel(), -1)
        return (flat if positions is None else flat[positions]).double().cpu()

    with heads_kept(network) as heads:
        hidden: Tensor = network.model(input_ids=inputs, use_cache=False).last_hidden_state
        parts = [at_labels(found) for found in (*heads, hidden)]
    return torch.cat([part / part.square().mean().sqrt().clamp(min=1e-12) for part in parts], dim=1)


@contextmanager
def heads_kept(network: nn.Module) -> Iterator[list[Tensor]]:
    """While it is open, what the heads of every mixer hand out before their output projection is kept, in order."""
    kept: list[Tensor] = []
    named = [one for name, one in network.named_modules() if name.endswith(".heads_out")]
    with text_alone(network) as is_text:

        def keep(_: object, __: object, out: Tensor) -> None:
            if is_text():
                kept.append(out)

        hooks = [one.register_forward_hook(keep) for one in named]
        try:
            yield kept
        finally:
            for hook in hooks:
                hook.remove()


def _best_readout(fitted: _Rows, chosen: _Rows, answers: int) -> Tensor:
    """The readout whose penalty does best on `chosen`. [F, answers]"""
    phi = fitted.features
    wanted = torch.nn.functional.one_hot(fitted.answers, answers).to(phi.dtype)
    gram, moment = phi.T @ phi, phi.T @ wanted
    scale = gram.diagonal().mean()
    found = []
    for penalty in PENALTIES:
        factor = torch.linalg.cholesky(gram + penalty * scale * torch.eye(len(gram), dtype=gram.dtype))
        weights = torch.cholesky_solve(moment, factor)
        found.append((float(_hits(weights, chosen).mean()), weights))
    return max(found, key=lambda one: one[0])[1]


def _hits(weights: Tensor, rows: _Rows) -> Tensor:
    return ((rows.features @ weights).argmax(dim=1) == rows.answers).double()
