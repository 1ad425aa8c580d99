"""Linear attention on Taylor features as its mixer computes it, for `run.py` to time beside flash-linear-attention's `based`."""

from __future__ import annotations

import torch
from torch import Tensor

from heddle.compose.modules.features import taylor2
from heddle.kernels.op import Inputs, Phase, Shape, Traits, Work, normal, op, wide_dtype
from heddle.kernels.simple_gla import simple_gla


def based_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`based` in float64 with all weights at once."""
    q, k, v = (x.double() for x in (q, k, v))
    y = torch.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5
    weight = (1 + y + y**2 / 2).tril()
    return torch.einsum("bhts,bshv->bthv", weight / weight.sum(-1, keepdim=True), v)


def _draw(shape: Shape, generator: torch.Generator) -> Inputs:
    B, T, H, K, V = (shape[letter] for letter in "BTHKV")
    sides = {name: normal(generator, B, T, H, K) for name in ("q", "k")}
    return {**sides, "v": normal(generator, B, T, H, V)}


def _work(shape: Shape, phase: Phase, element: int) -> Work:
    """A memory of F x V that each token writes and reads, three times as much for gradients; inputs and outputs once."""
    B, T, H, K, V = (shape[letter] for letter in "BTHKV")
    features = (K + 1) * (K + 2) // 2
    times, more = (3, 2) if phase == "fwdbwd" else (1, 0)
    return Work(times * 4 * B * T * H * features * (V + 1), (1 + more) * 2 * B * T * H * (K + V) * element)


# Sixteen dimensions before their features are all that fla's chunks take.
_SHAPES = tuple({"B": B, "T": T, "H": 16, "K": 16, "V": 128} for B, T in ((8, 4096), (1, 32768)))
_CASES = Traits(
    inputs=_draw,
    initial_state=lambda shape, generator: normal(generator, shape["B"], 0),
    sequence=("q", "k", "v"),
    rounded=("q", "k", "v"),
    differentiable=("q", "k", "v"),
    output_like="v",
    test_shapes=({"B": 2, "T": 70, "H": 2, "K": 16, "V": 24},),
    bench_shapes=_SHAPES,
    work=_work,
    # The same beside fla's other function for it.
    variants={"based_fused_chunk": (_draw, _SHAPES)},
)


@op(based_reference, _CASES)
def based(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What `LinearAttentionModule` does between its projections, without rotation, norms and masks.

        o_t = Σ_(s ≤ t) w_ts v_s / Σ_(s ≤ t) w_ts,   w = 1 + y + y² / 2,   y = q · k / sqrt(K)        (arXiv 2402.18668)

    Shapes:  q, k: [B, T, H, K];  v, out: [B, T, H, V]
    """
    wide = wide_dtype(v.dtype)
    q, k = (taylor2(x.to(wide)) for x in (q, k))
    values = torch.cat((v.to(wide), torch.ones_like(v[..., :1], dtype=wide)), dim=-1)
    sums, _ = simple_gla(q, k, values, torch.zeros_like(values[..., 0]), scale=1.0)
    return (sums[..., :-1] / sums[..., -1:]).to(v.dtype)
