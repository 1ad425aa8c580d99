"""Which of torch's attention backends come first, by device family and shape; tests/bench/window_check.py times them all.

On an H200 in bfloat16 (tests/bench/results/evidence-window-attention.jsonl) cuDNN takes 1.05 ms and flash 1.73 at B = 8,
T = 4,096, 16 heads of 128, causal, forward. cuDNN builds a plan for every new shape, 46 ms and more, so steps with a cache
that grows and short prompts of many lengths are not sent there. They are not kept from it either: torch 2.11's own order,
which holds where no rule does, begins with cuDNN on Hopper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from heddle.kernels.configs.found import found_for

Backend = Literal["cudnn", "flash", "efficient", "math"]
# More queries than any call has.
NEVER = 1 << 62


@dataclass(frozen=True, slots=True)
class Rule:
    """The order of the backends for at least so many queries, when gradients are wanted and when not, without a mask or with one.

    It is about heads, the larger of keys and of values, above the size `above` and up to `largest`.
    """

    order: tuple[Backend, ...]
    training: int
    inference: int
    largest: int
    masked: bool = False
    above: int = 0

    def holds(self, *, queries: int, size: int, masked: bool, training: bool) -> bool:
        """Whether this rule is about such a call."""
        least = self.training if training else self.inference
        return masked == self.masked and self.above < size <= self.largest and queries >= least


# Where no rule holds torch has its own order. A backend that does not take a call leaves it to the next.
HOPPER = (Rule(("cudnn", "flash", "efficient", "math"), training=512, inference=2048, largest=256),)
OTHER: tuple[Rule, ...] = ()


def rules(capability: tuple[int, int]) -> tuple[Rule, ...]:
    """The rules for a CUDA compute capability; the first that holds is the one."""
    return HOPPER if capability[0] == 9 else OTHER


def rules_on(
    device: str, capability: tuple[int, int], *, triton: str | None, library: str
) -> tuple[Rule, ...]:
    """Those that `heddle bench --tune` found for a device of this name and this version of torch, and behind them the shipped."""
    found = found_for("dense_attention", device=device, triton=triton, library=library, made=kept_rule)
    return (*found.values(), *rules(capability))


def kept_rule(order: Sequence[Backend], *rest: Any) -> Rule:
    """A rule as a file keeps it."""
    return Rule(tuple(order), *rest)
