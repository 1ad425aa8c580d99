"""Soft-caps and sink logits as models run them, by explicit products, beside compiled FlexAttention: a part of window_check.py.

FlexAttention gets the cap as a `score_mod`; a sink is a term more in the denominator, so its output is times
sigmoid(log-sum-exp - sink). Both are compared with float64 on a small shape, and with each other on those that are timed; dense
attention without cap and sinks stands beside them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from dense_backends import DEVICE, HALF, Report, attempt
from gpu_check import Log
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from heddle.compose.modules.softmax import softmax_attention
from heddle.kernels.accuracy import EPSILON

TINY = DEVICE.type == "cpu"
OP, CAP = "softmax_attention", 50.0
DTYPE = torch.float32 if TINY else HALF
SIDES = {"H": 16, "N": 16, "K": 128, "V": 128} if not TINY else {"H": 4, "N": 2, "K": 16, "V": 16}
SHAPES = tuple(
    {"B": B, "T": T, "S": T, **SIDES} for B, T in (((8, 4096), (1, 32768)) if not TINY else ((1, 64),))
)
HELD = {"B": 2, "T": 700, "S": 700, **SIDES} if not TINY else {"B": 1, "T": 50, "S": 50, **SIDES}
# Which of cap and sinks each form has.
FORMS = {"softcap": (True, False), "sinks": (False, True), "softcap and sinks": (True, True)}
# On a CPU FlexAttention has no gradients.
PHASES = ("fwd",) if TINY else ("fwd", "fwdbwd")
Late = Callable[[], bool]
Given = dict[str, Tensor]
Function = Callable[..., Tensor]


def drawn(shape: dict[str, int], dtype: torch.dtype = DTYPE) -> Given:
    """q, k, v with logits that reach the cap's bend, and sinks."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    sizes = {"q": ("H", "T", "K"), "k": ("N", "S", "K"), "v": ("N", "S", "V")}
    found = {
        name: torch.randn(shape["B"], *(shape[one] for one in letters), generator=generator, device=DEVICE)
        for name, letters in sizes.items()
    }
    found["q"] = 5.0 * found["q"]
    sinks = torch.randn(shape["H"], generator=generator, device=DEVICE)
    return {name: x.to(dtype) for name, x in found.items()} | {"sinks": sinks}


