"""Products in the types of their arguments, whatever autocast says."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def autocasts(x: Tensor) -> bool:
    """Whether products on the device of `x` compute in a type of their own here."""
    device = x.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A context in which products on the device of `x` compute in the types of their arguments."""
    device = x.device.type
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def out_of_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """The function, whose products are in the types of its arguments; autocast is that of the first tensor's device."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        x = next((one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)), None)
        if x is None or not autocasts(x):
            return function(*args, **kwargs)
        with without_autocast(x):
            return function(*args, **kwargs)

    return call
