"""Which of torch's attention backends come first, by device family and shape; tests/bench/window_check.py times them all.

Measured so far, on an H200 in bfloat16: cuDNN 1.03 ms, flash 1.71 ms at B = 8, T = 4,096, 16 heads of 128, causal, forward. cuDNN
builds a plan for every new shape, which takes longer than a short call saves. So calls whose lengths differ from one to the next
must not go there: steps with a cache, which have few queries, and prefill of short prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Backend = Literal["cudnn", "flash", "efficient", "math"]


@dataclass(frozen=True, slots=True)
class Rule:
    """The order of the backends for at least so many queries, when gradients are wanted and when not, without a mask or with one.

    `largest`: the larger head size of keys and of values at most
    """

    order: tuple[Backend, ...]
    training: int
    inference: int
    largest: int
    masked: bool = False

    def holds(self, *, queries: int, size: int, masked: bool, training: bool) -> bool:
        """Whether this rule is about such a call."""
        least = self.training if training else self.inference
        return masked == self.masked and size <= self.largest and queries >= least


# Where no rule holds torch has its own order. A backend that does not take a call leaves it to the next.
HOPPER = (Rule(("cudnn", "flash", "efficient", "math"), training=512, inference=2048, largest=256),)
OTHER: tuple[Rule, ...] = ()


def rules(capability: tuple[int, int]) -> tuple[Rule, ...]:
    """The rules for a CUDA compute capability; the first that holds is the one."""
    return HOPPER if capability[0] == 9 else OTHER
