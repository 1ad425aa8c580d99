"""One call on a GPU machine: the peak of memory of attention ops and whole layers at 65,536 tokens, in both directions.

    python tests/bench/peak_memory.py --out "$OUT" --budget 150 --commit "$(git rev-parse --short=12 HEAD)"
    python tests/bench/peak_memory.py --out /tmp/peaks --budget 60 --commit none --tiny

Each op of attention at the head sizes of its benchmark, and a layer of each mixer that selects, routes, splits or leaves out,
in bfloat16 and training mode. `peak_bytes` is the allocator's peak over forward and backward, above what was there before: the
inputs and the gradient of the output (`held_bytes`). `tensor_bytes` are inputs, outputs and gradients, of a layer with its
parameters and theirs.
The goal is a peak, with what was there before, of at most 4 times those: a mask of all pairs alone would break it. It is held
warm, in the second call, and on the path that models take.

Every part is a process of its own, `--workers` at once; what found no memory beside others runs again alone, and what fails has
a row with its error. The peaks of timings and of training steps are `memory_check.py`'s. Rows go to evidence-peak-memory.jsonl in
`--out`; the table comes last. Exits with 1 if a part misses the goal or fails. `--tiny` tries the script itself on a CPU, which
counts nothing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from head_sparse_check import mixer_of
from torch import Tensor

from heddle.compose.cache import Call
from heddle.kernels.accuracy import draw
from heddle.kernels.bench import machine
from heddle.kernels.op import watch_paths

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
HALF = torch.bfloat16 if ON_GPU else torch.float32
GOAL = 4.0
# What ops take as numbers, of the letters of their shapes.
NUMBERS = ("block", "window", "sinks", "chunk", "keep")
# A part that has not ended after so many seconds is ended.
LONGEST = 120.0
Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """Of all parts: tokens and width;  heads, key heads and head size;  block and count of blocks, clusters"""

    tokens: int
    width: int
    heads: tuple[int, int]
    head_dim: int
    block: int
    count: int
    clusters: int

    def ops(self) -> dict[str, tuple[str, Row]]:
        """Of each part the op, and the letters of its shape."""
        H, N = self.heads
        long = {"B": 1, "T": self.tokens, "S": self.tokens, "K": self.head_dim, "V": self.head_dim}
        blocks = {**long, "H": 2 * H, "N": N, "block": self.block, "L": self.count}
        return {
            "dense_attention": ("dense_attention", {**long, "H": H, "N": H}),
            "sliding_window_attention": (
                "sliding_window_attention", {**long, "H": H, "N": H, "window": 8 * self.block, "sinks": 0}
            ),
            "block_attention, shared lists": ("block_attention", {**blocks, "shared": self.block}),
            "block_attention, own lists": ("block_attention", {**blocks, "shared": 1}),
            "landmark_attention": ("landmark_attention", {**long, "H": 2 * H, "N": 4 * N, "block": self.block}),
            "head_sparse_attention": ("head_sparse_attention", {**long, "H": H, "N": H, "active": H // 2}),
            "routed_delta_rule": (
                "routed_delta_rule", {**long, "H": max(1, 3 * H // 8), "V": 2 * self.head_dim, "chunk": self.block}
            ),
            "token_split_attention": (
                "token_split_attention",
                {**long, "H": 2 * H, "N": 4 * N, "F": 2 * self.head_dim, "chunk": self.block, "keep": self.block // 16 or 1},
            ),
        }  # fmt: skip

    def layers(self) -> dict[str, Row]:
        """The mixer of each part."""
        H, N = self.heads
        full = {"kind": "attention", "heads": H, "kv_heads": N}
        chosen = {"block": self.block, "count": self.count, "sink": 1, "recent": min(4, self.count - 1)}
        window, both = 8 * self.block, {**full, "causal": False, "boundary": "inward"}
        near, taught = {**full, "window": window}, {**chosen, "distillation": 0.1}
        memory = {"kind": "ttt", "heads": H, "chunk": window, "rate": 0.01, "scale": 0.01}
        by_matrix = {**memory, "memory": "linear", "loss": "l2", "rate": 0.05}
        kinds: dict[str, Row] = {
            "attention": full,
            "attention, window": near,
            "attention, chosen blocks": {**full, "selection": chosen},
            "attention, blocks by kernels": {**full, "selection": {**chosen, "scores": "kernels"}},
            "attention, blocks by a loss": {**full, "selection": taught},
            "attention, blocks by kernels, by a loss": {**full, "selection": {**taught, "scores": "kernels"}},
            "attention, inward window": {**both, "window": self.block},
            "attention, grid": {**both, "grid": {"width": 4 * self.block, "row_window": 4, "column_window": 4}},
            "attention, sink tokens": {**full, "window": window, "sink_tokens": 2 * self.block},
            "attention, soft-cap and sinks": {**full, "softcap": 50.0, "sinks": True},
            "landmark": {"kind": "landmark", "heads": H, "kv_heads": N, "block": self.block},
            "moh": {"kind": "moh", "mixer": {"kind": "attention", "heads": H}, "shared_heads": H // 4, "active": H // 4},
            "nats_l": {"kind": "nats_l", "heads": H, "chunk": self.block},
            "still": {"kind": "still", "heads": H, "kv_heads": N, "chunk": self.block},
            "liger": {"kind": "liger", "heads": H, "kv_heads": N, "window": self.block},
            "mla": {
                "kind": "mla", "heads": H, "kv_lora_rank": 4 * self.head_dim, "qk_nope_head_dim": self.head_dim,
                "qk_rope_head_dim": self.head_dim // 2, "rope": {"theta": 10000.0},
            },
            "routing": {"kind": "routing", "heads": H, "clusters": self.clusters},
            "contmix": {"kind": "contmix", "heads": H},
            "contmix, grid": {"kind": "contmix", "heads": H, "taps": 7, "summaries": 7, "grid": {"width": 4 * self.block}},
            "window and ttt": {"kind": "parallel", "mixers": [near, memory]},
            "window and ttt, linear": {"kind": "parallel", "mixers": [near, by_matrix]},
            "layer_router": {"kind": "layer_router", "mixers": [full, near], "straight_through": True},
            "token_router": {
                "kind": "token_router", "mixers": [full, {"kind": "gated_deltanet", "heads": H}], "chunk": self.block,
            },
        }  # fmt: skip
        return {f"layer, {name}": mixer for name, mixer in kinds.items()}

    def parts(self) -> list[str]:
        return [*self.ops(), *self.layers()]


WHOLE = Sizes(65_536, 2048, (16, 2), 128, 64, 64, 512)
TINY = Sizes(256, 32, (4, 2), 8, 8, 4, 4)


def bytes_of(*tensors: Tensor | None) -> int:
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)


def op_call(sizes: Sizes, part: str) -> tuple[Callable[[], int], int, Row]:
    """Both directions of an op, which give the bytes of output and gradients; the bytes of its inputs; what it is."""
    name, shape = sizes.ops()[part]
    op = getattr(importlib.import_module(f"heddle.kernels.{name}"), name)
    sample = draw(op, shape, HALF, initial_state=False, device=DEVICE)
    rest = {letter: shape[letter] for letter in NUMBERS if letter in shape}
    given = {
        name: x.to(torch.int32 if name == "listed" else torch.int64) if name in ("listed", "start") else x
        for name, x in sample.arguments.items()
    }
    leaves = {
        name: x.detach().requires_grad_(name in op.cases.differentiable) if x.is_floating_point() else x
        for name, x in given.items()
    }
    wanted, upstream = [leaves[name] for name in op.cases.differentiable], sample.upstream[0]

    def call() -> int:
        out = op(**leaves, **rest)
        out = out[0] if isinstance(out, tuple) else out
        return bytes_of(out, *torch.autograd.grad(out, wanted, upstream))

    return call, bytes_of(*leaves.values(), upstream), {"op": name, "shape": shape}


def layer_call(sizes: Sizes, part: str) -> tuple[Callable[[], int], int, Row]:
    """The same of a whole layer, what it adds to the loss included."""
    fields = sizes.layers()[part]
    layer = mixer_of(sizes.width, fields)
    x = torch.randn(1, sizes.tokens, sizes.width, device=DEVICE, dtype=HALF, requires_grad=True)
    places = torch.arange(sizes.tokens, device=DEVICE)[None]
    upstream = torch.randn_like(x)
    wanted = [x, *(one for one in layer.parameters() if one.requires_grad)]

    def call() -> int:
        about = Call(places)
        y = layer(x, about)
        added = [value.float() for _, value, _ in about.losses if value.requires_grad]
        found = torch.autograd.grad(
            [y, *added], wanted, [upstream, *map(torch.ones_like, added)], allow_unused=True
        )
        return bytes_of(y, *found)

    shape = {"B": 1, "T": sizes.tokens, "D": sizes.width}
    return (
        call,
        bytes_of(upstream, *wanted, *layer.buffers()),
        {"op": "layers", "shape": shape, "mixer": fields},
    )


def measured(sizes: Sizes, part: str) -> Row:
    """The row of a part."""
    call, given, about = (op_call if part in sizes.ops() else layer_call)(sizes, part)
    told: Row = {**about, "impl": "heddle", "phase": "memory", "part": part, "dtype": str(HALF)[6:]}
    with watch_paths() as paths:
        call()
    told["paths"] = sorted({f"{name}: {path}" for name, path in paths})
    if not ON_GPU:
        return {**told, "peak_bytes": None, "held_bytes": None, "tensor_bytes": given + call()}
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    made = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - held
    return {**told, "peak_bytes": peak, "held_bytes": held, "tensor_bytes": given + made}


def apart(part: str, *, tiny: bool, until: float) -> Row:
    """The row that a process of its own has printed last, or one with its error."""
    seconds = min(LONGEST, until - time.monotonic())
    if seconds <= 0:
        return {"part": part, "error": "out of time"}
    command = [sys.executable, __file__, "--part", part, *(["--tiny"] if tiny else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return {"part": part, "error": f"not done after {seconds:.0f} s"}
    if done.returncode == 0:
        row: Row = json.loads(done.stdout.splitlines()[-1])
        return row
    last = " ".join(done.stderr.split())[-400:] or f"ended with {done.returncode}"
    return {"part": part, "error": last}


def all_parts(parts: list[str], *, tiny: bool, workers: int, until: float) -> Iterator[Row]:
    """A row of each part, as they come; last those again that found no memory beside others."""
    crowded = []
    with ThreadPoolExecutor(workers) as pool:
        for done in as_completed([pool.submit(apart, part, tiny=tiny, until=until) for part in parts]):
            row = done.result()
            if "out of memory" in row.get("error", "") and workers > 1:
                crowded.append(row["part"])
            else:
                yield row
    for part in crowded:
        yield apart(part, tiny=tiny, until=until)


def verdict(row: Row) -> str:
    if "error" in row:
        return "FAILED"
    if row["peak_bytes"] is None:
        return "not counted"
    return "kept" if row["peak_bytes"] + row["held_bytes"] <= GOAL * row["tensor_bytes"] else "MISSED"


def line_of(row: Row) -> str:
    if "error" in row:
        return f"{row['part']:32} {row['error'][-120:]}  FAILED"
    paths = ", ".join(row["paths"])
    if row["peak_bytes"] is None:
        return f"{row['part']:32} {row['tensor_bytes'] / 2**20:9.1f} MiB of tensors, not counted; {paths}"
    above, whole = (
        part / row["tensor_bytes"] for part in (row["peak_bytes"], row["peak_bytes"] + row["held_bytes"])
    )
    sizes = f"{row['tensor_bytes'] / 2**20:9.0f} {row['peak_bytes'] / 2**20:9.0f}"
    return f"{row['part']:32} {sizes} {above:6.2f} {whole:6.2f}  {verdict(row)}  {paths}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of the rows")
    parser.add_argument("--budget", type=float, default=150.0, help="seconds after which what runs is ended")
    parser.add_argument("--commit", help="what the code is")
    parser.add_argument("--workers", type=int, default=6, help="processes at once")
    parser.add_argument("--only", nargs="*", help="parts to run; all if not given")
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a CPU")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    sizes = TINY if chosen.tiny else WHOLE
    if chosen.part is not None:
        print(json.dumps(measured(sizes, chosen.part)))
        return 0
    begin, header = time.monotonic(), {**machine(DEVICE), "commit": chosen.commit}
    chosen.out.mkdir(parents=True, exist_ok=True)
    parts = [part for part in sizes.parts() if chosen.only is None or part in chosen.only]
    how = {"tiny": chosen.tiny, "workers": chosen.workers, "until": begin + chosen.budget}
    rows = []
    with (chosen.out / "evidence-peak-memory.jsonl").open("a") as file:
        for row in all_parts(parts, **how):
            rows.append(row)
            file.write(json.dumps({**header, **row}) + "\n")
            file.flush()
            print(line_of(row), flush=True)
    print(f"\n{'part':32} {'MiB':>9} {'peak':>9} {'above':>6} {'whole':>6}  goal: whole at most {GOAL:g}")
    print(*map(line_of, rows), sep="\n")
    bad = [row["part"] for row in rows if verdict(row) in ("FAILED", "MISSED")]
    print(f"{len(bad)} of {len(rows)} missed or failed, {time.monotonic() - begin:.0f} s: {', '.join(bad)}")
    return int(bool(bad) or not rows)


if __name__ == "__main__":
    sys.exit(main())
