"""Whether the host may wait for what a device computes."""

from __future__ import annotations

import torch
from torch import Tensor


def can_wait(x: Tensor) -> bool:
    """Whether code may look at what was computed: no compiler traces it, no graph is captured, there are numbers."""
    is_captured = x.is_cuda and torch.cuda.is_current_stream_capturing()
    return not (torch.compiler.is_compiling() or is_captured or x.is_meta)
