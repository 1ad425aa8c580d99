"""The gated delta rule in chunks, of which some are forgotten once they are over; and its reference.

What a chunk writes is a sum, and a route of 0 leaves the sum out: the kernels are those of `gated_delta_rule`, in both
directions, whose factors of what is written are multiplied by routes. Plain torch runs for chunks longer than those the kernels
treat.
"""

from __future__ import annotations

import torch
from torch import Tensor

from heddle.errors import HeddleError
from heddle.kernels._gated_delta_rule_torch import routed
from heddle.kernels.common.linear_op import LIMITS, check_inputs, draw_state, fits
from heddle.kernels.common.recurrence import heads_of_values
from heddle.kernels.op import (
    INTERPRETED,
    TRITON_DTYPES,
    Inputs,
    Shape,
    Traits,
    check_shapes,
    check_tensors,
    in_dtype,
    op,
    register_composite,
    wide_dtype,
)

try:
    from heddle.kernels._gated_delta_rule_op import longest_chunk, run_routed

    HAS_KERNELS = True
except ImportError:
    HAS_KERNELS = False


def routed_delta_rule_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    routes: Tensor,
    *,
    chunk: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`routed_delta_rule` token by token in float64; shares nothing with the fast path."""
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    q, k = (heads_of_values(x, v) for x in (q, k))
    v, beta, routes = v.double(), beta.double(), routes.double()
    before = v.new_zeros(v.shape[0], v.shape[2], q.shape[3], v.shape[3])
    before = before if initial_state is None else initial_state.double()
    state, faded, told = before, torch.ones_like(log_decay[:, 0].double()), []
    # Cut up at once: of each part autograd makes a gradient as long as what it was cut from.
    steps = zip(*(x.unbind(1) for x in (q, k, v, log_decay.double().exp(), beta)), strict=True)
    for t, (query, key, value, decay, rate) in enumerate(steps):
        state, faded = decay[..., None, None] * state, decay * faded
        wrong = value - torch.einsum("bhk,bhkv->bhv", key, state)
        state = state + torch.einsum("bhk,bhv->bhkv", key, rate[..., None] * wrong)
        told.append(factor * torch.einsum("bhk,bhkv->bhv", query, state))
        if (t + 1) % chunk == 0:
            undone = faded[..., None, None] * before
            state = before = undone + routes[:, t // chunk, :, None, None] * (state - undone)
            faded = torch.ones_like(faded)
    return torch.stack(told, dim=1), state


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    routes: Tensor,
    chunk: int,
    scale: float,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    given = (q, k, v, log_decay, beta, routes)
    shape = {
        "K": q.shape[-1],
        "V": v.shape[-1],
        "chunk": chunk,
        "room": _room(q.device, q.dtype, q.shape[-1]),
    }
    if routed_delta_rule.choose(q.device, q.dtype, **shape) == "triton":
        return run_routed(*given, chunk, scale, initial_state)
    return routed(*given, chunk=chunk, scale=scale, initial_state=initial_state)


_op = register_composite(
    "routed_delta_rule",
    "(Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor beta, Tensor routes, int chunk, float scale, "
    "Tensor? initial_state) -> (Tensor, Tensor)",
    _forward,
)


def _fits(shape: Shape) -> bool | None:
    # What a tile holds depends on the dtype: no mistake of who forces Triton.
    return True if HAS_KERNELS and fits(shape) and shape["chunk"] <= shape["room"] else None


def routed_path(device: torch.device, dtype: torch.dtype, *, K: int, V: int, chunk: int) -> str:
    """The code that runs: "triton" or "torch"."""
    return routed_delta_rule.path(device, dtype, K=K, V=V, chunk=chunk, room=_room(device, dtype, K))


def _room(device: torch.device, dtype: torch.dtype, K: int) -> int:
    """Tokens of a tile of the kernels, which a chunk must fit in; 0 where they do not run."""
    runs = HAS_KERNELS and (INTERPRETED or device.type == "cuda") and dtype in TRITON_DTYPES
    return longest_chunk(device, dtype.itemsize, K) if runs else 0


def _draw(shape: Shape, generator: torch.Generator) -> Inputs:
    from heddle.kernels.gated_delta_rule import gated_delta_rule

    given = gated_delta_rule.cases.inputs(shape, generator)
    size = (shape["B"], shape["T"] // shape["chunk"], shape.get("HV", shape["H"]))
    drawn = torch.rand(size, generator=generator, device=generator.device, dtype=torch.float64)
    return {**given, "routes": (drawn > 0.5).double()}


_WIDE = {"B": 1, "H": 6, "K": 128, "V": 256, "chunk": 64}
_CASES = Traits(
    inputs=_draw,
    initial_state=draw_state,
    sequence=("q", "k", "v", "log_decay", "beta"),
    rounded=("q", "k", "v"),
    differentiable=("q", "k", "v", "log_decay", "beta", "routes"),
    output_like="v",
    test_shapes=({"B": 2, "T": 24, "H": 2, "HV": 4, "K": 16, "V": 16, "chunk": 8},),
    bench_shapes=tuple({**_WIDE, "T": T} for T in (32768, 131072)),
)


@op(
    routed_delta_rule_reference,
    _CASES,
    kernel=_fits,
    limits=f"{LIMITS}, and chunks that fit a tile",
)
def routed_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    routes: Tensor,
    *,
    chunk: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`gated_delta_rule` whose state forgets, at the end of a chunk, what a chunk of route 0 wrote, and its state at the end.

        within chunk c   as `gated_delta_rule`, from S_start on
        after it         S = e^G S_start + routes_c (S_end - e^G S_start),   G the sum of the chunk's log-decays
                                                                                           (arXiv 2602.03681)

    A route changes nothing inside its chunk. q and k have length 1; value head j reads key head j // (HV / H); `scale` defaults
    to K^-0.5.

    Shapes:  q, k: [B, T, H, K];  v, o: [B, T, HV, V], of one dtype;  log_decay (at most 0), beta: [B, T, HV];  T a multiple of
             `chunk`;  routes: [B, T / chunk, HV];  states: [B, HV, K, V], float32 (float64 for float64)

    Raises:
        HeddleError: "bad-argument" for shapes, dtypes or a chunk that do not fit.
    """
    name = "routed_delta_rule"
    check_inputs(name, q, k, v, {"log_decay": log_decay, "beta": beta}, state=initial_state)
    if chunk < 1 or q.shape[1] % chunk:
        raise HeddleError(
            "bad-argument", f"{name}: {q.shape[1]} tokens must be a whole number of chunks of {chunk}"
        )
    check_tensors(name, {"q": q}, floats={"routes": routes})
    check_shapes(name, {"routes": (routes, (v.shape[0], v.shape[1] // chunk, v.shape[2]))})
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    wide = wide_dtype(v.dtype)
    initial_state = None if initial_state is None else initial_state.to(wide)
    log_decay, beta, routes = (in_dtype(x, wide) for x in (log_decay, beta, routes))
    return _op(q, k, v, log_decay, beta, routes, chunk, scale, initial_state)  # type: ignore[no-any-return]
