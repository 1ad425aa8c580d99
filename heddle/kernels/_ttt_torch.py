"""ttt in plain torch, which autograd and compilers see through: chunk after chunk, all rows and heads of one at once.

All of it is float32 (float64 for float64), but that products with a linear memory, which has kernels, take operands rounded
to the dtype of the inputs, and so do those of their gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from heddle.kernels.common.products import product
from heddle.kernels.op import are_plain, wide_dtype

# Of a norm by which a row of weights is divided.
EPS = 1e-5
# Numbers of a state beside its matrices: the mean of the momentum gates so far, and the share of the chunk that is read.
SCALARS = 2


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the tokens of R rows stand in M parts of chunks, W places each; a chunk may have begun in an earlier call.

    Packed sequences lie in one row, one after the other; `sequence`, `first` and `last` are None without packing.

    Shapes:  token: [R, M, W], the token in each place;  present: [R, M, W], whether there is one;  full: [R, M], whether the
             chunk ends here;  place: [R, T], of each token in [M W];  after: [N], tokens of the open chunk at the end;
             sequence: [M];  first: [M], whether a sequence begins;  last: [N], its last part
    """

    token: Tensor
    present: Tensor
    full: Tensor
    place: Tensor
    after: Tensor
    sequence: Tensor | None = None
    first: Tensor | None = None
    last: Tensor | None = None

    def parts(self, x: Tensor) -> Tensor:
        """Shapes:  x: [R, T, H, *];  out: [M, R, H, W, *]"""
        rows = torch.arange(x.shape[0], device=x.device)[:, None, None]
        return x[rows, self.token].permute(1, 0, 3, 2, *range(4, x.dim() + 1))

    def joined(self, parts: list[Tensor]) -> Tensor:
        """Shapes:  parts: M of [R, H, W, V];  out: [R, T, H, V]"""
        places = torch.stack(parts, dim=1).transpose(2, 3).flatten(1, 2)
        return places[torch.arange(places.shape[0], device=places.device)[:, None], self.place]


def dense(before: Tensor, real: Tensor | None, length: int, chunk: int, *, parts: int) -> Layout:
    """The layout of rows that may hold padding.  Shapes:  before: [B], tokens of the open chunk;  real: [B, T] bool"""
    device, width = before.device, min(chunk, length)
    number = torch.arange(length, device=device)[None]
    lengths = torch.full_like(before, length)
    if real is not None:
        number, lengths = (real.long().cumsum(-1) - 1).clamp_min(0), real.sum(-1)
    start = torch.arange(parts, device=device) * chunk - before[:, None]
    token = start.clamp_min(0)[..., None] + torch.arange(width, device=device)
    present = token < torch.minimum(start + chunk, lengths[:, None])[..., None]
    part = (before[:, None] + number) // chunk
    place = part * width + number - (part * chunk - before[:, None]).clamp_min(0)
    token = token.clamp_max(length - 1)
    if real is not None:
        # Real tokens first, in their order.
        order = (~real).long().sort(dim=-1, stable=True).indices
        token = order.gather(1, token.flatten(1)).view_as(token)
    return Layout(token, present, start + chunk <= lengths[:, None], place, (before + lengths) % chunk)


