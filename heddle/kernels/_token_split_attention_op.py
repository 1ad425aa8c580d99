"""token_split_attention by its kernels: what torch knows of them, and what is made for them in plain torch.

The sums of the state, one product for each chunk, and what queries read from them are torch's, as is the list of the
keys that stay; so are their gradients.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from heddle.kernels._token_split_attention_fwd import FAR
from heddle.kernels._token_split_attention_launch import launch_backward, launch_forward
from heddle.kernels._token_split_attention_torch import Form, Given, Grid
from heddle.kernels.common.layout import narrower, room, wider
from heddle.kernels.op import register

# The place from which on a key is seen that never is.
NEVER: int = FAR.value
_SIDES = "Tensor q, Tensor k, Tensor v, Tensor kept_k, Tensor kept_v, Tensor told, Tensor gate"
_INPUTS = f"{_SIDES}, Tensor since, Tensor start, Tensor? written, Tensor? marks, float scale, int chunk, int keep, int far"
_SAVED = "Tensor out, Tensor lost, Tensor most, Tensor total, Tensor peak"


def _turned(like: Tensor, size: int) -> Tensor:
    """As the kernels leave heads in memory: behind time."""
    return like.new_empty(like.shape[0], like.shape[2], like.shape[1], size).transpose(1, 2)


def _like(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:  # noqa: ARG001
    trains = rest[-1]
    rows = q.shape[:3] if trains else (0,)
    lost = _turned(q, v.shape[-1]) if trains and q.element_size() < 4 else q.new_empty(0)
    most, total = (q.new_empty(rows, dtype=torch.float32) for _ in range(2))
    return _turned(q, v.shape[-1]), lost, most, total, q.new_empty(rows, dtype=torch.int32)


def _gradients_like(d_out: Tensor, q: Tensor, *rest: Any) -> tuple[Tensor, ...]:  # noqa: ARG001
    *keys, told, gate = rest[:6]
    dq, *d_keys, d_gate = (_turned(x, x.shape[-1]) for x in (q, *keys, gate))
    d_written, d_marks = (told.new_empty(0) if x is None else x.new_empty(x.shape) for x in rest[8:10])
    return dq, *d_keys, told.new_empty(told.shape), d_gate, d_written, d_marks


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, scale, chunk, keep, far, _ = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.numbers = (scale, chunk, keep, far)


def _gradients(ctx: Any, d_out: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    *found, d_written, d_marks = _backward_kernels(d_out, *tensors[:11], *ctx.numbers, *tensors[11:])
    marked = [None if x is None else d for x, d in ((tensors[9], d_written), (tensors[10], d_marks))]
    return *found, None, None, *marked, None, None, None, None, None


_backward_kernels = register(
    "token_split_attention_kernels_backward",
    f"(Tensor d_out, {_INPUTS}, {_SAVED}) -> ({', '.join(['Tensor'] * 9)})",
    launch_backward,
    fake=_gradients_like,
)
_kernels = register(
    "token_split_attention_kernels",
    f"({_INPUTS}, bool trains) -> ({', '.join(['Tensor'] * 5)})",
    launch_forward,
    fake=_like,
    setup_context=_keep,
    backward=_gradients,
    results=1,
)


def attend(given: Given, form: Form, state: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes:  state: [B, N, f, V + 1] float32;  out: [B, H, T, V] of the type of v, and as state"""
    trains, size = torch.is_grad_enabled() and _has_gradient(given, state), given.v.shape[-1]
    # A key is read where it stands, as one that stays and by the state: the sum of what they pass back is rounded once.
    given = _with_room(given, state.dtype if trains else given.k.dtype)
    grid, more = Grid.of(given, form), given.v.shape[-1] - size
    if more:
        # Zeros before the sums of φ, as behind values.
        state = F.pad(state[..., :-1], (0, more + 1)) + F.pad(state[..., -1:], (size + more, 0))
    seen = grid.marks(state.new_empty(len(state), 0), given.written)
    # Of more than `keep` the first stay, so that every token counts once.
    stays = grid.of_keys(given.kept.to(torch.float32)[..., None])[..., 0] > 0.5
    stays = stays & (stays.cumsum(-1) <= form.keep)
    folded = (seen * grid.leaving(seen.device).to(seen.dtype)[..., None])[:, None].masked_fill(stays, 0.0)
    told, state = _told(given, folded, state, grid)
    kept_k, kept_v, since, marks = _kept(given, seen, stays, form, grid)
    begin = grid.begin
    if isinstance(begin, int):
        begin = torch.full((len(seen),), begin, device=seen.device)
    written = None if given.written is None else given.written.to(torch.float32)
    is_marked = given.written is not None or given.far_written is not None
    far = 0 if given.far_k is None else given.far_k.shape[2]
    out = _kernels(
        given.q, given.k, given.v, kept_k, kept_v, told, given.gate, since, begin.to(torch.int32), written,
        marks if is_marked else None, form.scale, form.chunk, form.keep, far, trains,
    )[0]  # fmt: skip
    if more:
        state = torch.cat((state[..., :size], state[..., -1:]), dim=-1)
    return narrower(out, size), state


