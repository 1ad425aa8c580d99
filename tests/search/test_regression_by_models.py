"""One layer, trained on linear regression from examples written as vectors, lands on its closed-form line (arXiv 2503.12734)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import call_at, mixer_of

D, EXAMPLES, NOISE = 5, 40, 0.1
# Weights of a head at logits ω x · x_q: those of the best ω are looked for among these.
SCALES = [step / 50 for step in range(1, 40)]


def examples(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Tokens [x; y] of 40 examples and [x; 0] of the query, and the query's y.  Shapes:  [B, 41, 6], [B]"""
    generator = torch.Generator().manual_seed(seed)
    x, beta = (
        torch.randn(rows, EXAMPLES + 1, D, generator=generator),
        torch.randn(rows, D, 1, generator=generator),
    )
    y = (x @ beta / D**0.5).squeeze(2) + NOISE**0.5 * torch.randn(rows, EXAMPLES + 1, generator=generator)
    known = y.clone()
    known[:, -1] = 0.0
    return torch.cat([x, known[..., None]], dim=2), y[:, -1]


def line(tokens: Tensor, truth: Tensor, signs: tuple[int, ...]) -> float:
    """The least error of heads of softmax attention at logits ± ω x · x_q, the query among its own keys.

    With both signs and a small ω that is a step of gradient descent on examples without their mean.
    """
    x, y = tokens[..., :D].double(), tokens[..., D].double()
    logits, errors = (x * x[:, -1:]).sum(2), []
    for scale in SCALES:
        heads = torch.stack([((sign * scale * logits).softmax(1) * y).sum(1) for sign in signs], dim=1)
        shares = torch.linalg.lstsq(heads, truth.double()[:, None]).solution
        errors.append(float((heads @ shares - truth.double()[:, None]).square().mean()))
    return min(errors)


def trained(mixer: nn.Module, steps: int) -> nn.Module:
    """The mixer after so many batches of 64; its last output is y."""
    optimiser = torch.optim.Adam(mixer.parameters(), 3e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for step in range(steps):
        tokens, truth = examples(64, 10 + step)
        loss = (said(mixer, tokens) - truth).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return mixer


def said(mixer: nn.Module, tokens: Tensor) -> Tensor:
    answers: Tensor = mixer(tokens, call_at(0, EXAMPLES + 1, rows=len(tokens)))[:, -1, -1]
    return answers


@pytest.mark.parametrize(
    ("kind", "heads", "steps", "signs"),
    [
        pytest.param("attention", 1, 2000, (1,), marks=pytest.mark.slow),
        pytest.param("attention", 4, 5000, (1, -1), marks=pytest.mark.long),
        pytest.param("linear_attention", 4, 1200, (1, -1), marks=pytest.mark.long),
    ],
)
def test_a_trained_layer_lands_on_its_line(kind: str, heads: int, steps: int, signs: tuple[int, ...]) -> None:
    fields: dict[str, Any] = {"heads": heads, "head_dim": D + 1, "rope": None}
    mixer = trained(mixer_of(D + 1, kind, **fields).float().train(), steps)
    tokens, truth = examples(8000, 1)
    with torch.no_grad():
        error = float((said(mixer, tokens) - truth).square().mean())
    assert error == pytest.approx(line(tokens, truth, signs), rel=0.02)
