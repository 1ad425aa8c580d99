"""token_split_attention by its kernels: what torch knows of them, and what is made for them in plain torch.

The sums of the state, one product for each chunk, and what queries read from them are torch's, as is the list of the
keys that stay; so are their gradients.
"""

from __future__ import annotations

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
_INPUTS = (
    f"{_SIDES}, Tensor since, Tensor start, Tensor? written, Tensor? marks, float scale, int chunk, int keep, int far"
)
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
    found = [q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (rest[8], rest[9])]
    return *(_turned(x, x.shape[-1]) for x in (q, *keys)), told.new_empty(told.shape), torch.empty_like(gate), *found


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
    trains = torch.is_grad_enabled() and _has_gradient(given, state)
    size, grid = given.v.shape[-1], Grid.of(given, form)
    more = room(size, given.v.device) - size
    # Zeros before the sums of φ, as behind values.
    state = F.pad(state[..., :-1], (0, more + 1)) + F.pad(state[..., -1:], (size + more, 0)) if more else state
    # A key is read where it stands, as one that stays and by the state: in float32 what they pass back is summed, and rounded once.
    k, v, far_k, far_v = (
        x if x is None or not trains else x.to(state.dtype) for x in (given.k, given.v, given.far_k, given.far_v)
    )
    q, k, far_k = (x if x is None else wider(x, room(x.shape[-1], x.device)) for x in (given.q, k, far_k))
    v, far_v = (x if x is None else wider(x, size + more) for x in (v, far_v))
    gate = wider(given.gate.to(torch.float32), size + more)
    seen = grid.marks(state.new_empty(len(k), 0), given.written)
    # Of more than `keep` the first stay, so that every token counts once.
    stays = grid.of_keys(given.kept.to(torch.float32)[..., None])[..., 0] > 0.5
    stays = stays & (stays.cumsum(-1) <= form.keep)
    folded = (seen * grid.leaving(k.device).to(seen.dtype)[..., None])[:, None].masked_fill(stays, 0.0)
    told, state = _told(given.phi_q, grid.of_keys(given.phi_k), grid.of_keys(v), folded, state, grid)
    kept = _kept((k, v), seen, stays, form, grid)
    far = 0
    if far_k is not None and far_v is not None:
        far = far_k.shape[2]
        marks = seen.new_ones(far_k.shape[:3]) if given.far_written is None else given.far_written.to(seen.dtype)
        since = torch.zeros(marks.shape, dtype=torch.int32, device=k.device).masked_fill(marks <= 0.5, NEVER)
        kept = tuple(torch.cat(both, dim=2) for both in zip((far_k, far_v, since, marks), kept, strict=True))
    kept_k, kept_v, since, marks = kept
    begin = grid.begin if isinstance(grid.begin, Tensor) else torch.full((len(k),), grid.begin, device=k.device)
    written = None if given.written is None else given.written.to(torch.float32)
    is_marked = given.written is not None or given.far_written is not None
    out = _kernels(
        q, k, v, kept_k, kept_v, told, gate, since, begin.to(torch.int32), written, marks if is_marked else None,
        form.scale, form.chunk, form.keep, far, trains,
    )[0]  # fmt: skip
    if more:
        state = torch.cat((state[..., :size], state[..., -1:]), dim=-1)
    return narrower(out, size), state


def _has_gradient(given: Given, state: Tensor) -> bool:
    sides = (given.q, given.k, given.v, given.gate, given.phi_q, given.phi_k, state)
    more = (given.written, given.far_k, given.far_v, given.far_written)
    return any(x is not None and x.requires_grad for x in (*sides, *more))


def _told(
    phi_q: Tensor, phi_k: Tensor, v: Tensor, folded: Tensor, state: Tensor, grid: Grid
) -> tuple[Tensor, Tensor]:
    """What each query reads from the state before its chunk, and the state behind them all.

    Shapes:  phi_k, v: [B, N, C + 1, l, *];  folded: [B, N, C + 1, l];  state: [B, N, f, V + 1]
             out: [B, N, C, G, L, V + 1], and as state
    """
    keys = phi_k[:, :, :-1].to(state.dtype) * folded[:, :, :-1, :, None]
    sums = keys.mT @ F.pad(v[:, :, :-1].to(state.dtype), (0, 1), value=1.0)
    states = torch.cat((state[:, :, None], sums), dim=2).cumsum(2)
    features = grid.slots(phi_q.to(state.dtype)).unflatten(1, (state.shape[1], -1)).transpose(2, 3)  # [B, N, C, G, L, f]
    told = features.flatten(3, 4) @ states[:, :, :-1]
    return told.unflatten(3, features.shape[3:5]), states[:, :, -1]


def _kept(
    sides: tuple[Tensor, Tensor], seen: Tensor, stays: Tensor, form: Form, grid: Grid
) -> tuple[Tensor, ...]:
    """Keys and values of the tokens that stay of all chunks but the last two, from which place on they are seen, and marks.

    Shapes:  sides: [B, N, S, *];  seen: [B, C + 1, l];  stays: [B, N, C + 1, l];  out: [B, N, (C - 1) keep, ...]
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
    rows = [x.gather(2, key.expand(-1, -1, -1, x.shape[3])) for x in sides]
    return *rows, since.flatten(2).to(torch.int32), marks.flatten(2)
