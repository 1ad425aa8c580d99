"""MoH's router and the op of chosen heads, captured in a CUDA graph and compiled, beside dense attention: a part of
head_sparse_check.py.

Of the router's time the host's launches were the most: each form stands as it is and in a graph, where no launch waits for the
host. "one product" is a router whose three projections are one. In both directions the gradients are those of q, k, v, the
layer's input and the router's weights, of the output and of the balance loss. What a graph gives is held to what the calls gave,
and choices are compared with those of the router as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from head_sparse_check import DEVICE, HALF, ON_GPU, WANTED, Bench, Late, cudnn, drawn, mixer_of, ours, phases
from torch import Tensor
from torch.nn import functional as F

from heddle.compose.cache import Call
from heddle.compose.mixers.moh import MohModule
from heddle.compose.modules.precision import wide
from heddle.kernels.accuracy import EPSILON

Shape = dict[str, int]
Router = Callable[[Tensor], tuple[Tensor, Tensor]]
# Of tokens: what compiled rounding may turn.
TURNED = 1e-3


class OneProduct(MohModule):
    """A router that reads its input once."""

    def gates(self, x: Tensor, call: Call) -> Tensor:
        weights = [proj.weight for proj in (self.routed_proj, self.split_proj, self.shared_proj)]
        sides = F.linear(x, torch.cat(weights)).split([len(one) for one in weights], dim=-1)
        routed, a, shared = (torch.softmax(wide(side), dim=-1) for side in sides)
        whole = 2.0 * a
        return torch.cat(
            (whole[..., :1] * (self.shared_heads * shared), whole[..., 1:] * self._routed(routed, call)),
            dim=-1,
        )


@dataclass(frozen=True)
class Sides:
    """What a layer's heads and its router read, as leaves."""

    layer: Any
    q: Tensor
    k: Tensor
    v: Tensor
    x: Tensor
    upstream: Tensor

    def wanted(self) -> list[Tensor]:
        projections = (self.layer.routed_proj, self.layer.split_proj, self.layer.shared_proj)
        return [self.q, self.k, self.v, self.x, *(one.weight for one in projections)]


def made(shape: Shape, kind: type[MohModule] = MohModule) -> Sides:
    """Half of the heads, a quarter of all shared, as the layer of head_sparse_check.py."""
    hidden, shared = shape["H"] * shape["K"], shape["H"] // 4
    inner = {"kind": "attention", "heads": shape["H"], "kv_heads": shape["N"], "head_dim": shape["K"]}
    torch.manual_seed(0)
    layer = mixer_of(
        hidden, {"kind": "moh", "mixer": inner, "shared_heads": shared, "active": shape["active"] - shared}
    )
    layer.__class__ = kind
    given = drawn(shape)
    q, k, v = (given[name].requires_grad_() for name in WANTED[:3])
    x = torch.randn(shape["B"], shape["T"], hidden, device=DEVICE, dtype=HALF, requires_grad=True)
    return Sides(layer, q, k, v, x, torch.randn_like(q)[..., : shape["V"]])


def router_of(sides: Sides, *, compiled: bool) -> Router:
    places = torch.arange(sides.x.shape[1], device=DEVICE).expand(sides.x.shape[0], -1)

    def router(x: Tensor) -> tuple[Tensor, Tensor]:
        call = Call(places)
        weights = sides.layer.gates(x, call)
        return weights, call.losses[0][1]

    if not compiled:
        return router
    torch._dynamo.reset()
    return torch.compile(router, dynamic=False, fullgraph=True, backend="inductor" if ON_GPU else "eager")


