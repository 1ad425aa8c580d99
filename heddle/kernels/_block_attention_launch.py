"""Launches the kernels of block_attention."""

from __future__ import annotations

import functools
from dataclasses import fields, replace
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.functional import pad
from triton.tools.tensor_descriptor import TensorDescriptor

from heddle.kernels._block_attention_bwd import (
    _block_attention_bwd_key_kernel,
    _block_attention_bwd_query_kernel,
)
from heddle.kernels._block_attention_fwd import (
    _block_attention_fwd_kernel,
    _block_attention_list_kernel,
    _block_attention_merge_kernel,
)
from heddle.kernels._block_attention_lists import MOST_QUERIES, Choice, Lists, Tiling, gate_marks, marks
from heddle.kernels.common.layout import aligned, block, room, strides
from heddle.kernels.common.tables import table_on
from heddle.kernels.common.tuning import tuned
from heddle.kernels.configs.block_attention import INTERPRETER, Family, Plan, family
from heddle.kernels.configs.launch import Launch

# Marks that a program looks at together.
LIST_WIDTH = 1024
# Into how many parts a list is split at most.
MOST_SPLITS = 32


@functools.cache
def _device(device: torch.device) -> tuple[Family, int]:
    """Configurations and multiprocessors."""
    return table_on(device, "block_attention", INTERPRETER, family)


def plan(device: torch.device, element: int, size: int) -> Plan:
    """The launches for tensors on `device`, elements of so many bytes and the larger head size; overrides come first."""
    table = _device(device)[0].plan(element, block(size))
    names = (one.name for one in fields(table) if one.name != "gate_descriptors")
    return replace(table, **{name: tuned(name, getattr(table, name)) for name in names})


