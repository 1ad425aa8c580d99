"""What a call of an op costs the host, on a machine without a GPU: everything of a call but the launch itself.

    python tests/bench/host_profile.py --ops decay_attention gla --stages

Tensors lie in the memory of the host, and the kernels run nowhere: Triton gets a driver that says it is a Hopper GPU, and in
place of compiled kernels objects that do nothing. So these figures lack what the driver and the allocator of a GPU cost; they
compare two states of the code. Each is processor time, the least of many repeats, since others may use the cores.
"""

from __future__ import annotations

import argparse
import cProfile
import itertools
import pstats
import time
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from heddle.kernels import OPS as ALL_OPS
from heddle.kernels import force_path
from heddle.kernels import op as op_module
from heddle.kernels.accuracy import draw

OPS = {op.name: op for op in ALL_OPS}
OPS_OF_LINEAR_ATTENTION = ("decay_attention", "simple_gla", "gla", "gated_delta_rule", "delta_rule", "kda")
# Small: what memory of the host costs is not asked for.
SHAPE = {"B": 1, "T": 32, "H": 2, "HV": 2, "K": 32, "V": 32}
PHASES = ("fwd", "fwdbwd", "decode")
REPEATS, CALLS = 300, 4


class _Driver:
    """What Triton asks of a driver before it launches."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class _Kernel(CompiledKernel):  # type: ignore[misc]
    """A compiled kernel that does nothing."""

    def __init__(self) -> None:
        self.name, self.src, self.module = "nothing", None, self
        self.function, self.packed_metadata = 0, ()
        self._run = lambda *_: None


def _compile_nothing(self: Any, key: str, _signature: object, device: int, *_: object) -> _Kernel:
    kernel = self.device_caches[device][0][key] = _Kernel()
    return kernel


def stand_in() -> None:
    """From here on the kernels of all ops can be called, and do nothing."""
    triton.runtime.driver.set_active(_Driver())
    JITFunction._do_compile = _compile_nothing
    op_module._triton_runs = lambda *_: True


def calls(name: str) -> dict[str, Callable[[], object]]:
    """A call without gradients, one with them, and a decode step."""
    op = OPS[name]
    sample = draw(op, SHAPE, torch.bfloat16, initial_state=False)
    wanted = op.cases.differentiable
    leaves = {key: x.detach().requires_grad_(key in wanted) for key, x in sample.arguments.items()}
    single = draw(op, {**SHAPE, "T": 1}, torch.bfloat16).arguments
    single["state"] = single.pop("initial_state")

    def forward() -> object:
        with torch.no_grad():
            return op(**leaves)

    def both() -> object:
        return torch.autograd.grad(op(**leaves)[0], [leaves[key] for key in wanted], sample.upstream[0])

    def step() -> object:
        assert op.step is not None
        with torch.no_grad():
            return op.step(**single)

    return {"fwd": forward, "fwdbwd": both, "decode": step}


def host_us(call: Callable[[], object]) -> tuple[float, float]:
    """Microseconds of a call: the least of all repeats, and their median."""
    for _ in range(20):
        call()
    taken = []
    for _ in range(REPEATS):
        begin = time.process_time()
        for _ in range(CALLS):
            call()
        taken.append((time.process_time() - begin) / CALLS * 1e6)
    return min(taken), sorted(taken)[REPEATS // 2]


def stages(call: Callable[[], object]) -> None:
    """Where the time goes, by function. The profiler itself makes Python calls several times as slow."""
    with cProfile.Profile() as profile:
        for _ in range(500):
            call()
    pstats.Stats(profile).sort_stats("tottime").print_stats(25)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ops", nargs="+", choices=sorted(OPS), default=OPS_OF_LINEAR_ATTENTION)
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=PHASES)
    parser.add_argument("--stages", action="store_true", help="list the functions that take the time")
    chosen = parser.parse_args()
    stand_in()
    torch.set_num_threads(1)
    # Also those that no GPU has proven.
    with force_path("triton"):
        for name, phase in itertools.product(chosen.ops, chosen.phases):
            call = calls(name)[phase]
            least, median = host_us(call)
            print(f"{name:18} {phase:7} {least:7.1f} us, median {median:7.1f}", flush=True)
            if chosen.stages:
                stages(call)


if __name__ == "__main__":
    main()
