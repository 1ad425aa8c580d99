"""Which of torch's attention backends is the fastest on this machine: what `heddle bench --tune` does for `dense_attention`.

Timed is causal attention of 16 heads in bfloat16, forward and in both directions, by each backend alone and as the shipped table
has it, at lengths that the table is about: for shorter calls cuDNN would make a plan for every new length. A backend must give
what torch's plain products give, within the house's bounds, and the same bits twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

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
    fastest. Where it gets late nothing is found, for a table is taken whole."""
    made, shipped, now, tried = dict[str, Rule](), list[float](), list[float](), 0
    for size in SIZES:
        for phase, lengths in LENGTHS.items():
            times = {length: dict[Backend, float]() for length in lengths}
            for length in lengths:
                if late():
                    return Found(_mean(shipped), _mean(shipped), {}, tried)
                shipped.append(trial(None, size, length, phase))
                for name, ms in _times(trial, (size, length, phase), report):
                    times[length][name], tried = ms, tried + 1
            rule = _rule(times, size, phase)
            first = len(shipped) - len(lengths)
            now += [
                times[length][rule.order[0]] if rule is not None and length >= _least(rule, phase) else before
                for length, before in zip(lengths, shipped[first:], strict=True)
            ]
            made |= {} if rule is None else {f"{phase}_{size}": rule}
    is_better = _mean(now) < _mean(shipped) * (1 - GAIN)
    return Found(
        _mean(shipped), _mean(now) if is_better else _mean(shipped), made if is_better else {}, tried
    )


def _times(
    trial: Trial, about: tuple[int, int, str], report: Callable[[str], None]
) -> Iterator[tuple[Backend, float]]:
    for name in TRIED:
        what = f"dense_attention {name}, heads of {about[0]}, {about[1]} tokens, {about[2]}"
        try:
            ms = trial(name, *about)
        except Exception as error:
            report(f"{what}: {' '.join(str(error).split())[:120] or type(error).__name__}")
            continue
        report(f"{what}: {ms:.4f} ms")
        yield name, ms


def _rule(times: Mapping[int, Mapping[Backend, float]], size: int, phase: str) -> Rule | None:
    longest = times[max(times)]
    if not longest:
        return None
    order = sorted(TRIED, key=lambda name: longest.get(name, math.inf))
    least = NEVER
    for length in sorted(times, reverse=True):
        at = times[length]
        if order[0] not in at or at[order[0]] > min(at.values()) * (1 + GAIN):
            break
        least = length
    training, inference = (least, NEVER) if phase == "fwdbwd" else (NEVER, least)
    return Rule((*order, "math"), training=training, inference=inference, largest=size)


def _least(rule: Rule, phase: str) -> int:
    return rule.training if phase == "fwdbwd" else rule.inference


def _mean(times: list[float]) -> float:
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
        holding = (
            rule
            for rule in self.shipped
            if rule.holds(queries=length, size=size, masked=False, training=phase == "fwdbwd")
        )
        rule = next(holding, None)
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
            if not error <= 2 * baseline + EPSILON[DTYPE]:
                raise ArithmeticError(f"{what}: {error:.2e}, at most {2 * baseline + EPSILON[DTYPE]:.2e}")
        again = results(backend)
        if not torch.equal(found[0], again[0]):
            raise ArithmeticError("out: another result the second time")
