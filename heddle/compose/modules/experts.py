"""Experts as stacked matrices, and what a router of tokens to experts needs."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from heddle.compose.init import Initialised, fill, normal
from heddle.compose.modules.precision import Float32Kept, wide
from heddle.kernels.common.autocast import autocasts, without_autocast

# How far a step moves a correction bias (arXiv 2412.19437, section 4.2).
BIAS_RATE = 1e-3
# A grouped product on CUDA asks for bfloat16 and for rows of whole 16 bytes.
GROUPED_MULTIPLE = 8

Road = Literal["grouped", "gathered", "sorted", "dense"]


class Experts(Initialised):
    """y_t = Σ_j w_tj expert_{c_tj}(x_t),   expert_e(x) = W_down,e (silu(W_gate,e x) * W_up,e x)

    Four roads give the same numbers up to rounding, and none drops a token:

        grouped    choices sorted by expert, one grouped product: bfloat16 on CUDA, waits for nothing
        gathered   the matrices of each choice, where there are at most as many choices as experts: decoding
        sorted     choices sorted by expert, a product for each; waits for the device to learn how many each has
        dense      every expert on every token, E / k times the work: where a graph is traced or captured that can neither
                   wait nor group

    Shapes:  x, y: [N, D];  c: [N, k] int64;  w: [N, k];  gate_up_proj: [E, 2 W, D], the gates first;  down_proj: [E, D, W]
    """

    def __init__(self, count: int, hidden_size: int, width: int) -> None:
        super().__init__()
        self.count, self.width = count, width
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * width, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(count, hidden_size, width))

    def initialise(self, std: float) -> None:
        normal(self.gate_up_proj, std)
        normal(self.down_proj, std)

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        road = self.road(x, chosen.numel())
        if road == "dense":
            return self._dense(x, chosen, weights)
        y = self._gathered(x, chosen) if road == "gathered" else self._by_expert(x, chosen, road)
        return (y * weights[..., None].to(y.dtype)).sum(dim=1)

    def road(self, x: Tensor, choices: int) -> Road:
        """The road of this call."""
        sizes = (x.shape[-1], self.width)
        whole = all(size % GROUPED_MULTIPLE == 0 for size in sizes)
        if x.is_cuda and whole and compute_dtype(x) == torch.bfloat16:
            return "grouped"
        if choices <= self.count:
            return "gathered"
        if torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            return "dense"
        return "sorted"

    def _gathered(self, x: Tensor, chosen: Tensor) -> Tensor:
        """The output of each choice.  Shapes:  out: [N, k, D]"""
        rows = x[:, None].expand(*chosen.shape, -1).reshape(-1, x.shape[-1], 1)
        ids = chosen.reshape(-1)
        inner = activated(torch.bmm(self.gate_up_proj[ids], rows).squeeze(-1))
        return torch.bmm(self.down_proj[ids], inner[..., None]).view(*chosen.shape, -1)

    def _by_expert(self, x: Tensor, chosen: Tensor, road: Road) -> Tensor:
        """The same, with the choices of one expert side by side."""
        ids = chosen.reshape(-1)
        order = ids.argsort(stable=True)
        rows = x[order // chosen.shape[1]]
        load = load_of(chosen, self.count)
        y = self._grouped(rows, load) if road == "grouped" else self._one_by_one(rows, load)
        return y[order.argsort()].view(*chosen.shape, -1)

    def _grouped(self, rows: Tensor, load: Tensor) -> Tensor:
        # Autocast leaves grouped products alone.
        dtype = compute_dtype(rows)
        ends = load.cumsum(0).to(torch.int32)
        gate_up = self.gate_up_proj.to(dtype).transpose(1, 2)
        inner = activated(F.grouped_mm(rows.to(dtype), gate_up, offs=ends))
        return F.grouped_mm(inner, self.down_proj.to(dtype).transpose(1, 2), offs=ends)

    def _one_by_one(self, rows: Tensor, load: Tensor) -> Tensor:
        # The meta device has no counts; any that sum up give the right shapes and costs.
        sizes = even(len(rows), self.count) if load.is_meta else load.tolist()
        # Unbound and not indexed: the gradient of an index is as large as all experts, once for each expert.
        matrices = zip(self.gate_up_proj.unbind(), self.down_proj.unbind(), strict=True)
        parts = zip(torch.split(rows, sizes), matrices, strict=True)
        return torch.cat([F.linear(activated(F.linear(part, up)), down) for part, (up, down) in parts])

    def _dense(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        inner = activated(torch.einsum("nd,ewd->new", x, self.gate_up_proj))
        shares = torch.zeros(len(x), self.count, dtype=weights.dtype, device=x.device)
        inner = inner * shares.scatter(1, chosen, weights)[..., None].to(inner.dtype)
        return torch.einsum("new,edw->nd", inner, self.down_proj)


class Correction(Float32Kept, Initialised):
    """A bias of each expert in the choice, moved towards an even load without a gradient (arXiv 2412.19437).

        b_e <- b_e + rate · sign(mean load - load_e)        after each training step

    Whoever trains the model calls `after_step`, as `heddle.compose.train.fit` does; else b stays as it is. The load is an output
    of the layer, added by the model: a layer that the backward pass runs again is counted once.

    Shapes:  bias: [E], float32;  load: [E] int64, the choices since the last step
    """

    KEPT: ClassVar[tuple[str, ...]] = ("bias",)

    bias: Tensor
    load: Tensor

    def __init__(self, count: int) -> None:
        super().__init__()
        self.register_buffer("bias", torch.empty(count))
        self.register_buffer("load", torch.empty(count, dtype=torch.int64), persistent=False)

    def initialise(self, std: float) -> None:  # noqa: ARG002 - no expert is preferred at first
        for held in (self.bias, self.load):
            fill(held, torch.zeros(held.shape))

    @torch.no_grad()
    def after_step(self) -> None:
        """Moves the bias by the load since the last time."""
        load = self.load.to(self.bias.dtype)
        self.bias += BIAS_RATE * torch.sign(load.mean() - load)
        self.load.zero_()


def activated(gate_up: Tensor) -> Tensor:
    """silu(gate) * up.  Shapes:  gate_up: [..., 2 W];  out: [..., W]"""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def routed_logits(x: Tensor, weight: Tensor) -> Tensor:
    """W x in at least float32, also under autocast.  Shapes:  x: [N, D];  weight: [E, D];  out: [N, E]"""
    with without_autocast(x):
        return F.linear(wide(x), wide(weight))


def load_of(chosen: Tensor, count: int, real: Tensor | None = None) -> Tensor:
    """How often each of `count` experts is chosen, by the tokens that are `real`; waits for no device.

    Shapes:  chosen: [N, k];  real: [N] bool;  out: [count] int64
    """
    ones = torch.ones_like(chosen) if real is None else real.to(chosen.dtype)[:, None].expand_as(chosen)
    none = torch.zeros(count, dtype=chosen.dtype, device=chosen.device)
    return none.scatter_add(0, chosen.reshape(-1), ones.reshape(-1))


def even(total: int, count: int) -> list[int]:
    """`count` sizes of sum `total`, as equal as can be."""
    return [total // count + (index < total % count) for index in range(count)]


def compute_dtype(x: Tensor) -> torch.dtype:
    """What a matrix product of `x` computes in here."""
    return torch.get_autocast_dtype(x.device.type) if autocasts(x) else x.dtype
