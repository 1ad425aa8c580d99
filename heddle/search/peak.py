"""The most bytes that tensors take at one time during a call, on CUDA and on a CPU.

Both count what torch's own allocator hands out on the device, what an operation takes for itself while it runs included. Not
counted is what libraries keep (cuBLAS's workspaces, oneDNN's scratch), the CUDA context, and what the allocator holds back.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.autograd.profiler import profile

# Kineto writes a line to the terminal whenever a profile begins or ends, below this level of its own.
QUIET = ("KINETO_LOG_LEVEL", "6")
EVENT = "[memory]"


def peak_bytes(call: Callable[[], object], held: Iterable[Tensor], device: str) -> int:
    """Bytes of `held`, which is there before and after, and the most that `call` takes beside it. It may free nothing of before.

    On CUDA by the allocator's own counter; on a CPU, which has none, by the record that torch's profiler keeps of each
    allocation of this thread. Either way the call runs once, and is slower than without.
    """
    return held_bytes(held) + (_taken_on_cuda(call) if device == "cuda" else _taken_on_cpu(call))


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory under `tensors`, that which several share counted once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _taken_on_cuda(call: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    # A block that is left over from earlier calls may be larger than what is asked for, and counts whole.
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _taken_on_cpu(call: Callable[[], object]) -> int:
    name, level = QUIET
    os.environ.setdefault(name, level)
    with profile(profile_memory=True) as record:
        call()
    assert record.kineto_results is not None
    events = [event for event in record.kineto_results.events() if event.name() == EVENT]
    taken = most = 0
    # A sort keeps the order of those that happen in one nanosecond.
    for event in sorted(events, key=lambda event: event.start_ns()):
        taken += event.nbytes()
        most = max(most, taken)
    return most
