"""Launches the kernels of landmark_attention."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.functional import pad

from heddle.kernels._landmark_attention_bwd import (
    _landmark_attention_bwd_key_kernel,
    _landmark_attention_bwd_query_kernel,
)
from heddle.kernels._landmark_attention_fwd import _landmark_attention_fwd_kernel
from heddle.kernels._landmark_attention_step import (
    _landmark_attention_list_kernel,
    _landmark_attention_merge_kernel,
    _landmark_attention_read_kernel,
    _landmark_attention_score_kernel,
    _landmark_attention_select_kernel,
    _landmark_attention_step_kernel,
)
from heddle.kernels.common.layout import aligned, block, room, strides
from heddle.kernels.common.tuning import tuned
from heddle.kernels.configs.landmark_attention import INTERPRETER, STEP_QUERIES, Family, Plan, Spread, family
from heddle.kernels.configs.launch import Launch

# Into how many parts the blocks of a step's query are split at most.
MOST_SPLITS = 64
# The least rows of a product, of which a step's query is one.
ROWS = 16
# Bytes of blocks that a fused step may hold at once: as many were held to the reference.
MOST_AHEAD = 1 << 17
# Logits of landmarks that stand in memory at once where many queries choose.
MOST_LOGITS = 1 << 24


@functools.cache
def _device(device: torch.device) -> tuple[Family, int]:
    """Configurations and multiprocessors."""
    if device.type != "cuda":
        return INTERPRETER, 1
    seen = torch.cuda.get_device_properties(device)
    return family((seen.major, seen.minor)), seen.multi_processor_count


def plan(device: torch.device, element: int, size: int) -> Plan:
    """The launches for tensors on `device`, elements of so many bytes and the larger head size; overrides come first."""
    table = _device(device)[0].plan(element, block(size))
    names = ("forward", "queries", "keys", "score", "step", "read", "fused", "listed", "ahead")
    return replace(table, **{name: tuned(name, getattr(table, name)) for name in names})


def choosing_warps(width: int) -> int:
    """Warps that look for the best of so many logits."""
    return min(16, max(1, width // 512))


class Call:
    """What all launches over the same inputs are told.

    Shapes:  q: [B, H, T, d];  k: [B, N, S, d];  v: [B, N, S, V];  landmarks: [B, N, C, d];  start: [B];
             real: [1 or B, S] bool;  written: [B, S]
    """

    def __init__(
        self,
        sides: tuple[Tensor, Tensor, Tensor, Tensor],
        start: Tensor,
        limits: tuple[Tensor | None, Tensor | None],
        numbers: tuple[float, int, int | None],
    ) -> None:
        self.q, self.k, self.v, self.marks = (aligned(side) for side in sides)
        self.scale, self.block, self.top = numbers
        (self.B, self.H, self.T, self.K), (self.N, self.S) = self.q.shape, self.k.shape[1:3]
        self.V, self.C, self.group = self.v.shape[3], self.marks.shape[2], self.H // self.N
        # Before the last block there are no more than these.
        self.top = None if self.top is None or self.top >= self.C - 1 else self.top
        self.seen, self.biased = _seen(*limits), limits[1] is not None
        self.plan = plan(self.q.device, self.q.element_size(), max(self.K, self.V))
        self.first = start.contiguous()

    @functools.cached_property
    def start(self) -> Tensor:
        """The places as most kernels take them; those of a fused step take them as they are, which is a launch less."""
        return self.first.to(torch.int32)

    def constants(self, launch: Launch) -> dict[str, Any]:
        """What kernels that walk over blocks are compiled for."""
        return {
            "K": self.K, "V": self.V, "ROWS_K": block(self.K), "ROWS_V": block(self.V),
            "ROWS": min(launch.chunk, block(self.T)), "GROUP": self.group, "BLOCK": self.block,
            "KEYS": block(self.block), "SELECT": self.top is not None, "SEEN": self.seen is not None,
            "PRECISION": self.precision,
        }  # fmt: skip

    @property
    def precision(self) -> str:
        return "tf32x3" if self.q.device.type == "cuda" else "ieee"

    def keys_seen(self) -> tuple[Tensor, int]:
        """Which keys may be seen, a byte each, and the stride of its rows; anything where all are."""
        if self.seen is None:
            return self.q, 0
        return self.seen, self.S if self.seen.shape[0] > 1 else 0

    def blocks_seen(self) -> tuple[Tensor, int]:
        """The same of blocks: those with a key that may be seen."""
        if self.seen is None:
            return self.q, 0
        tail = self.C * self.block - self.S
        held = pad(self.seen, (0, tail)).view(-1, self.C, self.block).amax(-1).contiguous()
        return held, self.C if held.shape[0] > 1 else 0

    def logits(self, first: int, last: int, arrived: Tensor | None = None) -> Tensor:
        """Logits of all landmarks to base 2, -inf but for earlier blocks, for the queries from `first` to before `last`.

        Shapes:  out: [B, H, last - first, C] float32;  arrived, if given: as large as B H (last - first), set to 0
        """
        q, length, heads = self.q[:, :, first:last], last - first, triton.next_power_of_2(self.group)
        launch = self.plan.score
        queries = max(1, min(launch.chunk // heads, triton.next_power_of_2(length)))
        tiles = triton.cdiv(length, queries)
        columns = min(launch.columns, block(self.C))
        begin = self.first if arrived is not None else self.start + first if first else self.start
        found = torch.empty(self.B, self.H, length, self.C, dtype=torch.float32, device=q.device)
        held, stride = self.blocks_seen()
        _landmark_attention_score_kernel[(self.B * self.N * tiles, triton.cdiv(self.C, columns))](
            q, self.marks, found, begin, held, begin if arrived is None else arrived, *strides(q, self.marks),
            length, self.C, self.N, tiles, stride, self.scale,
            K=self.K, ROWS_K=block(self.K), ROWS=block(queries * heads), QUERIES=queries, HEADS=heads,
            GROUP=self.group, BLOCK=self.block, COLUMNS=columns, SEEN=self.seen is not None,
            PRECISION=self.precision, FUSED=arrived is not None, AHEAD=arrived is not None and self.is_ahead,
            **launch.options(),
        )  # fmt: skip
        return found

    def bits(self) -> Tensor:
        """A bit for each landmark that counts; anything where all do.  Shapes:  out: [B, H, T, ceil(C / 32)] int32"""
        if self.top is None:
            return self.start
        words, width = triton.cdiv(self.C, 32), max(32, triton.next_power_of_2(self.C))
        together = max(1, MOST_LOGITS // (self.B * self.H * self.C))
        parts = []
        for first in range(0, self.T, together):
            logits = self.logits(first, min(first + together, self.T))
            found = torch.empty(*logits.shape[:3], words, dtype=torch.int32, device=logits.device)
            _landmark_attention_select_kernel[(logits.numel() // self.C,)](
                logits, found, self.C, words, self.top, WIDTH=width, num_warps=choosing_warps(width)
            )
            parts.append(found)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Output, and the log-sum-exp of its gates to base 2."""
        out = torch.empty(*self.q.shape[:3], self.V, dtype=self.v.dtype, device=self.q.device)
        lse = torch.empty(self.q.shape[:3], dtype=torch.float32, device=self.q.device)
        if self.T <= STEP_QUERIES:
            (self._fused_step if self.is_fused else self._step)(out, lse)
            return out, lse
        constants, (seen, stride) = self.constants(self.plan.forward), self.keys_seen()
        tiles = triton.cdiv(self.T, constants["ROWS"])
        _landmark_attention_fwd_kernel[(self.B * self.H, tiles)](
            self.q, self.k, self.v, self.marks, out, lse, self.start, self.bits(), seen,
            *strides(self.q, self.k, self.v, self.marks),
            self.T, self.S, self.C, self.N, tiles, triton.cdiv(self.C, 32), stride, self.scale,
            **constants, **self.plan.forward.options(),
        )  # fmt: skip
        return out, lse

    @property
    def is_fused(self) -> bool:
        """Whether a step loads blocks ahead, which must fit into shared memory together."""
        sizes = (block(self.K) + block(self.V)) * block(self.block) * self.q.element_size()
        return self.plan.fused and sizes * self.plan.read.stages <= MOST_AHEAD

    def _step(self, out: Tensor, lse: Tensor) -> None:
        rows, launch = self.B * self.H * self.T, self.plan.step
        splits = self._splits(_device(out.device)[0].spread)
        (seen, stride), constants = self.keys_seen(), self.constants(launch)
        shapes = ((splits, rows, self.V), (2, splits, rows)) if splits > 1 else ((0,), (0,))
        sums, most = (torch.empty(shape, dtype=torch.float32, device=out.device) for shape in shapes)
        del constants["ROWS"], constants["PRECISION"]
        _landmark_attention_step_kernel[(rows, splits)](
            self.q, self.k, self.v, out, lse, sums, most, self.logits(0, self.T), self.start, seen,
            *strides(self.q, self.k, self.v),
            self.T, self.S, self.C, self.N, splits, 0 if self.top is None else self.top, stride, self.scale,
            **constants, WIDTH=1 if self.top is None else triton.next_power_of_2(self.C), SPLIT=splits > 1,
            **launch.options(),
        )  # fmt: skip
        if splits > 1:
            _landmark_attention_merge_kernel[(rows,)](
                sums, most, out, lse, splits,
                V=self.V, ROWS_V=block(self.V), SPLITS=triton.next_power_of_2(splits), num_warps=4,
            )  # fmt: skip

    def _fused_step(self, out: Tensor, lse: Tensor) -> None:
        rows, launch = self.B * self.H * self.T, self.plan.read
        splits = self._splits(_device(out.device)[0].fused_spread)
        (seen, stride), constants = self.keys_seen(), self.constants(launch)
        sums, most = (
            torch.empty(shape, dtype=torch.float32, device=out.device)
            for shape in ((splits, rows, self.V), (2, splits, rows))
        )
        arrived = torch.empty(rows, dtype=torch.int32, device=out.device)
        logits = self.logits(0, self.T, arrived)
        is_listed = self.top is not None and self.plan.listed
        _landmark_attention_read_kernel[(rows, splits)](
            self.q, self.k, self.v, out, lse, sums, most, arrived,
            logits, self._listed(logits) if is_listed else arrived, self.first, seen,
            *strides(self.q, self.k, self.v),
            self.T, self.S, self.C, self.N, splits, 0 if self.top is None else self.top, stride, self.scale,
            **{**constants, "ROWS": ROWS}, LISTED=is_listed,
            WIDTH=1 if self.top is None or is_listed else triton.next_power_of_2(self.C),
            SPLITS=triton.next_power_of_2(splits), AHEAD=self.is_ahead, **launch.options(), **self._early(),
        )  # fmt: skip

    def _listed(self, logits: Tensor) -> Tensor:
        """The blocks that each query of a step reads, -1 behind the last.  Shapes:  out: [B H T, top] int32"""
        assert self.top is not None
        width = max(triton.next_power_of_2(self.top), triton.next_power_of_2(self.C))
        found = torch.empty(logits.numel() // self.C, self.top, dtype=torch.int32, device=logits.device)
        _landmark_attention_list_kernel[(len(found),)](
            logits, found, self.C, self.top, WIDTH=width, AHEAD=self.is_ahead,
            num_warps=tuned("listing_warps", min(16, max(1, width // 128))), **self._early(),
        )  # fmt: skip
        return found

    def _early(self) -> dict[str, bool]:
        """What a launch is told that may begin before the one before has ended."""
        return {"launch_pdl": True} if self.is_ahead else {}

    @property
    def is_ahead(self) -> bool:
        """Whether the second launch of a step begins before the first has ended, which is Hopper's."""
        return self.plan.ahead and self.q.device.type == "cuda"

    def _splits(self, spread: Spread) -> int:
        """Into how many parts the blocks of a step's query are split: enough to fill the device, and none with too many."""
        most = self.C if self.top is None else self.top + 1
        wanted = max(1, spread.places * _device(self.q.device)[1] // (self.B * self.H * self.T))
        share = min(spread.share, -(-most // wanted))
        return min(tuned("splits", -(-most // share)), MOST_SPLITS)

    def backward(
        self, d_out: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Gradients of q, k, v and landmarks, and of a bias of the logits of each key but own ones."""
        delta, bits, words = torch.empty_like(lse), self.bits(), triton.cdiv(self.C, 32)
        dq, dk, dv, d_marks = (
            torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (self.q, self.k, self.v, self.marks)
        )
        d_bias = torch.empty(dk.shape[:3] if self.biased else 0, dtype=torch.float32, device=lse.device)
        (seen, stride), sides = self.keys_seen(), strides(self.q, self.k, self.v, self.marks)
        constants = self.constants(self.plan.queries)
        tiles = triton.cdiv(self.T, constants["ROWS"])
        of_keys = self.constants(self.plan.keys)
        if self.q.device.type == "cuda":
            constants["PRECISION"] = of_keys["PRECISION"] = self.plan.products
        _landmark_attention_bwd_query_kernel[(self.B * self.H, tiles)](
            self.q, self.k, self.v, self.marks, out, d_out, lse, delta, dq, self.start, bits, seen, *sides,
            self.T, self.S, self.C, self.N, tiles, words, stride, self.scale,
            **constants, **self.plan.queries.options(),
        )  # fmt: skip
        _landmark_attention_bwd_key_kernel[(self.C, self.B * self.N)](
            self.q, self.k, self.v, self.marks, d_out, lse, delta, dk, dv, d_marks, d_bias,
            self.start, bits, seen, *sides,
            self.T, self.S, self.C, self.N, words, stride, self.scale,
            BIAS=self.biased, **of_keys, **self.plan.keys.options(),
        )  # fmt: skip
        return dq, dk, dv, d_marks, d_bias


def _seen(real: Tensor | None, written: Tensor | None) -> Tensor | None:
    """Which keys may be seen, a byte each; None if all may.  Shapes:  out: [1 or B, S] uint8"""
    limits = [limit > 0.5 for limit in (real, written) if limit is not None]
    if not limits:
        return None
    return functools.reduce(torch.logical_and, limits).contiguous().view(torch.uint8)


def _wider(x: Tensor, size: int) -> Tensor:
    """The same with a last axis of `size`, zeros behind what is there."""
    return pad(x, (0, size - x.shape[-1])) if size > x.shape[-1] else x


def _with_room(*sides: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Head sizes as the kernels take them, by zeros, which change nothing."""
    q, k, v, marks = (_wider(x, room(x.shape[3], x.device)) for x in sides)
    return q, k, v, marks


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    landmarks: Tensor,
    start: Tensor,
    real: Tensor | None,
    written: Tensor | None,
    scale: float,
    block: int,
    top: int | None,
) -> tuple[Tensor, Tensor]:
    """Output, and what the backward pass wants; arguments as those of the registered op."""
    out, lse = Call(_with_room(q, k, v, landmarks), start, (real, written), (scale, block, top)).forward()
    return out[..., : v.shape[3]].contiguous(), lse


def launch_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    landmarks: Tensor,
    start: Tensor,
    real: Tensor | None,
    written: Tensor | None,
    scale: float,
    block: int,
    top: int | None,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, landmarks and written (empty if not given); arguments as those of the registered op."""
    d = q.shape[3]
    call = Call(_with_room(q, k, v, landmarks), start, (real, written), (scale, block, top))
    d_out, out = (_wider(x, call.V).contiguous() for x in (d_out.to(v.dtype), out))
    dq, dk, dv, d_marks, d_bias = call.backward(d_out, out, lse)
    d_written = q.new_empty(0) if written is None else d_bias.sum(1).to(written.dtype)
    dq, dk, d_marks = (x[..., :d].contiguous() for x in (dq, dk, d_marks))
    return dq, dk, dv[..., : v.shape[3]].contiguous(), d_marks, d_written
