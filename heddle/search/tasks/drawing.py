"""How random parts of examples are drawn: on the device of the generator, a whole batch at once."""

from __future__ import annotations

import torch
from torch import Tensor

from heddle.search.tasks.task import seed_of

# Of so many numbers every choice is equally likely; of more, a sorted draw is spread apart.
PERMUTED = 1 << 18


def generator_for(task: str, purpose: str, seed: int, device: torch.device | str) -> torch.Generator:
    """Streams of different tasks and purposes never meet, whatever the seeds."""
    return torch.Generator(device).manual_seed(seed_of(task, purpose, seed))


def uniform(below: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Whole numbers from 0, all equally likely, int64."""
    return torch.randint(below, shape, generator=generator, device=generator.device)


def distinct(batch: int, below: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` distinct numbers a row in an order that is equally likely as any. [batch, count]

    Every choice is equally likely up to 262,144 numbers; of more, numbers that are close together are a little less likely.
    """
    if below <= PERMUTED:
        return (
            torch.rand(batch, below, generator=generator, device=generator.device).topk(count, dim=1).indices
        )
    numbers = uniform(below - count + 1, (batch, count), generator).sort(dim=1).values
    numbers += torch.arange(count, device=generator.device)
    return numbers.gather(1, distinct(batch, count, count, generator))


def places(batch: int, below: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` distinct numbers a row in ascending order: where things stand that keep their order. [batch, count]"""
    ranks = torch.rand(batch, below, generator=generator, device=generator.device)
    return ranks.topk(count, dim=1).indices.sort(dim=1).values


def covering(batch: int, count: int, kinds: int, generator: torch.Generator) -> Tensor:
    """`count` numbers below `kinds` a row, each of them at least once. [batch, count]"""
    numbers = uniform(kinds, (batch, count), generator)
    once = torch.arange(kinds, device=generator.device).expand(batch, -1)
    return numbers.scatter_(1, distinct(batch, count, kinds, generator), once)


def picked(options: list[list[int]], length: int, generator: torch.Generator) -> Tensor:
    """For each row, one of its options at each of `length` places, all equally likely. [rows, length]"""
    rows = [torch.tensor(one)[torch.randint(len(one), (length,), generator=generator)] for one in options]
    return torch.stack(rows)
