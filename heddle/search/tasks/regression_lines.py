"""Predictors of linear regression in closed form: the lines that a model in context may land on (arXiv 2503.12734).

Shapes:  x: [B, n, d];  y: [B, n];  query: [B, d];  predictions: [B], float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# The rates among which the best is taken.
RATES = tuple(0.05 * step for step in range(1, 41))


def ridge(x: Tensor, y: Tensor, query: Tensor, penalty: float) -> Tensor:
    """xqᵀ (XᵀX + λI)⁻¹ Xᵀy. Best possible at λ = σ²d where y = βᵀx + ε, β ~ N(0, I/d) and ε ~ N(0, σ²)."""
    gram = x.mT @ x + penalty * torch.eye(x.shape[2], dtype=x.dtype)
    beta: Tensor = torch.linalg.solve(gram, (x.mT @ y[..., None]).squeeze(2))
    return (beta * query).sum(dim=1)


def gradient_steps(x: Tensor, y: Tensor, query: Tensor, *, rate: float, steps: int) -> Tensor:
    """Gradient descent on the mean squared error from zero: β ← β + η/n Xᵀ(y - Xβ).

    One step is what a layer of linear attention, or of softmax attention with two heads, can do at best.
    """
    gram, moment = x.mT @ x / x.shape[1], (x.mT @ y[..., None]).squeeze(2) / x.shape[1]
    beta = torch.zeros_like(query)
    for _ in range(steps):
        beta = beta + rate * (moment - (gram @ beta[..., None]).squeeze(2))
    return (beta * query).sum(dim=1)


def delta_rule_pass(x: Tensor, y: Tensor, query: Tensor, *, rate: float) -> Tensor:
    """One pass of the delta rule over the examples: β ← β + η (y_i - βᵀx_i) x_i / |x_i|²; what one DeltaNet layer can do."""
    beta = torch.zeros_like(query)
    for xi, yi in zip(x.unbind(1), y.unbind(1), strict=True):
        error = yi - (beta * xi).sum(dim=1)
        beta = beta + rate * (error / xi.square().sum(dim=1))[:, None] * xi
    return (beta * query).sum(dim=1)


def best_rate(predict: Callable[..., Tensor], y: Tensor) -> float:
    """The rate of `RATES` with which `predict(rate=…)` errs least."""
    errors = torch.stack([(predict(rate=rate) - y).square().mean() for rate in RATES])
    # A rate at which it diverges is none of the best.
    return RATES[int(errors.nan_to_num(nan=torch.inf).argmin())]
