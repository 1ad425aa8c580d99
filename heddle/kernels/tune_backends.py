"""Which of torch's attention backends is the fastest on this machine: what `heddle bench --tune` does for `dense_attention`.

Timed is causal attention of 16 heads in bfloat16, forward and in both directions, by each backend alone and as the shipped table
has it, at lengths that the table is about: for shorter calls cuDNN would make a plan for every new length. A backend must give
what torch's plain products give, within the house's bounds, and the same output twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from heddle.kernels.accuracy import EPSILON, worst_error
from heddle.kernels.bench import timed
from heddle.kernels.configs.dense_attention import NEVER, Backend, Rule
from heddle.kernels.dense_attention import dense_attention_reference, in_order

DTYPE, HEADS = torch.bfloat16, 16
# Tokens of all sequences of a call, and of the call that is held to the reference.
TOKENS, CHECKED = 32_768, 300
SIZES = (64, 128, 256)
# Plain products come last always.
TRIED: tuple[Backend, ...] = ("cudnn", "flash", "efficient")
LENGTHS: Mapping[str, tuple[int, ...]] = {"fwdbwd": (512, 2048, 8192), "fwd": (2048, 8192)}
# What is not faster by this share is noise.
GAIN = 0.02
# Head size, length and phase of a call.
About = tuple[int, int, str]
# Milliseconds of a call by a backend, or with None by the shipped table, of heads of this size, so long, in a phase; raises where
# it does not run or gives other results.
Trial = Callable[[Backend | None, int, int, str], float]


@dataclass(frozen=True, slots=True)
class Found:
    """Milliseconds as shipped and now (the geometric mean over sizes, lengths and phases), the rules by their names, none where
    as shipped is best, and how many calls were timed beside the shipped ones."""

    shipped_ms: float
    found_ms: float
    rules: Mapping[str, Rule]
    tried: int


def best_rules(
    trial: Trial, *, late: Callable[[], bool] = lambda: False, report: Callable[[str], None] = lambda _: None
) -> Found:
    """Of each head size and phase the order of the backends at the longest calls, from the length on at which its first is the
    fastest; shorter calls stay as shipped. Where it gets late nothing is found, for a table is taken whole."""
    made, shipped, timed = dict[str, Rule](), dict[About, float](), dict[About, dict[Backend, float]]()
    for above, size in pairwise((0, *SIZES)):
        for phase, lengths in LENGTHS.items():
            for length in lengths:
                if late():
                    return _found(shipped, shipped, {}, timed)
                about = size, length, phase
                shipped[about] = trial(None, *about)
                timed[about] = dict(_times(trial, about, report))
            order, least = _order({length: timed[size, length, phase] for length in lengths})
            training, inference = (least, NEVER) if phase == "fwdbwd" else (NEVER, least)
            if least < NEVER:
                made[f"{phase}_{size}"] = Rule(order, training, inference, largest=size, above=above)
    now = {}
    for about, before in shipped.items():
        rule = _holding(made.values(), about)
        now[about] = before if rule is None else timed[about][rule.order[0]]
    is_better = _mean(now.values()) < _mean(shipped.values()) * (1 - GAIN)
    return _found(shipped, now, made, timed) if is_better else _found(shipped, shipped, {}, timed)


def _times(trial: Trial, about: About, report: Callable[[str], None]) -> Iterator[tuple[Backend, float]]:
    for name in TRIED:
        what = f"dense_attention {name}, heads of {about[0]}, {about[1]} tokens, {about[2]}"
        try:
            ms = trial(name, *about)
        except Exception as error:
            report(f"{what}: {' '.join(str(error).split())[:120] or type(error).__name__}")
            continue
        report(f"{what}: {ms:.4f} ms")
        yield name, ms


def _order(times: Mapping[int, Mapping[Backend, float]]) -> tuple[tuple[Backend, ...], int]:
    """The backends as they come at the greatest of the lengths, and the least from which on the first is the fastest."""
    longest = times[max(times)]
    order = sorted(TRIED, key=lambda name: longest.get(name, math.inf))
    least = NEVER
    for length in sorted(times, reverse=True):
        at = times[length]
        if order[0] not in at or at[order[0]] > min(at.values()) * (1 + GAIN):
            break
        least = length
    return (*order, "math"), least


def _holding(rules: Iterable[Rule], about: About) -> Rule | None:
    """The first that is about such a call."""
    size, length, phase = about
    found = (
        rule
        for rule in rules
        if rule.holds(queries=length, size=size, masked=False, training=phase == "fwdbwd")
    )
    return next(found, None)


def _found(
    shipped: Mapping[About, float],
    now: Mapping[About, float],
    rules: Mapping[str, Rule],
    timed: Mapping[About, Mapping[Backend, float]],
) -> Found:
    return Found(_mean(shipped.values()), _mean(now.values()), rules, sum(map(len, timed.values())))


def _mean(times: Collection[float]) -> float:
    return math.exp(sum(map(math.log, times)) / len(times)) if times else math.nan


class BackendTrial:
    """Times a backend after it was held to the reference at the same head size, once; `shipped` are the rules beside it."""

    def __init__(self, device: torch.device, shipped: Sequence[Rule]) -> None:
        self.device, self.shipped, self.right = device, shipped, set[tuple[Backend, int]]()

    def __call__(self, name: Backend | None, size: int, length: int, phase: str) -> float:
        if name is not None and (name, size) not in self.right:
            self._check(name, size)
            self.right.add((name, size))
        sides = self._drawn(max(1, TOKENS // length), HEADS, length, size, wanted=phase == "fwdbwd")
        upstream = torch.randn_like(sides[0])

        def call() -> object:
            out = F.scaled_dot_product_attention(*sides, is_causal=True)
            return torch.autograd.grad(out, sides, upstream) if phase == "fwdbwd" else out

        with self._by(name, length, size, phase):
            return float(timed(call, self.device)["ms"])

    def _by(self, name: Backend | None, length: int, size: int, phase: str) -> AbstractContextManager[None]:
        if name is not None:
            return sdpa_kernel(getattr(SDPBackend, f"{name.upper()}_ATTENTION"))
        rule = _holding(self.shipped, (size, length, phase))
        return nullcontext() if rule is None else in_order(rule.order)

    def _drawn(self, *shape: int, wanted: bool) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator(self.device).manual_seed(0)
        q, k, v = (
            torch.randn(*shape, generator=generator, device=self.device, dtype=DTYPE).requires_grad_(wanted)
            for _ in range(3)
        )
        return q, k, v

    def _check(self, name: Backend, size: int) -> None:
        sides = self._drawn(1, 2, CHECKED, size, wanted=True)
        upstream = self._drawn(1, 2, CHECKED, size, wanted=False)[0]
        wide = tuple(side.detach().double().cpu().requires_grad_() for side in sides)
        out = dense_attention_reference(*wide, is_causal=True)
        exact = (out, *torch.autograd.grad(out, wide, upstream.double().cpu()))

        def results(backend: SDPBackend) -> tuple[Tensor, ...]:
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(*sides, is_causal=True)
                return (out, *torch.autograd.grad(out, sides, upstream))

        backend = getattr(SDPBackend, f"{name.upper()}_ATTENTION")
        found, plain = results(backend), results(SDPBackend.MATH)
        for what, one, other, wanted in zip(("out", "d_q", "d_k", "d_v"), found, plain, exact, strict=True):
            error, baseline = (
                worst_error(x.transpose(1, 2), wanted.transpose(1, 2), timed=True)[0] for x in (one, other)
            )
            if not error <= 2 * baseline + EPSILON[DTYPE] < math.inf:
                raise ArithmeticError(f"{what}: {error:.2e}, at most {2 * baseline + EPSILON[DTYPE]:.2e}")
        again = results(backend)
        if not torch.equal(found[0], again[0]):
            raise ArithmeticError("out: another result the second time")
