"""What issue 5 asks of the speed of sparse, routed and token-hybrid attention, line by line: for `sparse_table.py`.

A line names the rows that answer it: file, op, phase, the sizes that a shape must have, ours (the times of several are added) and
what they stand beside. Where newer runs time the same as one call, `instead` is its name. As long as no run has a line it is told
as not timed, or left out if it is `told_once_timed`. `limit` says what bounds the ratio and stands whatever the row; what is so
of the code of one commit alone stands in `noted` under that commit, and goes by itself when a newer run has the line.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

# What a copy of the bytes that must be read takes, which rows of a step hold beside their own time.
FLOOR = "floor_ms"
NAMES = {
    FLOOR: "copy of the bytes",
    "cudnn": "dense, cuDNN",
    "cudnn, graph": "dense, cuDNN, in a graph",
    "dense": "dense",
    "fla": "fla",
    "flex": "FlexAttention",
    "all full": "all full",
    "layer, dense": "dense layer",
}
PHASES = {"fwd": "forward", "fwdbwd": "forward + backward"}


@dataclass(frozen=True, slots=True)
class Line:
    """One ratio: the rival's time over ours, or where it is `at_most` ours over the rival's."""

    what: str
    size: str
    file: str
    op: str
    phase: str
    shape: Mapping[str, int]
    rival: str
    ours: tuple[str, ...] = ("heddle",)
    instead: str | None = None
    told_once_timed: bool = False
    goal: float | None = None
    at_most: bool = False
    limit: str = ""
    noted: Mapping[str, str] = field(default_factory=dict)


CACHE = "loads from the L2 cache: each query reads its own blocks"
PRODUCTS = "products of the tensor cores"
ROUTER, HOST = "the router, some 35 small operations", "which the host starts one at a time"
# Router and op in one call, as routed_heads.py names them.
ROUTED = {
    "in a CUDA graph": "router + op, graph",
    "compiled": "router, compiled + op",
    "compiled, in a CUDA graph": "router, compiled + op, graph",
}
SEVEN = "the backward pass makes seven products where five would do"


def blocks() -> list[Line]:
    """Lists given: beside dense attention, and beside fla's kernel with the same lists."""
    lists = {64: "shared by 64 queries", 1: "of each query"}
    sizes = {"H": 32, "N": 2, "K": 128, "block": 64}
    file, op = "evidence-block-attention", "block_attention"
    cases = (
        ("1 × 131,072", {"T": 131072, "L": 64}, "fwd", ("cudnn", 8.0)),
        ("1 × 65,536", {"T": 65536, "L": 64}, "fwdbwd", ("cudnn", 4.0)),
        ("1 × 32,768", {"T": 32768, "L": 16}, "fwd", ("fla", 1.5)),
        ("1 × 32,768", {"T": 32768, "L": 16}, "fwdbwd", ("fla", 2.0)),
    )
    return [
        Line(
            f"{shape['L']} blocks of 64, lists {name}, {PHASES[phase]}",
            size,
            file,
            op,
            phase,
            {**sizes, **shape, "B": 1, "shared": shared},
            rival,
            goal=goal,
            limit=CACHE if shared == 1 else PRODUCTS if phase == "fwd" else SEVEN,
        )
        for size, shape, phase, (rival, goal) in cases
        for shared, name in lists.items()
    ]


def chosen() -> list[Line]:
    """Blocks that are chosen in the time that is told, for a prompt and in a step."""
    scores = {"mean": "block means", "kernels": "kernels (InfLLM-V2)"}
    sizes = {"H": 32, "N": 2, "block": 64, "count": 64}
    file, op = "evidence-selection", "selection"
    step = Line("", "batch 32, 128 K", file, op, "", {**sizes, "B": 32}, FLOOR, goal=1.5, at_most=True)
    prompt = Line("", "1 × 131,072", file, op, "prompt", {**sizes, "B": 1, "T": 131072}, "dense", goal=5.0)
    return [
        *(
            replace(
                prompt,
                what=f"64 blocks of 64 chosen by {name}, forward",
                ours=(f"choice and attention, {score}",),
                limit="attention of lists of each query (above), which alone is under 5, and the choice",
            )
            for score, name in scores.items()
        ),
        *(
            replace(
                step,
                what=f"a step, attention alone, {name}",
                phase=f"{score} step graph",
                ours=("attention alone",),
                limit="not profiled; each list is read in two parts",
            )
            for score, name in scores.items()
        ),
        *(
            replace(
                step,
                what=f"a step with the choice by {name}",
                phase=f"{score} step graph",
                ours=("cached means",),
                limit="the choice, which takes longer than its bytes",
            )
            for score, name in scores.items()
        ),
    ]


def windows() -> list[Line]:
    file, op = "evidence-window-attention", "sliding_window_attention"
    tiles = "Triton's products of tiles of 64 × 64"
    return [
        Line(
            f"window of 512, 16 heads, {PHASES[phase]}",
            f"{batch} × {length:,}",
            file,
            op,
            phase,
            {"B": batch, "T": length, "N": 16, "K": 128, "window": 512, "sinks": 0},
            "flex",
            goal=1.3,
            limit=tiles if phase == "fwd" else f"{tiles}; {SEVEN}",
        )
        for batch, length in ((8, 4096), (1, 131072))
        for phase in PHASES
    ]


