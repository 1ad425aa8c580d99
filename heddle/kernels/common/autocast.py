"""Products in the types of their arguments, whatever autocast says."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def autocasts(x: Tensor) -> bool:
    """Whether products on the device of `x` compute in a type of their own here."""
    device = x.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A context in which products on the device of `x` compute in the types of their arguments."""
    device = x.device.type
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)
