"""What a cache holds, and the constants of the cost formulas.

Costs are closed forms: parameters, FLOPs (a multiply-add counts 2; norms, activations and the softmax are left out) and
cache bytes. Tests hold them to the built modules. What a whole model costs, and which bytes it moves, is in
`heddle.compose.costs`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# Tokens of a chunk in the chunked forms of the recurrences; their prefill costs are counted for it.
CHUNK = 64
FLOAT32_BYTES = 4


@dataclass(frozen=True, slots=True)
class State:
    """One tensor that a mixer's cache holds for one sequence.

    `shape` is that of the whole tensor or, if it `grows`, of one token's part of it. A growing one holds at most `limit`
    tokens; one part stands for `every` so many of them, and is there when they, and `late` more parts' tokens, are complete.
    `element` is the bytes of a number where the kind fixes them; None follows the model's dtype.
    """

    name: str
    shape: tuple[int, ...]
    grows: bool = False
    limit: int | None = None
    every: int = 1
    late: int = 0
    element: int | None = None

    def bytes(self, context: int, element: int) -> int:
        """Bytes after `context` tokens; nothing is held before the first."""
        held = max(0, context // self.every - self.late) if self.grows else min(context, 1)
        if self.limit is not None:
            held = min(held, self.limit)
        return held * math.prod(self.shape) * (self.element or element)

    def bytes_per_token(self, element: int) -> float:
        """Bytes of one token's part, its share of one that stands for several, or the whole of a state that does not grow."""
        return math.prod(self.shape) * (self.element or element) / self.every
