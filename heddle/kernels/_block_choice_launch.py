"""Launches the kernels of block_choice."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
import triton
from torch import Tensor

from heddle.kernels._block_choice_kernels import (
    _block_choice_list_kernel,
    _block_choice_logit_kernel,
    _block_choice_mark_kernel,
    _block_choice_mean_kernel,
    _block_choice_pool_kernel,
    _block_choice_share_kernel,
    _block_choice_sum_kernel,
)
from heddle.kernels.common.layout import aligned, block, room, strides, wider
from heddle.kernels.common.tables import table_on
from heddle.kernels.common.tuning import tuned
from heddle.kernels.configs.block_choice import INTERPRETER, Family, Plan, family


@functools.cache
def _device(device: torch.device) -> Family:
    return table_on(device, "block_choice", INTERPRETER, family)[0]


def plan(device: torch.device, element: int, size: int) -> Plan:
    """The launches for tensors on `device`, elements of so many bytes and this head size; overrides come first."""
    table = _device(device).plan(element, block(size))
    names = ("mean", "logit", "pool", "share")
    return replace(table, **{name: tuned(name, getattr(table, name)) for name in names})


def choosing_warps(width: int) -> int:
    """Warps that look for the best of so many blocks."""
    return min(16, max(1, width // 512))


def launch(
    q: Tensor,
    means: Tensor,
    start: Tensor,
    held: Tensor | None,
    scale: float,
    kernels: bool,
    block: int,
    blocks: int,
    count: int,
    sink: int,
    recent: int,
    dense_length: int,
) -> Tensor:
    """The lists; arguments as those of the registered op."""
    (B, _, T, _), N = q.shape, means.shape[1]
    size = room(q.shape[3], q.device)
    q, means, start = (*(aligned(wider(x, size)) for x in (q, means)), start.contiguous())
    worth = torch.empty(B, N, T, blocks, dtype=torch.float32, device=q.device)
    forced = (blocks, sink, recent)
    if kernels:
        _pooled(q, means, worth, (start, held), forced, scale=scale, block_keys=block)
    else:
        _by_means(q, means, worth, start, forced, block_keys=block)
    length = min(blocks, max(count, -(-dense_length // block)))
    listed = torch.empty(B, N, T, length, dtype=torch.int32, device=q.device)
    width = triton.next_power_of_2(blocks)
    _block_choice_list_kernel[(B * N * T,)](
        worth, listed, start, T, N, blocks, count, dense_length, length,
        BLOCK=block, WIDTH=width, num_warps=tuned("choosing_warps", choosing_warps(width)),
    )  # fmt: skip
    return listed


def launch_marks(
    worth: Tensor,
    start: Tensor,
    pooled: bool,
    block: int,
    blocks: int,
    count: int,
    sink: int,
    recent: int,
    dense_length: int,
) -> Tensor:
    """The marks; arguments as those of the registered op."""
    B, N, T, parts = worth.shape
    marks = torch.empty(B, N, T, blocks, dtype=torch.uint8, device=worth.device)
    width = triton.next_power_of_2(blocks)
    _block_choice_mark_kernel[(B * N * T,)](
        worth.contiguous(), marks, start, T, N, parts, blocks, sink, recent, count, dense_length,
        BLOCK=block, WIDTH=width, POOL=pooled, num_warps=tuned("choosing_warps", choosing_warps(width)),
    )  # fmt: skip
    return marks.view(torch.bool)


def launch_shares(
    q: Tensor, means: Tensor, start: Tensor, held: Tensor | None, scale: float, block_keys: int
) -> Tensor:
    """What kernels are worth to many queries; arguments as those of the registered op."""
    (B, H, T, _), (N, parts) = q.shape, means.shape[1:3]
    q, means = (aligned(wider(x, room(x.shape[3], x.device))) for x in (q, means))
    K, heads = q.shape[3], triton.next_power_of_2(H // N)
    table = plan(q.device, q.element_size(), K).share
    rows, columns = max(16, table.chunk, heads), min(table.columns, block(max(parts, 1)))
    tiles = triton.cdiv(T, rows // heads)
    lse = torch.empty(B, N, T, heads, dtype=torch.float32, device=q.device)
    share = torch.empty(B, N, T, parts, dtype=torch.float32, device=q.device)
    if parts == 0:
        return share
    marks = start if held is None else held.contiguous().view(torch.uint8)
    numbers = (0 if held is None or held.shape[0] == 1 else parts, scale)
    constants = {
        "K": K, "ROWS_K": block(K), "ROWS": rows, "HEADS": heads, "GROUP": H // N, "BLOCK": block_keys, "COLUMNS": columns,
        "HELD": held is not None, "PRECISION": "tf32x3" if q.device.type == "cuda" else "ieee",
    }  # fmt: skip
    sides = strides(q, means)
    _block_choice_sum_kernel[(B * N, tiles)](
        q, means, lse, start, marks, *sides, T, N, parts, tiles, *numbers, **constants, **table.options()
    )
    _block_choice_share_kernel[(B * N, tiles, triton.cdiv(parts, columns))](
        q, means, lse, share, start, marks, *sides, T, N, parts, *numbers, **constants, **table.options()
    )
    return share


def _by_means(
    q: Tensor, means: Tensor, worth: Tensor, start: Tensor, forced: tuple[int, int, int], *, block_keys: int
) -> None:
    """Writes `worth`, by means of blocks."""
    (B, H, T, K), N, (blocks, sink, recent) = q.shape, means.shape[1], forced
    table = plan(q.device, q.element_size(), K).mean
    columns = min(table.columns, block(blocks))
    _block_choice_mean_kernel[(B * N * T, triton.cdiv(blocks, columns))](
        q, means, worth, start, *strides(q, means), T, N, means.shape[2], blocks, sink, recent,
        K=K, ROWS_K=block(K), HEADS=triton.next_power_of_2(H // N), GROUP=H // N, BLOCK=block_keys,
        COLUMNS=columns, **table.options(),
    )  # fmt: skip


def _pooled(
    q: Tensor,
    means: Tensor,
    worth: Tensor,
    seen: tuple[Tensor, Tensor | None],
    forced: tuple[int, int, int],
    *,
    scale: float,
    block_keys: int,
) -> None:
    """Writes `worth`, by kernels."""
    (B, H, T, K), (N, parts), (blocks, sink, recent), (start, held) = q.shape, means.shape[1:3], forced, seen
    table, group, lines, rows = plan(q.device, q.element_size(), K), H // N, block(H // N), B * N * T
    columns = min(table.logit.columns, block(parts))
    tiles = triton.cdiv(parts, columns)
    logits = torch.empty(rows, group, parts, dtype=torch.float32, device=q.device)
    most, total = torch.empty(2, rows, lines, tiles, dtype=torch.float32, device=q.device)
    marks = start if held is None else held.contiguous().view(torch.uint8)
    if tiles > 0:
        _block_choice_logit_kernel[(rows, tiles)](
            q, means, logits, most, total, start, marks, *strides(q, means),
            T, N, parts, tiles, 0 if held is None or held.shape[0] == 1 else parts, scale,
            K=K, ROWS_K=block(K), ROWS=lines, GROUP=group, BLOCK=block_keys, COLUMNS=columns,
            HELD=held is not None, PRECISION="tf32x3" if q.device.type == "cuda" else "ieee",
            **table.logit.options(),
        )  # fmt: skip
    columns = min(table.pool.columns, block(blocks))
    _block_choice_pool_kernel[(rows, triton.cdiv(blocks, columns))](
        logits, most, total, worth, start, T, N, parts, blocks, tiles, sink, recent,
        ROWS=lines, GROUP=group, BLOCK=block_keys, COLUMNS=columns,
        TILES=triton.next_power_of_2(max(tiles, 1)), **table.pool.options(),
    )  # fmt: skip
