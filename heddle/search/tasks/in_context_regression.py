"""Linear regression from examples in context (arXiv 2208.01066), with numbers written as tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property, partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from heddle.compose.train import IGNORE
from heddle.search.tasks import regression_lines as lines
from heddle.search.tasks.drawing import generator_for, uniform
from heddle.search.tasks.generated import Generated
from heddle.search.tasks.scoring import predicted_means, ratio_with_error
from heddle.search.tasks.task import Score
from heddle.specs.tasks import InContextRegressionTask

# Levels of y reach so many standard deviations to both sides.
SPREAD = 4.0
# Sequences on which the rates of the lines are chosen.
RATE_ROWS = 512


class InContextRegression(Generated[InContextRegressionTask]):
    """y = βᵀx + ε with β ~ N(0, I/d), x uniform in {-1, +1}^d, ε ~ N(0, σ²), a new β in each sequence.

    Ids: 0..2^d-1 are the vectors x, one token each, then the levels that y is rounded to, evenly over four standard
    deviations to both sides. A sequence is x1 y1 … xn yn xq; the target at an x is the level of its y, in training at
    every x, scored at the last. The prediction is the mean of the levels under the model's probabilities for them, the
    score its mean squared error, the rounding included.

    Chance: the error of predicting 0. Best: that of ridge regression with λ = σ²d, which is the Bayes predictor; both on the
    held-out sequences, so `normalised` is 1 - (excess risk)/(excess risk of 0).

    Extras, on the same sequences, each at its best rate: `line_gradient_1` … `line_gradient_4`, that many steps of gradient
    descent, and `line_delta_rule`, one pass of the delta rule (arXiv 2503.12734).

    Shapes:  inputs, targets: [B, 2n + 1] int64.
    """

    name = "in_context_regression"
    metric = "mean_squared_error"
    higher_is_better = False
    held_out_rows: ClassVar[int] = 2048

    def __init__(self, spec: InContextRegressionTask, *, vocab_size: int) -> None:
        super().__init__(spec, vocab_size=vocab_size, sequence_length=2 * spec.examples + 1)
        self._vectors = 2**spec.dimensions
        end = SPREAD * math.sqrt(1.0 + spec.noise)
        self.levels = torch.linspace(-end, end, spec.levels, dtype=torch.float64)
        x, y, query, truth = self.examples(*self.held_out("cpu"))
        self.chance = float(truth.square().mean())
        self.best = float((lines.ridge(x, y, query, self._penalty) - truth).square().mean())

    @property
    def _penalty(self) -> float:
        return self.spec.noise * self.spec.dimensions

    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        inputs, targets = self.lesson(batch, generator)
        targets[:, :-1] = IGNORE
        return inputs, targets

    def lesson(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        s, device = self.spec, generator.device
        ids = uniform(self._vectors, (batch, s.examples + 1), generator)
        beta = torch.randn(batch, s.dimensions, 1, generator=generator, device=device) / math.sqrt(
            s.dimensions
        )
        noise = torch.randn(ids.shape, generator=generator, device=device) * math.sqrt(s.noise)
        y = (self._signs(ids).float() @ beta).squeeze(2) + noise
        ends = float(self.levels[-1])
        levels = ((y + ends) / (2 * ends) * (s.levels - 1)).round().long().clamp(0, s.levels - 1)
        tokens = torch.stack([ids, self._vectors + levels], dim=2).flatten(1)
        targets = torch.full_like(tokens, IGNORE)
        targets[:, ::2] = tokens[:, 1::2]
        return tokens[:, :-1], targets[:, :-1]

    def examples(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x and y of the context, x and y of the question, as numbers. [B, n, d], [B, n], [B, d], [B] float64"""
        x = self._signs(inputs[:, ::2]).double()
        return x[:, :-1], self._numbers(inputs[:, 1::2]), x[:, -1], self._numbers(targets[:, -1])

    def evaluate(self, model: nn.Module, *, device: torch.device | str) -> Score:
        """Mean squared error of the predicted mean; its standard error counts sequences."""
        inputs, targets = self.held_out(device)
        truth = self.examples(inputs.cpu(), targets.cpu())[3]
        predicted = predicted_means(model, inputs, targets, self._vectors, self.levels)
        errors = (predicted - truth).square().tolist()
        value, se = ratio_with_error(errors, [1.0] * len(errors))
        return Score(value, se, len(inputs), self.line_scores)

    @cached_property
    def line_scores(self) -> dict[str, float]:
        """What simpler predictors score on the held-out sequences, at rates found on sequences of their own."""
        generator = generator_for(self.name, "rates", 0, "cpu")
        *known, truth = self.examples(*self.draw(RATE_ROWS, generator))
        *asked, answers = self.examples(*self.held_out("cpu"))
        forms: dict[str, Callable[..., Tensor]] = {
            f"gradient_{steps}": partial(lines.gradient_steps, steps=steps) for steps in range(1, 5)
        }
        forms["delta_rule"] = lines.delta_rule_pass
        found = {}
        for name, form in forms.items():
            rate = lines.best_rate(partial(form, *known), truth)
            found[f"line_{name}"] = float((form(*asked, rate=rate) - answers).square().mean())
        return found

    def oracle(self, inputs: Tensor) -> Tensor:
        """The level next to the prediction of ridge regression, at the last token."""
        inputs = inputs.cpu()
        x, y, query, _ = self.examples(inputs, inputs)
        predicted = lines.ridge(x, y, query, self._penalty)
        answers = torch.full(inputs.shape, IGNORE)
        answers[:, -1] = self._vectors + (predicted[:, None] - self.levels).abs().argmin(dim=1)
        return answers

    def solve(self, row: list[int]) -> list[int]:
        answers: list[int] = self.oracle(torch.tensor([row]))[0].tolist()
        return answers

    def lags(self, row: list[int]) -> list[int]:
        return [place if place % 2 == 0 else 0 for place in range(len(row))]

    def guess(self, inputs: Tensor, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """The level next to 0."""
        return torch.full(inputs.shape, self._vectors + int(self.levels.abs().argmin()))

    def _signs(self, ids: Tensor) -> Tensor:
        """The vectors x of token ids, ±1. [..., d]"""
        bits = ids[..., None] >> torch.arange(self.spec.dimensions, device=ids.device) & 1
        return 2 * bits - 1

    def _numbers(self, ids: Tensor) -> Tensor:
        return self.levels[(ids - self._vectors).clamp(0, self.spec.levels - 1)]