def _with_room(given: Given, dtype: torch.dtype) -> Given:
    """Keys and values in a dtype, the gate in float32, heads as wide as the kernels take them: by zeros, which change nothing."""
    names = ("q", "k", "v", "gate", "far_k", "far_v")
    dtypes = {"q": given.q.dtype, "gate": torch.float32}
    sides = {name: getattr(given, name) for name in names if getattr(given, name) is not None}
    return replace(
        given,
        **{
            name: wider(x.to(dtypes.get(name, dtype)), room(x.shape[-1], x.device))
            for name, x in sides.items()
        },
    )


def _has_gradient(given: Given, state: Tensor) -> bool:
    sides = (given.q, given.k, given.v, given.gate, given.phi_q, given.phi_k, state)
    more = (given.written, given.far_k, given.far_v, given.far_written)
    return any(x is not None and x.requires_grad for x in (*sides, *more))


def _told(given: Given, folded: Tensor, state: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """What each query reads from the state before its chunk, and the state behind them all.

    Shapes:  folded: [B, N, C + 1, l];  state: [B, N, f, V + 1];  out: [B, N, C, G, L, V + 1], and as state
    """
    keys, values = (grid.of_keys(x)[:, :, :-1].to(state.dtype) for x in (given.phi_k, given.v))
    keys = keys * folded[:, :, :-1, :, None]
    sums = keys.mT @ F.pad(values, (0, 1), value=1.0)
    states = torch.cat((state[:, :, None], sums), dim=2).cumsum(2)
    features = grid.slots(given.phi_q.to(state.dtype))
    # [B, N, C, G, L, f]
    features = features.unflatten(1, (state.shape[1], -1)).transpose(2, 3)  # type: ignore[no-untyped-call]
    told = features.flatten(3, 4) @ states[:, :, :-1]
    # A view would keep the states before all chunks in memory, as long as the call that goes on from there.
    return told.unflatten(3, features.shape[3:5]), states[:, :, -1].clone()


def _kept(
    given: Given, seen: Tensor, stays: Tensor, form: Form, grid: Grid
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys and values of what is far and of what stays of all chunks but the last two, the first place that sees them, and marks.

    Shapes:  seen: [B, C + 1, l];  stays: [B, N, C + 1, l];  out: [B, N, M + (C - 1) keep, ...]
    """
    stays, seen = stays[:, :, :-2], seen[:, None, :-2].expand(-1, stays.shape[1], -1, -1)
    slots = stays.to(torch.int8).sort(dim=-1, descending=True, stable=True).indices[..., : form.keep]
    marks = seen.masked_fill(~stays, 0.0).gather(3, slots)
    number = torch.arange(-1, grid.chunks - 2, device=seen.device)
    number = number + (grid.base if isinstance(grid.base, int) else grid.base[:, None])
    number = number.expand(len(seen), -1)[:, None, :, None]
    begin = grid.begin if isinstance(grid.begin, int) else grid.begin[:, None, None, None]
    key = (number * form.chunk + slots - begin).clamp(min=0, max=grid.keys - 1).flatten(2)[..., None]
    since = ((number + 2) * form.chunk).expand(marks.shape).masked_fill(marks <= 0.5, NEVER)
    rows = [x.gather(2, key.expand(-1, -1, -1, x.shape[3])) for x in (given.k, given.v)]
    kept = (rows[0], rows[1], since.flatten(2).to(torch.int32), marks.flatten(2))
    if given.far_k is None or given.far_v is None:
        return kept
    seen = marks.new_ones(given.far_k.shape[:3]) if given.far_written is None else given.far_written.to(marks)
    since = torch.zeros(seen.shape, dtype=torch.int32, device=seen.device).masked_fill(seen <= 0.5, NEVER)
    first = (given.far_k, given.far_v, since, seen)
    k, v, since, seen = (torch.cat(both, dim=2) for both in zip(first, kept, strict=True))
    return k, v, since, seen
