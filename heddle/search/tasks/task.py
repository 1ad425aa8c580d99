"""What a task is: examples to train on, a score with its error, a solver, a chance level."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from heddle.compose.train import Batches, Recipe


@dataclass(frozen=True, slots=True)
class Score:
    """A measured value, its standard error, and how many independent units (sequences, windows) it rests on.

    `extras` holds further numbers of the same evaluation by name; the search does not steer by them.
    """

    value: float
    se: float
    n: int
    extras: Mapping[str, float] = field(default_factory=dict)


class Task(ABC):
    """One thing a model is trained for and scored at.

    A task is picklable and then carries its data: shipped to a worker, it needs no file there.
    `digest` names data, generator and held-out set: equal digests mean comparable scores.
    """

    name: str
    metric: Literal["accuracy", "bits_per_byte", "mean_squared_error"]
    higher_is_better: bool
    # The score of one who knows the format and nothing else; each task says how it is found.
    chance: float
    best: float
    sequence_length: int
    digest: str

    @abstractmethod
    def sample(self, batch: int, *, seed: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Inputs and targets as they are asked, int64 [B, T]; -100 where nothing is. The seed decides all.

        Targets that are classes of whole sequences, for an encoder with a readout, are [B, 1].
        """

    def training_batch(self, tokens: int, *, seed: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """A batch of about `tokens` tokens to learn from: `sample`, unless the task has an easier way in."""
        return self.sample(max(1, tokens // self.sequence_length), seed=seed, device=device)

    def batch_at(
        self,
        done: float,  # noqa: ARG002 - for tasks that begin otherwise
        tokens: int,
        *,
        seed: int,
        device: torch.device | str,
    ) -> tuple[Tensor, Tensor]:
        """The batch of a training of which the share `done`, 0 to 1, lies behind; most tasks are alike all along."""
        return self.training_batch(tokens, seed=seed, device=device)

    @abstractmethod
    def held_out(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """The fixed examples that `evaluate` scores: the same on every machine, never given by `sample`."""

    @abstractmethod
    def evaluate(self, model: nn.Module, *, device: torch.device | str) -> Score:
        """Scores `model` on the held-out examples, in float32."""

    @abstractmethod
    def oracle(self, inputs: Tensor) -> Tensor:
        """Targets found by a plain solver: right at every label, -100 where it sees no question. As targets."""

    @abstractmethod
    def reach(self, inputs: Tensor) -> Tensor:
        """How many tokens back the farthest token lies that an answer rests on; 0 for none. As targets, [B, T] or [B, 1]

        For an encoder, which sees both sides, how many tokens away.
        """

    def normalised(self, score: Score) -> float:
        """0 at chance, 1 at the best possible, below 0 under chance; higher is better for every metric."""
        return (score.value - self.chance) / (self.best - self.chance)


def batches(task: Task, recipe: Recipe, device: torch.device | str) -> Batches:
    """Step → batch for `heddle.compose.train.fit`; equal seeds of a recipe see equal examples."""
    return lambda step: task.batch_at(
        step * recipe.batch_tokens / recipe.tokens,
        recipe.batch_tokens,
        seed=seed_of("train", recipe.seed, step),
        device=device,
    )


def seed_of(*parts: object) -> int:
    """A 63-bit seed that differs wherever the parts differ: neighbouring seeds give unrelated streams."""
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def digest_of(*parts: object) -> str:
    """16 hex digits naming the parts."""
    return hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).hexdigest()[:16]