def queries_of(launch: Launch, group: int, length: int, most: int = MOST_QUERIES) -> int:
    """How many queries a tile has: as many as its rows hold, but no more than `most` or than there are."""
    held = max(1, launch.chunk // triton.next_power_of_2(group))
    return int(min(held, most, triton.next_power_of_2(length)))


def lists(marked: Tensor, longest: int | None, most: int | None = None, parts: int = 1) -> Lists:
    """A list for each row of marks, of at most `longest` entries, and at most so many in all, if that is known.

    With `parts`, which hold so many marks each, it is as many lists, one behind the other.

    Shapes:  marked: [..., count] uint8
    """
    marked = marked.contiguous().view(-1, marked.shape[-1])
    rows, count = marked.shape
    share = -(-count // parts)
    divided = pad(marked, (0, parts * share - count)) if parts > 1 else marked
    offsets = pad(divided.view(-1, share).ne(0).sum(-1).cumsum(0), (1, 0)).to(torch.int32)
    length = rows * (count if longest is None else min(count, longest)) if most is None else most
    entries = torch.empty(length, dtype=torch.int32, device=marked.device)
    width = min(LIST_WIDTH, triton.next_power_of_2(count))
    _block_attention_list_kernel[(rows,)](
        marked,
        offsets[::parts].contiguous() if parts > 1 else offsets,
        entries,
        count,
        WIDTH=width,
        num_warps=4,
    )
    return Lists(entries, offsets)


class Call:
    """What all launches over the same inputs are told.

    Shapes:  q: [B, H, T, d];  k: [B, N, S, d];  v: [B, N, S, V];  start: [B];  real: [1 or B, S] bool;  written: [B, S]
    """

    def __init__(
        self,
        sides: tuple[Tensor, Tensor, Tensor],
        choice: Choice,
        start: Tensor,
        limits: tuple[Tensor | None, Tensor | None],
        numbers: tuple[float, int],
    ) -> None:
        self.q, self.k, self.v = (aligned(side) for side in sides)
        self.choice, self.start = choice, start
        self.scale, self.block = numbers
        (self.B, self.H, self.T, self.K), (self.N, self.S) = self.q.shape, self.k.shape[1:3]
        self.V, self.group = self.v.shape[3], self.H // self.N
        self.blocks = -(-self.S // self.block)
        self.seen, self.biased = _seen(*limits), limits[1] is not None
        self.plan = plan(self.q.device, self.q.element_size(), max(self.K, self.V))

    @property
    def gated(self) -> bool:
        """Whether tiles have more queries than a mark has room for: all of them read the same, but for their own blocks."""
        return self.choice.gates is not None and self.T > MOST_QUERIES

    def tiling(self, launch: Launch) -> Tiling:
        """The tiles of this launch."""
        most = launch.chunk if self.gated else MOST_QUERIES
        queries = queries_of(launch, self.group, self.T, most)
        return Tiling(self.start, self.N, self.T, queries, self.block, self.blocks)

    def constants(self, launch: Launch, tiling: Tiling) -> dict[str, Any]:
        """What kernels that walk over tiles are compiled for."""
        heads = triton.next_power_of_2(self.group)
        return {
            "K": self.K, "V": self.V, "ROWS_K": block(self.K), "ROWS_V": block(self.V),
            "ROWS": block(tiling.queries * heads), "QUERIES": tiling.queries, "HEADS": heads, "GROUP": self.group,
            "BLOCK": self.block, "KEYS": min(launch.columns, block(self.block)), "SEEN": self.seen is not None,
            "PRECISION": "tf32x3" if self.q.device.type == "cuda" else "ieee",
        }  # fmt: skip

    def marks_seen(self) -> tuple[Tensor, int]:
        """Which keys may be seen, a byte each, and the stride of its rows; anything where all are."""
        if self.seen is None:
            return self.start, 0
        return self.seen, self.S if self.seen.shape[0] > 1 else 0

    def forward(self) -> tuple[Tensor, Tensor]:
        """Output, and the log-sum-exp of its logits to base 2."""
        gated = self.gated
        launch = self.plan.gated if gated else self.plan.forward
        tiling = self.tiling(launch)
        out = torch.empty(*self.q.shape[:3], self.V, dtype=self.v.dtype, device=self.q.device)
        lse = torch.empty(self.q.shape[:3], dtype=torch.float32, device=self.q.device)
        count, splits = self.B * self.N * tiling.tiles, self._splits(tiling)
        direct = tiling.queries == 1 and self.choice.listed is not None
        # Later queries of a tile may choose what earlier ones do not; a gate is for all.
        placed = splits > 1 and tiling.queries > 1 and not gated
        if direct and self.choice.listed is not None:
            entries = offsets = self.choice.listed.contiguous()
            width = entries.shape[-1]
        else:
            marked, longest = self._marks(tiling), self.choice.longest(tiling.queries)
            found = lists(marked, longest, parts=splits if placed else 1)
            entries, offsets, width = found.entries, found.offsets, 0
        parts = (splits, count, block(tiling.queries * triton.next_power_of_2(self.group)))
        shapes = ((*parts, self.V), (2, *parts)) if splits > 1 else ((0,), (0,))
        sums, most = (torch.empty(shape, dtype=torch.float32, device=lse.device) for shape in shapes)
        seen, stride = self.marks_seen()
        constants = self.constants(launch, tiling)
        in_tiles = gated and self._in_tiles(constants["KEYS"])
        walked = [_tiles(x, constants["KEYS"]) if in_tiles else x for x in (self.k, self.v)]
        _block_attention_fwd_kernel[(count, splits)](
            self.q, self.k, self.v, *walked, out, lse, sums, most, self.start.to(torch.int32), offsets, entries, seen,
            *strides(self.q, self.k, self.v),
            self.T, self.S, self.N, tiling.tiles, width, splits, stride, self.scale,
            DIRECT=direct, GATED=gated, SPLIT=splits > 1, PLACED=placed, TILES=in_tiles, **constants, **launch.options(),
        )  # fmt: skip
        if splits > 1:
            shared = ("V", "ROWS_V", "ROWS", "QUERIES", "HEADS", "GROUP")
            _block_attention_merge_kernel[(count,)](
                sums, most, out, lse, self.T, tiling.tiles, splits,
                **{name: constants[name] for name in shared}, num_warps=4,
            )  # fmt: skip
        return out, lse

    def backward(
        self, d_out: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Gradients of q, k and v, of biases of all keys' logits but own ones, and those of later blocks' queries alone."""
        queries, keys = self.plan.queries, self.plan.keys
        if self.gated:
            queries, keys = self.plan.gated_queries, self.plan.gated_keys
        tiling = self.tiling(queries)
        marked, longest = self._marks(tiling), self.choice.longest(tiling.queries)
        read = lists(marked, longest)
        # So many entries there are at most in all, however they lie.
        turned = lists(marked.mT, None, most=len(read.entries))
        delta = torch.empty_like(lse)
        make = functools.partial(torch.empty, device=self.q.device)
        dq, dk, dv = (make(x.shape, dtype=x.dtype) for x in (self.q, self.k, self.v))
        has_bias = self.choice.gates is not None or self.biased
        biases = [make(dk.shape[:3] if has_bias else 0, dtype=torch.float32) for _ in range(2)]
        seen, stride = self.marks_seen()
        start, sides = self.start.to(torch.int32), strides(self.q, self.k, self.v)
        constants = self.constants(queries, tiling)
        _block_attention_bwd_query_kernel[(self.B * self.N * tiling.tiles,)](
            self.q, self.k, self.v, out, d_out, lse, delta, dq, start, read.offsets, read.entries, seen, *sides,
            self.T, self.S, self.N, tiling.tiles, stride, self.scale,
            GATED=self.gated, BIAS=has_bias, **constants, **queries.options(),
        )  # fmt: skip
        constants = self.constants(keys, tiling)
        grid = (self.B * self.N * self.blocks, triton.cdiv(self.block, constants["KEYS"]))
        _block_attention_bwd_key_kernel[grid](
            self.q, self.k, self.v, d_out, lse, delta, dk, dv, *biases,
            start, turned.offsets, turned.entries, seen, *sides,
            self.T, self.S, self.N, self.blocks, stride, self.scale,
            GATED=self.gated, BIAS=has_bias, **constants, **keys.options(),
        )  # fmt: skip
        return dq, dk, dv, biases[0], biases[1]

    def _marks(self, tiling: Tiling) -> Tensor:
        """Shapes:  out: [B, N, tiles, C] uint8"""
        if self.gated and self.choice.gates is not None:
            return gate_marks(self.choice.gates, tiling)
        return marks(self.choice, tiling)

    def _in_tiles(self, keys: int) -> bool:
        """Whether blocks with a gate are loaded by descriptors; the last part of a block must be one of `keys` as well."""
        wanted = tuned("gate_descriptors", self.plan.gate_descriptors)
        return self.block % keys == 0 and bool(wanted)

    def _splits(self, tiling: Tiling) -> int:
        """Into how many parts lists are split: into one where tiles alone fill the device."""
        table, processors = _device(self.q.device)
        longest = self.choice.longest(tiling.queries)
        most = self.blocks if longest is None else min(self.blocks, longest)
        wanted = table.places * processors // (self.B * self.N * tiling.tiles)
        return tuned("splits", max(1, min(wanted, most, MOST_SPLITS)))


def _tiles(x: Tensor, rows: int) -> TensorDescriptor:
    """Keys or values, so many of a head at a time."""
    return TensorDescriptor.from_tensor(x, [1, 1, rows, block(x.shape[3])])


def _seen(real: Tensor | None, written: Tensor | None) -> Tensor | None:
    """Which keys may be seen, a byte each; None if all may.  Shapes:  out: [1 or B, S] uint8"""
    limits = [limit > 0.5 for limit in (real, written) if limit is not None]
    if not limits:
        return None
    return functools.reduce(torch.logical_and, limits).contiguous().view(torch.uint8)


def _with_room(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Head sizes as the kernels take them, by zeros, which change nothing."""
    q, k, v = (_wider(x, room(x.shape[3], x.device)) for x in (q, k, v))
    return q, k, v


def _wider(x: Tensor, size: int) -> Tensor:
    """The same with a last axis of `size`, zeros behind what is there."""
    return pad(x, (0, size - x.shape[-1])) if size > x.shape[-1] else x


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    listed: Tensor | None,
    chosen: Tensor | None,
    gates: Tensor | None,
    real: Tensor | None,
    written: Tensor | None,
    scale: float,
    block: int,
) -> tuple[Tensor, Tensor]:
    """Output, and what the backward pass wants; arguments as those of the registered op."""
    choice = Choice(listed, chosen, gates)
    out, lse = Call(_with_room(q, k, v), choice, start, (real, written), (scale, block)).forward()
    return out[..., : v.shape[3]].contiguous(), lse


def launch_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    listed: Tensor | None,
    chosen: Tensor | None,
    gates: Tensor | None,
    real: Tensor | None,
    written: Tensor | None,
    scale: float,
    block: int,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, gates and written, empty for those not given; arguments as those of the registered op."""
    d, V = q.shape[3], v.shape[3]
    call = Call(_with_room(q, k, v), Choice(listed, chosen, gates), start, (real, written), (scale, block))
    d_out, out = (_wider(x, call.V).contiguous() for x in (d_out.to(v.dtype), out))
    dq, dk, dv, d_bias, d_gates = call.backward(d_out, out, lse)
    d_written = q.new_empty(0) if written is None else d_bias.sum(1).to(written.dtype)
    if gates is None:
        d_gates = q.new_empty(0)
    else:
        spare = gates.shape[2] * block - k.shape[2]
        d_gates = pad(d_gates, (0, spare)).view(*gates.shape, block).sum(-1).to(gates.dtype)
    dq, dk, dv = dq[..., :d].contiguous(), dk[..., :d].contiguous(), dv[..., :V].contiguous()
    return dq, dk, dv, d_gates, d_written