def alone_of(batch: int, phase: str) -> Mapping[str, str]:
    """Where no router could keep MoH's goal, as the op is at a commit."""
    return {"3405f4632579": "the op alone is under the goal"} if batch == 8 or phase == "fwdbwd" else {}


def heads() -> list[Line]:
    """MoH: the op with its router, alone, and the whole layer."""
    found = []
    for batch, length in ((8, 4096), (1, 32768)):
        shape = {"B": batch, "T": length, "H": 16, "N": 16, "K": 128, "active": 8}
        file, op = "evidence-head-sparse-attention", "head_sparse_attention"
        line = Line("", f"{batch} × {length:,}", file, op, "", shape, "cudnn")
        for phase, name in PHASES.items():
            both = replace(line, phase=phase, ours=("heddle", "router"), goal=1.6, limit=f"{ROUTER}, {HOST}")
            both = replace(both, noted=alone_of(batch, phase))
            told = f"MoH, 8 of 16 heads, with its router, {name}"
            found.append(replace(both, what=told, instead="router + op"))
        for (form, ours), (phase, name) in itertools.product(ROUTED.items(), PHASES.items()):
            limit = "the router" if "compiled" in form else ROUTER
            routed = replace(line, phase=phase, ours=(ours,), goal=1.6, limit=limit, told_once_timed=True)
            routed = replace(routed, noted=alone_of(batch, phase))
            dense = "cudnn, graph" if ours.endswith("graph") else "cudnn"
            found.append(replace(routed, what=f"with its router {form}, {name}", rival=dense))
        for phase, name in PHASES.items():
            limit = "products, and masked tiles of keys" if phase == "fwd" else SEVEN
            found.append(replace(line, what=f"without its router, {name}", phase=phase, limit=limit))
        layer = replace(line, shape={**shape, "hidden": 2048}, ours=("layer, moh",), rival="layer, dense")
        for phase, name in PHASES.items():
            limit = "projections and rotation of all heads, the router"
            found.append(replace(layer, what=f"the whole layer, {name}", phase=phase, limit=limit))
    return found


def landmarks() -> list[Line]:
    limits = {
        1: "the choice, which each program makes again, and the start of two launches",
        16: "the bytes of the blocks",
    }
    return [
        Line(
            "Landmark, 32 of 2,048 blocks of 64, a step",
            f"batch {batch}, 128 K",
            "evidence-landmark",
            "landmark_attention",
            "decode_graph",
            {"B": batch, "S": 131072, "H": 32, "N": 8, "block": 64, "top": 32},
            "cudnn",
            ours=("heddle, fused",),
            goal=8.0,
            limit=limit,
        )
        for batch, limit in limits.items()
    ]


def nats_l() -> list[Line]:
    prefill = Line(
        "NAtS-L, 6 Gated DeltaNet and 12 softmax heads, a prompt",
        "1 × 131,072",
        "evidence-layers",
        "layers",
        "nats_l prefill",
        {"B": 1, "T": 131072},
        "dense",
        goal=3.0,
        limit="products behind gates, at no more than cuDNN's speed",
        noted={"19a233cded63": "its gates have other kernels since"},
    )
    alone = replace(prefill, what="Gated DeltaNet alone, a prompt", ours=("gated_deltanet",), goal=None)
    return [prefill, replace(alone, limit="projections, the recurrence, and passes between them", noted={})]


def reuse() -> list[Line]:
    """HyLRA's layers, and Flux."""
    stack = Line("", "", "evidence-layers", "layers", "", {}, "all full", ours=("full, choose, 2 reuse",))
    step = replace(stack, size="batch 8, 64 K", phase="hylra step", shape={"B": 8, "S": 65536}, goal=1.46)
    prompt = replace(stack, size="1 × 65,536", phase="hylra prefill", shape={"B": 1, "T": 65536})
    return [
        replace(
            step,
            what="HyLRA, one full, one chooses, two reuse, a step",
            limit="the layer that reads all keys; no reuse could give more than 4",
        ),
        replace(prompt, what="the same, a prompt", limit="dense in the method"),
    ]


def flux() -> list[Line]:
    told = "Flux, every second layer a window"
    prompt = Line(
        f"{told}, a prompt (paper, at 256 K: 2.8)",
        "1 × 131,072",
        "evidence-layers",
        "layers",
        "flux prefill",
        {"B": 1, "T": 131072},
        "all full",
        ours=("half windows",),
        limit="half of the layers read all keys, so 2 is the most",
        noted={"ab791819b151": "windows of 2,176 in the place of 128 sinks and 2,048"},
    )
    step = replace(prompt, what=f"{told}, a step (paper, at 256 K: 2.0)", size="batch 1, 128 K")
    return [prompt, replace(step, phase="flux step", shape={"B": 1, "S": 131072})]


def lines() -> list[Line]:
    """In the issue's order."""
    given, picked = blocks(), chosen()
    return [
        *given[:2], *picked[:2], *given[2:4], *picked[2:], *given[4:],
        *windows(), *heads(), *landmarks(), *nats_l(), *reuse(), *flux(),
    ]  # fmt: skip
