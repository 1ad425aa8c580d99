"""Long sequences a stretch after the other, so that training keeps what goes into a stretch instead of what comes up in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Tokens of a stretch.
STRETCH = 8192


def is_long(tokens: int) -> bool:
    """Whether parts of so many tokens are worked out again: where gradients are wanted of more than `STRETCH`."""
    return torch.is_grad_enabled() and tokens > STRETCH


def ends_chunks(chunk: int) -> bool:
    """Whether every stretch ends where a chunk of so many tokens does."""
    return STRETCH % chunk == 0


def in_stretches(
    part: Callable[..., tuple[Tensor, Any]], state: Any, sides: Sequence[Tensor]
) -> tuple[Tensor, Any]:
    """What `part(state, *sides)` gives: an output and the state after the last token.

    Where gradients are wanted of more than `STRETCH` tokens, `part` is called for one stretch after the other, and again in the
    backward pass (arXiv 1604.06174); else once.

    Shapes:  sides, out: [B, T, ...] each
    """
    if not is_long(sides[0].shape[1]):
        return part(state, *sides)
    told = []
    # Of slices each gradient would be as long as the whole.
    for given in zip(*(torch.split(side, STRETCH, dim=1) for side in sides), strict=True):
        o, state = checkpoint(part, state, *given, use_reentrant=False, preserve_rng_state=False)
        told.append(o)
    return torch.cat(told, dim=1), state