def calls_of(sides: Sides, router: Router) -> dict[str, Callable[[], Sequence[Tensor]]]:
    """Router and op, forward, and forward and backward."""

    def forward() -> Sequence[Tensor]:
        with torch.no_grad():
            weights, balance = router(sides.x)
            return ours(q=sides.q, k=sides.k, v=sides.v, weights=weights), weights, balance

    def both() -> Sequence[Tensor]:
        weights, balance = router(sides.x)
        out = ours(q=sides.q, k=sides.k, v=sides.v, weights=weights)
        return torch.autograd.grad([out, balance], sides.wanted(), [sides.upstream, torch.ones_like(balance)])

    return {"fwd": forward, "fwdbwd": both}


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call as a CUDA graph, which gives the same tensors each time; on a CPU as it is."""
    if not ON_GPU:
        return call
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()

    def replay() -> Any:
        graph.replay()
        return found

    return replay


def apart(x: Tensor, y: Tensor) -> float:
    return float((x.double() - y.double()).norm() / y.double().norm().clamp(min=1e-30))


def both_ways(bench: Bench, impl: str, phase: str, shape: Shape, call: Callable[[], Any]) -> None:
    """The call, and a graph of it, which gives the same."""
    bench(impl, phase, shape, call)
    try:
        replay = captured(call)
        expected = call()
        found = replay()
        pairs = [(found, expected)] if isinstance(found, Tensor) else list(zip(found, expected, strict=True))
        worst = max(apart(one, other) for one, other in pairs)
        bench.log(f"{'same ' if worst == 0 else 'apart'} {impl} {phase}: a graph differs by {worst:.1e}")
        if not worst <= EPSILON[HALF]:
            bench.log.wrong.append(f"{impl} {phase}: a graph differs by {worst:.1e}")
    except Exception as error:
        bench.log.wrong.append(f"{impl} {phase} in a graph: {' '.join(str(error).split())[-200:]}")
        return
    bench(f"{impl}, graph", phase, shape, replay)


def turned(bench: Bench, impl: str, found: Tensor, expected: Tensor, most: float | None) -> None:
    """How many tokens chose otherwise, and how far the factors of the others are apart."""
    same = ((found != 0) == (expected != 0)).all(-1)
    share, error = float((~same).float().mean()), apart(found[same], expected[same])
    bench.log(
        f"{impl}: {share:.1e} of the tokens choose other heads, factors of the others differ by {error:.1e}"
    )
    if most is not None and not (share <= most and error <= 1e-2):
        bench.log.wrong.append(
            f"{impl}: {share:.1e} of the tokens choose other heads, factors differ by {error:.1e}"
        )


def forms() -> dict[str, tuple[type[MohModule], bool]]:
    found = {"router": (MohModule, False), "router, compiled": (MohModule, True)}
    return found | {"one product": (OneProduct, False), "one product, compiled": (OneProduct, True)}


def graph(bench: Bench, late: Late, shapes: Sequence[Shape]) -> None:
    for shape in shapes:
        told = {**shape, "hidden": shape["H"] * shape["K"]}
        given, expected = drawn(shape), None
        for impl, function, names in (("cudnn", cudnn, WANTED[:3]), ("heddle", ours, WANTED)):
            for phase, call in phases(function, given, *names).items():
                both_ways(bench, impl, phase, shape, call)
        for name, (kind, compiled) in forms().items():
            if late():
                bench.log("graph: out of time")
                return
            sides = made(shape, kind)
            router = router_of(sides, compiled=compiled)
            try:
                with torch.no_grad():
                    weights = router(sides.x)[0]
                    if expected is None:
                        expected = weights.clone()
                    turned(bench, name, weights, expected, TURNED if kind is MohModule else None)
                    both_ways(bench, name, "fwd", told, lambda router=router, x=sides.x: router(x))
            except Exception as error:
                bench.log.wrong.append(f"{name}: {' '.join(str(error).split())[-200:]}")
                continue
            for phase, call in calls_of(sides, router).items():
                both_ways(bench, f"{name} + op", phase, told, call)
            del sides, router, call


def lines(bench: Bench, shapes: Sequence[Shape]) -> list[str]:
    """Of each form the ratio of dense attention's time as it is."""
    found = []
    for (impl, phase, size), ms in bench.times.items():
        if "+ op" not in impl and impl != "heddle":
            continue
        shape = next(one for one in shapes if one["T"] * one["B"] + one["S"] == size)
        dense = bench.times.get(("cudnn", phase, size), float("inf"))
        found.append(
            f"{impl:36} {phase:7} {shape['B']} x {shape['T']}: {ms:.4f} ms, dense {dense:.4f}, ratio {dense / ms:.2f}"
        )
    return found


def warm(shapes: Sequence[Shape], index: int, workers: int) -> None:
    """Compiles every `workers`th router, and the op, into the caches on disk."""
    cases = [(shape, kind) for shape in shapes for kind, compiled in forms().values() if compiled]
    for shape, kind in cases[index::workers]:
        sides = made(shape, kind)
        for call in calls_of(sides, router_of(sides, compiled=True)).values():
            call()
