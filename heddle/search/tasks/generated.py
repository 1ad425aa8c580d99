"""What the tasks share whose examples are drawn by a generator and scored by accuracy."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import ClassVar, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from heddle.errors import HeddleError, Where
from heddle.search.tasks.drawing import generator_for
from heddle.search.tasks.scoring import judge, ratio_with_error
from heddle.search.tasks.task import Score, Task, digest_of
from heddle.specs import TaskSchema

HELD_OUT = 512

S = TypeVar("S", bound=TaskSchema)


class Generated(Task, Generic[S]):
    """Examples drawn afresh for every batch; 512 held-out ones, drawn on the CPU, the same on every machine.

    A task says how a batch is drawn, how a row is solved, how far back each answer rests, and what one answers who
    knows the format but reads no question. `chance` is what that guesser scores.

    Extras: where the answers of a task rest at different distances, `near_accuracy` and `far_accuracy`, over the quarters of
    the labels whose `reach` is least and greatest.

    With `test_lengths` the extras hold `accuracy_at_L` and `chance_at_L` for each of those lengths L, over the held-out examples
    of the task of that length; neither training nor score know of them. A length at which the loss is not finite is left out.

    Raises `out-of-range` for fields that do not go together and for a vocabulary that is too small.
    """

    metric: Literal["accuracy", "bits_per_byte", "mean_squared_error"] = "accuracy"
    higher_is_better = True
    best = 1.0
    held_out_rows: ClassVar[int] = HELD_OUT
    # Raised with every change of a generator or of its held-out set, so that old scores are not taken for new ones.
    revision: ClassVar[int] = 1

    def __init__(self, spec: S, *, vocab_size: int, sequence_length: int) -> None:
        _check(spec, vocab_size)
        self.spec, self.sequence_length = spec, sequence_length
        fields = spec.plain(leave=("kind", "tokens", "learning_rate", "learning_rates"))
        if not spec.other_lengths:
            fields.pop("test_lengths", None)
        settings = [f"{name}={value}" for name, value in sorted(fields.items())]
        self.digest = digest_of(self.name, self.revision, *settings, self.held_out_rows)
        make: Callable[..., Generated[S]] = type(self)
        self._others = {
            length: make(spec.at_length(length), vocab_size=vocab_size) for length in spec.other_lengths
        }

    @abstractmethod
    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs and targets as they are scored, int64 [batch, T], on the generator's device."""

    @abstractmethod
    def solve(self, row: list[int]) -> list[int]:
        """The targets of a row; -100 where there is no question."""

    @abstractmethod
    def lags(self, row: list[int]) -> list[int]:
        """For each token of a row, how far back the farthest token stands that its answer rests on; 0: no question."""

    @abstractmethod
    def guess(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        """What one answers who knows the format and reads no question; a CPU generator. [B, T] on the CPU"""

    def baselines(self, inputs: Tensor, targets: Tensor) -> Mapping[str, float]:  # noqa: ARG002
        """What plain rules score on these examples, by name."""
        return {}

    def parts(self, hits: Tensor) -> Mapping[str, float]:  # noqa: ARG002
        """Accuracies of parts of the answers, by name. hits: bool [rows, T]"""
        return {}

    def lesson(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A batch to learn from: as it is scored, unless the task has more labels to show."""
        return self.draw(batch, generator)

    def sample(self, batch: int, *, seed: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        return self.draw(batch, generator_for(self.name, "sample", seed, device))

    def training_batch(self, tokens: int, *, seed: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        rows = max(1, tokens // self.sequence_length)
        return self.lesson(rows, generator_for(self.name, "sample", seed, device))

    def held_out(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        # Drawn on the CPU, whose generator gives the same everywhere.
        inputs, targets = self.draw(self.held_out_rows, generator_for(self.name, "held-out", 0, "cpu"))
        return inputs.to(device), targets.to(device)

    def evaluate(self, model: nn.Module, *, device: torch.device | str) -> Score:
        """Accuracy over all answers; its error counts sequences, whose answers stand or fall together."""
        score = self._at_this_length(model, device)
        return replace(score, extras={**score.extras, **self._at_other_lengths(model, device)})

    def oracle(self, inputs: Tensor) -> Tensor:
        return torch.tensor([self.solve(row) for row in inputs.tolist()])

    def reach(self, inputs: Tensor) -> Tensor:
        return torch.tensor([self.lags(row) for row in inputs.tolist()])

    def _at_this_length(self, model: nn.Module, device: torch.device | str) -> Score:
        inputs, targets = self.held_out(device)
        _, hits = judge(model, inputs, targets)
        asked = (targets >= 0).cpu()
        value, se = ratio_with_error(hits.sum(dim=1).tolist(), asked.sum(dim=1).tolist())
        extras = {
            **self._by_lag(inputs, asked, hits),
            **self.parts(hits),
            **self.baselines(inputs, targets),
        }
        return Score(value, se, len(inputs), extras)

    def _at_other_lengths(self, model: nn.Module, device: torch.device | str) -> dict[str, float]:
        found: dict[str, float] = {}
        for length, task in self._others.items():
            # A trial whose model fails at a length that was not trained keeps its score.
            try:
                score = task._at_this_length(model, device)
            except torch.OutOfMemoryError:
                continue
            except HeddleError as error:
                if error.code not in ("loss-not-finite", "out-of-memory"):
                    raise
                continue
            found |= {f"accuracy_at_{length}": score.value, f"chance_at_{length}": task.chance}
        return found

    def _by_lag(self, inputs: Tensor, asked: Tensor, hits: Tensor) -> dict[str, float]:
        lags = self.reach(inputs)[asked].double()
        quarters = lags.quantile(torch.tensor([0.25, 0.75], dtype=torch.float64))
        if quarters[0] == quarters[1]:
            return {}
        right = hits[asked].double()
        near, far = right[lags <= quarters[0]].mean(), right[lags >= quarters[1]].mean()
        return {"near_accuracy": float(near), "far_accuracy": float(far)}


def _check(spec: TaskSchema, vocab_size: int) -> None:
    where = Where(path="search.tasks")
    for field, what, hint in spec.all_misfits():
        raise HeddleError("out-of-range", f"{spec.told}: {field}: {what}", where=where, hint=hint)
    if vocab_size < spec.ids:
        what = f"{vocab_size} is too small for {spec.told}, which needs {spec.ids} tokens"
        hint = f"model.vocab_size: {spec.ids}, or {spec.fewer}"
        raise HeddleError("out-of-range", what, where=where, hint=hint)
