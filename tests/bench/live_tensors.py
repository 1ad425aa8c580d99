"""A count on a CPU of the tensors that live at once in both directions of a layer, at the sizes of `peak_memory.py`.

    python tests/bench/live_tensors.py still token_router
    python tests/bench/live_tensors.py still --tokens 16384 --largest 20

Tensors are fake: they have shapes and no numbers. Ops take the path of CUDA and are known by the shapes of their results, so that
what kernels and libraries take while they run is not counted. Torch's attention keeps and gives what the fused backends do; its
math path (groups of heads with a mask that wants a gradient, torch 2.11) goes op by op. Prints the peak above what was there
before, in MiB, both as a multiple of inputs, outputs and gradients, and the largest of what lived then by the op that made them.
Exits with 1 if a layer is above the goal.

An H200 had (tests/bench/results/evidence-peak-memory.jsonl), and this counts for the same code, MiB above what was there: `still`
6,254 and 6,287, `contmix` 2,313 and 2,313, `layer_router` 3,214 and 3,214, `mla` 3,632 and 3,628, `routing` 3,174 and 3,136,
`attention` 2,512 and 2,378, `moh` 2,937 and 2,660, and `token_router`, by the math path, 4,355 and 4,591. Lists that the
gradients of `block_attention` walk over are made inside of an op, and so are not counted.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any
from unittest.mock import patch

import peak_memory
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MIB = 2**20
# What matrix products keep on an H200.
WORKSPACES = 64 * MIB


class Fused(torch.autograd.Function):
    """The tensors of attention by a fused backend: logarithms of sums are kept, queries' gradients are summed in float32."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        B, H, T, _ = q.shape
        o = q.new_empty(B, T, H, v.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(q, k, v, mask, o, q.new_empty(B, H, T, dtype=torch.float32))
        return o

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, *_rest = ctx.saved_tensors
        sums = q.new_empty(q.shape, dtype=torch.float32)
        d_mask = None
        if ctx.needs_input_grad[3]:
            # One of each head.
            d_mask = q.new_empty(*q.shape[:3], k.shape[2]).sum_to_size(mask.shape)
        given = (*map(torch.empty_like, (q, k, v)), d_mask)
        del sums
        return given


class Softmax(torch.autograd.Function):
    """The softmax of torch's math path, which gives 0 for rows without a key."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        p, is_empty = torch.softmax(x, -1), x.eq(-torch.inf)
        found = torch.where(is_empty.all(-1, keepdim=True), x.new_zeros(()), p)
        ctx.save_for_backward(found)
        return found

    @staticmethod
    def backward(ctx: Any, *d_p: Tensor) -> Tensor:
        (p,) = ctx.saved_tensors
        return torch._softmax_backward_data(d_p[0], p, -1, p.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *_: Any) -> Tensor:
    """The tensors of `dense_attention` on CUDA."""
    group = q.shape[1] // k.shape[1]
    if mask is None or not mask.requires_grad or group == 1:
        return Fused.apply(q, k, v, mask)  # type: ignore[no-any-return, no-untyped-call]
    root = q.shape[-1] ** -0.25
    keys, values = (side.float().repeat_interleave(group, dim=1) for side in (k, v))
    logits = (q.float() * root) @ (keys.mT * root)
    logits = logits + mask
    p: Tensor = Softmax.apply(logits)  # type: ignore[no-untyped-call]
    return (p @ values).to(q.dtype)


@dataclass
class Live(TorchDispatchMode):
    """The most bytes of storages that lived at once, and what they were."""

    most: int = 0
    bound: int = 0
    held: dict[int, tuple[StorageWeakRef, int, str]] = field(default_factory=dict)
    then: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        super().__init__()

    def now(self) -> int:
        """Bytes of what lives."""
        self.held = {key: one for key, one in self.held.items() if not one[0].expired()}
        self.bound = sum(size for _, size, _ in self.held.values())
        return self.bound

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for one in tree_leaves(found):
            if isinstance(one, Tensor):
                self._note(one, func)
        # Storages that have gone are only counted out where they could make a peak.
        if self.bound > self.most and self.now() > self.most:
            self.most, self.then = self.bound, Counter()
            for _, size, name in self.held.values():
                self.then[name] += size
        return found

    def _note(self, x: Tensor, func: Any) -> None:
        storage = x.untyped_storage()
        known = self.held.get(storage._cdata)
        if known is None or known[0].expired():
            self.bound += storage.nbytes() - (0 if known is None else known[1])
            about = f"{func} {list(x.shape)} {str(x.dtype)[6:]}"
            self.held[storage._cdata] = (StorageWeakRef(storage), storage.nbytes(), about)


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """Ops take the path that they take there, of which `rms_norm` has another one for tensors that are not plain."""
    names = ("op", "rms_norm", "dense_attention", "routed_delta_rule", "_ttt_torch")
    op, norm, dense, routed, fast = (import_module(f"heddle.kernels.{name}") for name in names)
    with (
        patch.object(op, "_triton_runs", lambda *_: True),
        patch.object(norm, "are_plain", lambda _: True),
        patch.object(fast, "are_plain", lambda _: True),
        patch.object(dense, "_attend", attend),
        patch.object(routed, "_room", lambda *_: 64),
        patch.object(Tensor, "is_cuda", True),
        patch.object(peak_memory, "HALF", torch.bfloat16),
    ):
        yield


def _faked(module: nn.Module) -> nn.Module:
    """The module with fake tensors in place of its own."""
    for one in module.modules():
        for name, x in one._parameters.items():
            if x is not None:
                one._parameters[name] = nn.Parameter(torch.empty_like(x, device="cpu"), x.requires_grad)
        for name, x in one._buffers.items():
            one._buffers[name] = None if x is None else torch.empty_like(x, device="cpu")
    return module


def count(kind: str, tokens: int) -> tuple[int, int, int, Counter[str]]:
    """Bytes of the peak, of what was there before, and of inputs, outputs and gradients; and what lived at the peak.

    Args:
        kind: a part of `peak_memory.py`, without "layer, ".
        tokens: of the one row.
    """
    sizes, part = replace(peak_memory.WHOLE, tokens=tokens), f"layer, {kind}"
    made = peak_memory.mixer_of(sizes.width, sizes.layers()[part]).to(torch.bfloat16)
    live = Live()
    with as_on_cuda(), FakeTensorMode(allow_non_fake_inputs=True), live:
        with patch.object(peak_memory, "mixer_of", lambda *_: _faked(made)):
            call, given, _ = peak_memory.layer_call(sizes, part)
        before = live.now()
        live.most = 0
        tensors = given + call()
    return live.most, before, tensors, live.then


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kinds", nargs="+", choices=[part[7:] for part in peak_memory.WHOLE.layers()])
    parser.add_argument("--tokens", type=int, default=peak_memory.WHOLE.tokens)
    parser.add_argument("--largest", type=int, default=12, help="tensors to tell of")
    wanted, is_kept = parser.parse_args(), True
    for kind in wanted.kinds:
        most, before, tensors, then = count(kind, wanted.tokens)
        times = (most + WORKSPACES) / tensors
        is_kept = is_kept and times <= peak_memory.GOAL
        above, there = (one / MIB for one in (most - before, before + WORKSPACES))
        print(f"{kind}: {tensors / MIB:.0f} MiB of tensors, {above:.0f} above {there:.0f}, {times:.2f} times")
        for name, size in then.most_common(wanted.largest):
            print(f"  {size / MIB:8.1f} {name}")
    return 0 if is_kept else 1


if __name__ == "__main__":
    raise SystemExit(main())