def exact(form: str, *, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    """All weights at once, in the dtype of what is given."""
    (has_cap, has_sinks), group = FORMS[form], q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    logits = q @ k.mT * q.shape[-1] ** -0.5
    logits = CAP * torch.tanh(logits / CAP) if has_cap else logits
    later = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
    weights = torch.exp(logits).masked_fill(later, 0.0)
    total = weights.sum(-1, keepdim=True)
    return weights @ v / (total + torch.exp(sinks)[:, None, None] if has_sinks else total)


def explicit(form: str, *, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    """As `attention` with these options does."""
    has_cap, has_sinks = FORMS[form]
    rest = {"softcap": CAP if has_cap else None, "sinks": sinks if has_sinks else None}
    return softmax_attention(q, k, v, None, is_causal=True, **rest)


def dense(form: str, *, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:  # noqa: ARG001
    """Without cap and sinks."""
    return softmax_attention(q, k, v, None, is_causal=True)


@cache
def causal(length: int) -> Any:
    def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG001
        return key <= query

    return create_block_mask(seen, None, None, length, length, device=DEVICE.type, _compile=not TINY)


@cache
def made(form: str, length: int) -> Callable[..., Tensor]:  # noqa: ARG001
    """FlexAttention of a form, compiled for each length, or dynamic shapes would be compiled for, which are slower."""
    has_cap, has_sinks = FORMS[form]

    def capped(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG001
        return CAP * torch.tanh(score / CAP)

    def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, mask: Any) -> Tensor:
        rest = {
            "score_mod": capped if has_cap else None,
            "block_mask": mask,
            "enable_gqa": q.shape[1] != k.shape[1],
        }
        if not has_sinks:
            return flex_attention(q, k, v, **rest)  # type: ignore[no-any-return]
        out, about = flex_attention(q, k, v, return_aux=AuxRequest(lse=True), **rest)
        share = torch.sigmoid(about.lse - sinks[:, None])
        return (out * share[..., None]).to(out.dtype)  # type: ignore[no-any-return]

    torch._dynamo.reset()
    return attend if TINY else torch.compile(attend, dynamic=False)


def flex(form: str, *, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    return made(form, q.shape[2])(q, k, v, sinks, causal(q.shape[2]))


def results(function: Function, form: str, given: Given) -> dict[str, Tensor]:
    """Output and gradients, or the output alone where there are none."""
    if TINY:
        with torch.no_grad():
            return {"out": function(form, **given)}
    there, wanted = leaves(form, given)
    out = function(form, **there)
    return {"out": out.detach(), **dict(zip(wanted, gradients(out, there, wanted), strict=True))}


def leaves(form: str, given: Given) -> tuple[Given, list[str]]:
    """What is given as leaves, and the names of those that a form has gradients of."""
    wanted = ["q", "k", "v", *(["sinks"] if FORMS[form][1] else [])]
    return {name: x.detach().requires_grad_(name in wanted) for name, x in given.items()}, wanted


def gradients(out: Tensor, there: Given, wanted: list[str]) -> tuple[Tensor, ...]:
    generator = torch.Generator(DEVICE).manual_seed(7)
    upstream = torch.randn(out.shape, generator=generator, device=DEVICE).to(DTYPE).to(out.dtype)
    return torch.autograd.grad(out, [there[name] for name in wanted], upstream)


def phases(function: Function, form: str, given: Given) -> dict[str, Callable[[], object]]:
    """A call forward, and one forward and backward."""
    there, wanted = leaves(form, given)
    upstream = torch.randn_like(given["q"])

    def forward() -> object:
        with torch.no_grad():
            return function(form, **given)

    def both() -> object:
        # Dense attention has no sinks.
        out, allow = function(form, **there), function is dense
        return torch.autograd.grad(out, [there[name] for name in wanted], upstream, allow_unused=allow)

    return {"fwd": forward, "fwdbwd": both}


def apart(x: Tensor, y: Tensor) -> float:
    """The norm of the difference over that of the second."""
    return float((x.double() - y.double()).norm() / y.double().norm())


def held(log: Log) -> None:
    """Each way no more than twice as far from float64 as the other."""
    for form in FORMS:
        given = drawn(HELD)
        try:
            judge(log, form, given)
        except Exception as error:
            log.wrong.append(f"{form} held: {' '.join(str(error).split())[-200:]}")


def judge(log: Log, form: str, given: Given) -> None:
    right = results(exact, form, {name: x.double() for name, x in given.items()})
    found = {name: results(way, form, given) for name, way in (("explicit", explicit), ("flex", flex))}
    for name, x in right.items():
        errors = {way: apart(those[name], x) for way, those in found.items()}
        good = max(errors.values()) <= 2 * min(errors.values()) + EPSILON[DTYPE]
        told = f"{form}, {name}: {', '.join(f'{way} {error:.1e}' for way, error in errors.items())}"
        log(f"{'ok   ' if good else 'WRONG'} {told}")
        log.wrong += [] if good else [told]


def compared(log: Log, form: str, shape: dict[str, int], given: Given) -> None:
    """How far the ways are apart on what is timed."""
    explicitly, flexibly = (results(way, form, given) for way in (explicit, flex))
    told = ", ".join(f"{name} {apart(flexibly[name], x):.1e}" for name, x in explicitly.items())
    log(f"apart {form} {shape['B']} x {shape['T']}: {told}")
    if any(not apart(flexibly[name], x) < 0.05 for name, x in explicitly.items()):
        log.wrong.append(f"{form} {shape['B']} x {shape['T']}: {told}")


def cases() -> Iterator[tuple[dict[str, int], str]]:
    yield from itertools.product(SHAPES, FORMS)


def run(log: Log, row: Report, late: Callable[[float], Late]) -> list[str]:
    """Holds and times; gives the lines of a table."""
    held(log)
    lines = []
    for shape, form in cases():
        if late(1.0)():
            log("capped: out of time")
            break
        given = drawn(shape)
        ways = {f"flex, {form}": flex, f"explicit, {form}": explicit}
        ways |= {"dense": dense} if form == "softcap" else {}
        times = {
            (impl, phase): attempt(log, row, (OP, impl, phase), shape, phases(way, form, given)[phase])
            for (impl, way), phase in itertools.product(ways.items(), PHASES)
        }
        try:
            compared(log, form, shape, given)
        except Exception as error:
            log.wrong.append(f"{form} compared: {' '.join(str(error).split())[-200:]}")
        told = "  ".join(
            f"{phase} {' '.join(f'{impl} {times[impl, phase]:.3f}' for impl in ways)}, explicit / flex "
            f"{times[f'explicit, {form}', phase] / times[f'flex, {form}', phase]:.2f}"
            for phase in PHASES
        )
        lines.append(f"{shape['B']} x {shape['T']}: {told}")
    return lines


def warm(index: int, workers: int) -> None:
    """Compiles every `workers`th case of FlexAttention into the caches on disk."""
    for shape, form in [*cases(), *((HELD, form) for form in FORMS)][index::workers]:
        for call in phases(partial(flex), form, drawn(shape)).values():
            call()
