"""Softmax attention over all keys, by whichever of torch's backends is the fastest; and its reference."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

from heddle.errors import HeddleError
from heddle.kernels.common.autocast import autocasts
from heddle.kernels.common.varlen import check_packing, each_alone, known_lengths
from heddle.kernels.configs.dense_attention import Backend, Rule, rules_on
from heddle.kernels.op import (
    TRITON_VERSION,
    Inputs,
    Shape,
    Traits,
    check_shapes,
    check_tensors,
    normal,
    op,
    register_composite,
)

try:
    from torch.nn.attention.varlen import varlen_attn

    _VARLEN = frozenset(inspect.signature(varlen_attn).parameters)
except ImportError:
    _VARLEN = frozenset()

# What torch itself goes by; another order is somebody's wish.
_OWN_ORDER = torch._C._get_sdp_priority_order()
_NUMBERS: dict[Backend, int] = {
    "cudnn": SDPBackend.CUDNN_ATTENTION.value,
    "flash": SDPBackend.FLASH_ATTENTION.value,
    "efficient": SDPBackend.EFFICIENT_ATTENTION.value,
    "math": SDPBackend.MATH.value,
}


def dense_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    lengths: Sequence[int] | None = None,  # noqa: ARG001 - what cu_seqlens says
) -> Tensor:
    """`dense_attention` in float64, all logits at once; shares nothing with it."""
    group = q.shape[1] // k.shape[1]
    k, v = (side.double().repeat_interleave(group, dim=1) for side in (k, v))
    logits = q.double() @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        later = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
        logits = logits.masked_fill(later, -torch.inf)
    if cu_seqlens is not None:
        sequence = (torch.arange(q.shape[2], device=q.device)[:, None] >= cu_seqlens).sum(-1)
        logits = logits.masked_fill(sequence[:, None] != sequence, -torch.inf)
    if mask is not None and mask.dtype == torch.bool:
        logits = logits.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        logits = logits + mask
    return torch.softmax(logits, dim=-1) @ v


def _draw(shape: Shape, generator: torch.Generator) -> Inputs:
    B, H, N, T, S, K, V = (shape[name] for name in ("B", "H", "N", "T", "S", "K", "V"))
    return {
        "q": normal(generator, B, H, T, K),
        "k": normal(generator, B, N, S, K),
        "v": normal(generator, B, N, S, V),
    }


_WIDE = {"H": 16, "N": 16, "K": 128, "V": 128}
_CASES = Traits(
    inputs=_draw,
    # Attention has no state.
    initial_state=lambda shape, generator: normal(generator, 0),  # noqa: ARG005
    sequence=("q", "k", "v"),
    rounded=("q", "k", "v"),
    differentiable=("q", "k", "v"),
    output_like="q",
    test_shapes=({"B": 2, "H": 4, "N": 2, "T": 37, "S": 37, "K": 16, "V": 24},),
    bench_shapes=tuple({"B": B, "T": T, "S": T, **_WIDE} for B, T in ((8, 4096), (1, 32768), (1, 131072))),
    decode_shapes=({"B": 32, "T": 1, "S": 8192, **_WIDE}, {"B": 1, "T": 1, "S": 131072, **_WIDE}),
)


@functools.cache
def _rules(device: torch.device) -> tuple[Rule, ...]:
    seen = torch.cuda.get_device_properties(device)
    capability = (seen.major, seen.minor)
    return rules_on(seen.name, capability, triton=TRITON_VERSION, library=torch.__version__)


@contextmanager
def in_order(backends: Sequence[Backend]) -> Iterator[None]:
    """Torch asks these backends first, in this order, unless somebody has asked for another; one switched off stays off.

    Costs the host about 2 µs, a thirtieth of `torch.nn.attention.sdpa_kernel`, which also switches backends on and off.
    """
    if torch._C._get_sdp_priority_order() != _OWN_ORDER:
        yield
        return
    first = [_NUMBERS[name] for name in backends]
    torch._C._set_sdp_priority_order(first + [number for number in _OWN_ORDER if number not in first])
    try:
        yield
    finally:
        torch._C._set_sdp_priority_order(_OWN_ORDER)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> Tensor:
    call = functools.partial(
        F.scaled_dot_product_attention,
        attn_mask=mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=bool(q.shape[1] != k.shape[1]),
    )
    if q.device.type != "cuda":
        return call(q, k, v)
    wanted = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    about = {"queries": q.shape[2], "size": max(q.shape[3], v.shape[3])}
    for rule in _rules(q.device):
        if rule.holds(**about, masked=mask is not None, training=wanted):
            with in_order(rule.order):
                return call(q, k, v)
    return call(q, k, v)


def _under_vmap(info: Any, in_dims: tuple[int | None, ...], *given: Any) -> tuple[Tensor, int]:
    """The rows of all calls in one: torch's own rules for its backends give NaN under autocast."""
    *sides, mask, is_causal, scale = given
    count = info.batch_size

    def rows(x: Tensor, dim: int | None) -> Tensor:
        many = x.expand(count, *x.shape) if dim is None else x.movedim(dim, 0)
        return many.flatten(0, 1)

    q, k, v = map(rows, sides, in_dims[:3])
    if mask is not None and (in_dims[3] is not None or mask.shape[0] > 1):
        mask = rows(
            mask.expand(q.shape[0] // count, *mask.shape[1:]) if in_dims[3] is None else mask, in_dims[3]
        )
    return _op(q, k, v, mask, is_causal, scale).unflatten(0, (count, -1)), 0


_op = register_composite(
    "dense_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? mask, bool is_causal, float? scale) -> Tensor",
    _attend,
    under_vmap=_under_vmap,
)


def _packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    lengths: Sequence[int],
    *,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    """Every packed sequence alone, by flash attention in one go where it takes them."""
    if _takes_packed(q, k, v):
        ends, longest = cu_seqlens.to(torch.int32), max(lengths)
        options: dict[str, Any] = {"scale": scale, "window_size": (-1, 0 if is_causal else -1)}
        options |= {} if q.shape[1] == k.shape[1] else {"enable_gqa": True}
        q, k, v = (side[0].transpose(0, 1) for side in (q, k, v))
        o = cast(Tensor, varlen_attn(q, k, v, ends, ends, longest, longest, **options))
        return o.transpose(0, 1)[None]
    # cuDNN would make a plan for every length. Compilers cannot look into the order.
    order = nullcontext() if torch.compiler.is_compiling() else in_order(("flash", "efficient", "math"))
    call = functools.partial(
        F.scaled_dot_product_attention,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=bool(q.shape[1] != k.shape[1]),
    )
    with order:
        return each_alone(call, {"query": q, "key": k, "value": v}, lengths)


def _takes_packed(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether torch has flash attention for packed sequences of these."""
    wanted = {"scale", "window_size"} | (set() if q.shape[1] == k.shape[1] else {"enable_gqa"})
    size = q.shape[3]
    is_half = q.dtype in (torch.bfloat16, torch.float16) and q.dtype == k.dtype == v.dtype
    fits = size == v.shape[3] and size % 8 == 0 and size <= 256
    return q.device.type == "cuda" and is_half and fits and wanted <= _VARLEN


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    name = "dense_attention"
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise HeddleError("bad-argument", f"{name}: q, k, v must be [B, heads, tokens, *]")
    (B, H, T, d), (N, S) = q.shape, k.shape[1:3]
    if H % N:
        raise HeddleError("bad-argument", f"{name}: {N} key heads do not divide {H} query heads")
    check_shapes(name, {"k": (k, (B, N, S, d)), "v": (v, (B, N, S, v.shape[-1]))})
    if mask is not None:
        rows, heads = mask.shape[:2] if mask.dim() == 4 else (B, H)
        check_shapes(name, {"mask": (mask, (1 if rows == 1 else B, 1 if heads == 1 else H, T, S))})
    keys = {"k": k, "v": v}
    alike, floats = ({"q": q}, keys) if autocasts(q) else ({"q": q, **keys}, {})
    check_tensors(name, alike, floats=floats, masks={"mask": mask})


def _check_packed(q: Tensor, k: Tensor, mask: Tensor | None, cu_seqlens: Tensor) -> None:
    name = "dense_attention"
    check_tensors(name, {"q": q}, integers={"cu_seqlens": cu_seqlens})
    if mask is not None:
        raise HeddleError("bad-argument", f"{name}: packed sequences have no mask")
    check_packing(name, q.shape[0], q.shape[2], cu_seqlens, keys=k.shape[2])


@op(dense_attention_reference, _CASES, is_cast=True)
def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    lengths: Sequence[int] | None = None,
) -> Tensor:
    """Softmax attention over all keys.

        o_i = sum_j softmax_j(scale · q_i · k_j) v_j,   with `is_causal` (S = T) over j <= i

    On a GPU torch's backends are asked in the order of a table (`heddle/kernels/configs/dense_attention.py`), by device family,
    head size, number of queries, mask, and whether gradients are wanted; on a CPU torch chooses. `mask` is bool, or a bias of
    the logits in the dtype of q. Query head h reads key head h // (H / N). `scale` defaults to d^-0.5.

    With `cu_seqlens` (B = 1, no mask) S = T tokens hold several sequences one behind the other: on a GPU in half precision all
    in one call of torch's flash attention where it has one for them (torch.nn.attention.varlen), else one by one. Their
    `lengths` spare the host waiting for the device.

    Shapes:  q: [B, H, T, d];  k: [B, N, S, d];  v: [B, N, S, V];  out: [B, H, T, V];  mask: [1 or B, 1 or H, T, S];
             cu_seqlens: [sequences + 1] integers

    Raises:
        HeddleError: "bad-argument" for shapes or dtypes that do not fit; under autocast torch brings q, k and v to one dtype.
    """
    _check(q, k, v, mask)
    if cu_seqlens is not None:
        _check_packed(q, k, mask, cu_seqlens)
        known = known_lengths("dense_attention", cu_seqlens, q.shape[2]) if lengths is None else lengths
        return _packed(q, k, v, cu_seqlens, known, is_causal=is_causal, scale=scale)
    # Compilers cannot look into the order that torch goes by; behind an op it is in force when they choose a backend.
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return _op(q, k, v, mask, is_causal, scale)  # type: ignore[no-any-return]
    return _attend(q, k, v, mask, is_causal, scale)
