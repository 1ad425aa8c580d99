"""The first steps of a training, in which a mixer that selects reads everything."""

from __future__ import annotations

import torch
from torch import Tensor

from heddle.compose.init import Initialised, fill


class FirstSteps(Initialised):
    """Whether a training is in the first `share` of its steps, told on the device, so that a CUDA graph can replay a step.

    Whoever trains the model calls `before_training` and, after each step, `after_step`, as `heddle.compose.train.fit` does; else
    no step is a first one.

    Shapes:  left: [] int64, how many of them are still to come
    """

    left: Tensor

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share
        self.register_buffer("left", torch.empty((), dtype=torch.int64), persistent=False)

    def initialise(self, std: float) -> None:  # noqa: ARG002 - nothing is trained yet
        fill(self.left, torch.zeros(()))

    @torch.no_grad()
    def before_training(self, steps: int) -> None:
        """`steps`: how many steps the whole training has."""
        self.left.fill_(round(self.share * steps))

    @torch.no_grad()
    def after_step(self) -> None:
        self.left.copy_((self.left - 1).clamp(min=0))

    def now(self) -> Tensor:
        """Shapes:  out: [] bool"""
        return self.left > 0


def routed(p: Tensor, first: FirstSteps | None) -> Tensor:
    """The most probable choice as 0 and 1, of equal ones the first; in `first` steps the first one.

    Shapes:  p, out: [..., choices]
    """
    chosen = torch.zeros_like(p).scatter(-1, p.argmax(dim=-1, keepdim=True), 1.0)
    if first is None:
        return chosen
    dense = torch.zeros_like(p)
    dense[..., 0] = 1.0
    return torch.where(first.now(), dense, chosen)


def asked(p: Tensor) -> Tensor:
    """1 where the first of two choices is the most probable one, else 0, with the gradient of its probability.

    What a budget asks for, in first steps as well, where it is not what is done.  Shapes:  p: [..., 2];  out: [...]
    """
    return (p[..., 0] >= p[..., 1]).to(p.dtype) + (p[..., 0] - p[..., 0].detach())


def first_steps(share: float | None) -> FirstSteps | None:
    """None where there are none."""
    return FirstSteps(share) if share else None
