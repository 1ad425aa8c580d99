"""The memory of a recurrent mixer: how it is asked and kept, and one of random states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from heddle.compose.cache import Call, PreallocatedRecurrentLayer
from heddle.compose.modules.precision import wide_dtype
from heddle.compose.modules.short_conv import ShortConv

MEMORY = "memory"


def remember(
    op: Callable[..., tuple[Tensor, Tensor]],
    step: Callable[..., tuple[Tensor, Tensor]],
    *sides: Tensor,
    call: Call,
    **options: Any,
) -> Tensor:
    """What the memory answers, by `step` for one token after others, else by `op`; the state after them is kept.

    Shapes:  sides: [B, T, H, *] each, but decays that are one for all tokens, as `op` takes them;  out: [B, T, HV, V]
    """
    past = call.state(MEMORY)
    if past is not None and sides[0].shape[1] == 1:
        o, state = step(*sides, past, **options)
    else:
        o, state = op(*sides, initial_state=past, cu_seqlens=call.cu_seqlens, **options)
    call.keep(memory=state)
    return o


def filled_memory(
    shape: tuple[int, ...], context: int, like: Tensor, *, conv: ShortConv | None = None
) -> PreallocatedRecurrentLayer:
    """A cache of random states after `context` tokens, whose step repeats.  Shapes:  memory: `shape`, [B, …], wide"""
    states = {MEMORY: like.new_empty(shape, dtype=wide_dtype(like.dtype)).normal_()}
    if conv is not None:
        states["conv"] = like.new_empty(shape[0], *conv.state_shape()).normal_()
    return PreallocatedRecurrentLayer(states, context=context)