def packed(before: Tensor, cu_seqlens: Tensor, length: int, chunk: int, *, parts: int) -> Layout:
    """The layout of packed sequences.  Shapes:  before: [N], as in `dense`"""
    device, width, sequences = before.device, min(chunk, length), before.shape[0]
    cu_seqlens = cu_seqlens.long()
    lengths = cu_seqlens.diff()
    counts = ((before + lengths + chunk - 1) // chunk).clamp_min(1)
    ends = counts.cumsum(0)
    part = torch.arange(parts, device=device)
    sequence = torch.searchsorted(ends, part, right=True)
    used, sequence = sequence < sequences, sequence.clamp_max(sequences - 1)
    own = part - (ends - counts)[sequence]
    start = own * chunk - before[sequence]
    token = start.clamp_min(0)[:, None] + torch.arange(width, device=device)
    end = torch.minimum(start + chunk, lengths[sequence])
    present = used[:, None] & (token < end[:, None])
    token = (cu_seqlens[sequence][:, None] + token).clamp_max(length - 1)
    at = torch.arange(length, device=device)
    mine = torch.searchsorted(cu_seqlens[1:], at, right=True)
    number = at - cu_seqlens[mine]
    inside = (before[mine] + number) // chunk
    place = ((ends - counts)[mine] + inside) * width + number - (inside * chunk - before[mine]).clamp_min(0)
    full, after = used & (start + chunk <= lengths[sequence]), (before + lengths) % chunk
    one_row = (token[None], present[None], full[None], place[None], after)
    return Layout(*one_row, sequence=sequence, first=used & (own == 0), last=ends - 1)


@dataclass(frozen=True, slots=True)
class Rule:
    """How weights are written: `chunk` tokens at a time, the loss, and when rows are brought to the norm of the first weights.

    `dtype` is that of the operands of products with a linear memory.
    """

    chunk: int
    loss: str
    normalise: str
    dtype: torch.dtype


def chunked(
    sides: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None],
    weight: Tensor,
    rule: Rule,
    *,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    real: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output and final state of whole sequences; `sides` are q, k, v, rates, momentum of `ttt`, and so are the others."""
    v, wide, length = sides[2], wide_dtype(sides[2].dtype), sides[2].shape[1]
    rows = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    size = state_size(weight, has_momentum=sides[4] is not None)
    state = v.new_zeros(rows, v.shape[2], size, dtype=wide) if initial_state is None else initial_state
    before = (state[:, 0, -1].detach() * rule.chunk).round().long()
    # The most parts that there can be, whatever the lengths are and wherever an open chunk ends: shapes depend on no value.
    is_open = initial_state is not None
    if cu_seqlens is None:
        parts = (length + (rule.chunk - 1) * (1 + is_open)) // rule.chunk
        layout = dense(before, real, length, rule.chunk, parts=parts)
    else:
        parts = length // rule.chunk + rows * (1 + is_open)
        layout = packed(before, cu_seqlens, length, rule.chunk, parts=parts)
    q, k, v = (layout.parts(x.to(wide)) for x in sides[:3])
    here = layout.present.transpose(0, 1)[:, :, None]
    rates = layout.parts(sides[3].to(wide)) * here[..., None]
    gates = None if sides[4] is None else layout.parts(sides[4].to(wide)) * here
    weight = weight.to(wide)
    found, held = _walk((q, k, v, rates, gates), weight, _unpacked(state, weight), rule, layout)
    share = (layout.after.to(wide) / rule.chunk)[:, None, None].expand(-1, held[0].shape[1], 1)
    matrices = [x.flatten(2) for x in held[:-1]]
    return layout.joined(found).to(sides[2].dtype), torch.cat((*matrices, held[-1], share), dim=-1)


def state_size(weight: Tensor, *, has_momentum: bool) -> int:
    """Numbers that a head's state holds.  Shapes:  weight: [H, N, M, D]"""
    return (3 if has_momentum else 2) * weight[0].numel() + SCALARS


def _unpacked(state: Tensor, weight: Tensor) -> list[Tensor]:
    """What was learned, momentum (if any), open gradient: [R, H, N, M, D] each; and the mean of gates so far, [R, H, 1]."""
    shape = (*state.shape[:2], *weight.shape[1:])
    matrices = torch.split(state[..., :-SCALARS], weight[0].numel(), dim=-1)
    return [*(one.reshape(shape) for one in matrices), state[..., -SCALARS:-1]]


def _walk(
    sides: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None],
    weight: Tensor,
    state: list[Tensor],
    rule: Rule,
    layout: Layout,
) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs of all parts, and the states of all rows or sequences at the end; `sides` begin with the axis of parts."""
    begun, found, after = state, [], []
    part = partial(_part, weight=weight, rule=rule)
    if torch.is_grad_enabled() and are_plain((*sides, weight)):
        # What a part makes is made again for its gradients; kept are what it begins with and its tokens.
        part = partial(checkpoint, part, use_reentrant=False, preserve_rng_state=False)
    # Of slices each gradient would be as long as the whole.
    pieces = ([None] * len(sides[0]) if side is None else side.unbind() for side in sides)
    for m, tokens in enumerate(zip(*pieces, strict=True)):
        if layout.sequence is not None and layout.first is not None:
            own = layout.sequence[m : m + 1]
            state = [
                torch.where(layout.first[m], one[own], held[:1])
                for one, held in zip(begun, state, strict=True)
            ]
        out, state = part(tokens, state, layout.full[:, m, None, None])
        found.append(out)
        after.append(state)
    if layout.last is None:
        return found, state
    ended = [torch.cat(held)[layout.last] for held in zip(*after, strict=True)]
    return found, ended


def _part(
    tokens: Sequence[Tensor | None], state: list[Tensor], full: Tensor, weight: Tensor, rule: Rule
) -> tuple[Tensor, list[Tensor]]:
    """The output of a part, and the state after it."""
    q, k, v, rates, gates = tokens
    assert q is not None
    assert k is not None
    assert v is not None
    assert rates is not None
    now = weight + state[0]
    gradient = state[-2] + _gradient(k, v, rates, now, rule)
    gate = state[-1] if gates is None else state[-1] + gates.sum(-1, keepdim=True) / rule.chunk
    return _read(q, now, rule), _written(state, gradient, gate, weight, full, rule.normalise)


def _written(
    state: list[Tensor], gradient: Tensor, gate: Tensor, weight: Tensor, full: Tensor, normalise: str
) -> list[Tensor]:
    """The state after a part: where its chunk is `full` the gradient is written, elsewhere it is kept open."""
    learned, *momentum = state[:-2]
    step = gradient + gate[..., None, None] * momentum[0] if momentum else gradient
    old = weight + learned
    old = _normalised(old, weight) if normalise == "before" else old
    new = old - step
    new = _normalised(new, weight) if normalise == "after" else new
    wide = full[..., None, None]
    kept = [torch.where(wide, new - weight, learned)]
    kept += [torch.where(wide, step, held) for held in momentum]
    return [*kept, gradient.masked_fill(wide, 0.0), gate.masked_fill(full, 0.0)]


def _normalised(weights: Tensor, first: Tensor) -> Tensor:
    """Each row of each matrix at the norm that it had at first; a row is what one product with an input is made of."""

    def rows(x: Tensor, first: Tensor, dim: int) -> Tensor:
        # Unlike the root of a sum of squares, this has a gradient where a row is zero.
        size, had = (torch.linalg.vector_norm(one, dim=dim, keepdim=True) for one in (x, first))
        scaled: Tensor = x * (had / (size + EPS))
        return scaled

    # The last matrix is held transposed.
    last = rows(weights[..., -1:, :, :], first[..., -1:, :, :], -2)
    if weights.shape[-3] == 1:
        return last
    return torch.cat((rows(weights[..., :-1, :, :], first[..., :-1, :, :], -1), last), dim=-3)


def _read(z: Tensor, weights: Tensor, rule: Rule) -> Tensor:
    """z + m(z).  Shapes:  z, out: [R, H, W, D];  weights: [R, H, N, M, D]"""
    if weights.shape[-3] == 1:
        return z + product(z, weights[:, :, 0], rule.dtype)
    hidden = F.silu(z @ weights[:, :, 0].mT) * (z @ weights[:, :, 1].mT)
    return z + hidden @ weights[:, :, 2]


def _gradient(k: Tensor, v: Tensor, rates: Tensor, weights: Tensor, rule: Rule) -> Tensor:
    """Σ_t rate_t · d loss_t / d weights.  Shapes:  k, v: [R, H, W, D];  rates: [R, H, W, N];  weights, out: [R, H, N, M, D]"""
    last = weights[:, :, -1]
    # A linear memory is the last matrix alone.
    if weights.shape[-3] == 1:
        error = -v if rule.loss == "dot" else _read(k, weights, rule) - v
        return product((rates * k).mT, error, rule.dtype)[:, :, None]
    a, b = k @ weights[:, :, 0].mT, k @ weights[:, :, 1].mT
    share = torch.sigmoid(a)
    silu = a * share
    hidden = silu * b
    error = -v if rule.loss == "dot" else k + hidden @ last - v
    d_hidden = error @ last.mT
    d_a = d_hidden * b * share * (1 + a * (1 - share))
    sides = ((d_a, k), (d_hidden * silu, k), (hidden, error))
    return torch.stack([(rates[..., n, None] * x).mT @ y for n, (x, y) in enumerate(sides)], dim=2)
