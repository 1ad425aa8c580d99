"""Which table of launches an op reads on a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from heddle.kernels.configs.found import found_for, overlaid
from heddle.kernels.op import TRITON_VERSION

Family = TypeVar("Family")
Rule = Callable[[tuple[int, int]], Family]


def table_on(device: torch.device, op: str, interpreter: Family, rule: Rule[Family]) -> tuple[Family, int]:
    """The op's table, with what was found on this machine in it, and the multiprocessors of the device.

    Elsewhere than on CUDA it is that of the interpreter, and one. `rule` gives the shipped table of a compute capability.
    """
    if device.type != "cuda":
        return interpreter, 1
    seen = torch.cuda.get_device_properties(device)
    table = rule((seen.major, seen.minor))
    found = found_for(op, device=seen.name, triton=TRITON_VERSION)
    return overlaid(table, found), seen.multi_processor_count
