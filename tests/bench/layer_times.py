"""One call on a GPU machine: layers that no other script times, beside `attention` of equal width, at 8 x 4,096 in bfloat16.

    python tests/bench/layer_times.py --out "$OUT" --budget 90 --commit "$(git rev-parse --short=12 HEAD)"
    python tests/bench/layer_times.py --out /tmp/times --budget 60 --commit none --tiny

Forward and both directions of each, in training mode; `ratio` is the time over that of `attention` in the same run, both sides
for a layer that sees both. Rows go to evidence-layer-times.jsonl in `--out`. A layer that fails is told, the rest goes on, and
the script exits with 1. `--tiny` tries it on a CPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from gpu_check import Log
from head_sparse_check import DEVICE, HALF, mixer_of
from torch import Tensor

from heddle.compose.cache import Call
from heddle.kernels.bench import machine, timed
from heddle.kernels.op import watch_paths
from heddle.specs import MIXERS


def layers(heads: int, size: int) -> dict[str, dict[str, Any]]:
    """The mixers; an image is 64 tokens wide, or 4."""
    side, pool, full = max(4, size // 2), {"kind": "gated_pool"}, {"kind": "attention"}
    rope = {"theta": 10000.0}
    latent = {"kv_lora_rank": 4 * size, "qk_nope_head_dim": size, "qk_rope_head_dim": size // 2, "rope": rope}
    grid = {"width": side, "column_window": 4, "row_window": 4}
    kinds: dict[str, dict[str, Any]] = {
        "attention": full, "attention, both sides": {**full, "causal": False},
        "mla": {"kind": "mla", **latent}, "gated_pool": pool, "inline": {"kind": "inline"},
        "inline, both sides": {"kind": "inline", "causal": False},
        "hierarchical_attention": {"kind": "hierarchical_attention"},
        "attention, grid": {**full, "causal": False, "grid": grid},
        "attention, grid, inward": {**full, "causal": False, "grid": grid, "boundary": "inward"}, "contmix": {"kind": "contmix"},
        "contmix, grid": {"kind": "contmix", "taps": 5, "summaries": 2, "grid": {"width": side, "small_taps": 3}},
        "ttt, mlp": {"kind": "ttt", "chunk": 4 * size}, "still": {"kind": "still", "chunk": max(8, size // 2)},
        **{f"rf_attention, {score}": {"kind": "rf_attention", "score": score} for score in ("softmax", "relu_norm", "relu")},
    }  # fmt: skip
    return {name: {**fields, "heads": heads} for name, fields in kinds.items()}


def row_of(fields: dict[str, Any], batch: int, tokens: int, width: int) -> dict[str, Any]:
    """Milliseconds of both phases, and which code ran."""
    layer = mixer_of(width, fields)
    x = torch.randn(batch, tokens, width, device=DEVICE, dtype=HALF, requires_grad=True)
    places = torch.arange(tokens, device=DEVICE).expand(batch, -1)
    wanted, upstream = [x, *(one for one in layer.parameters() if one.requires_grad)], torch.randn_like(x)

    def forward() -> Tensor:
        with torch.no_grad():
            return layer(x, Call(places))  # type: ignore[no-any-return]

    def both() -> object:
        return torch.autograd.grad(layer(x, Call(places)), wanted, upstream, allow_unused=True)

    with watch_paths() as seen:
        both()
    paths = sorted({f"{name}: {path}" for name, path in seen})
    return {"paths": paths, "fwd": timed(forward, DEVICE), "fwdbwd": timed(both, DEVICE)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the log and the rows")
    parser.add_argument("--budget", type=float, default=90.0, help="seconds after which no layer is begun")
    parser.add_argument("--commit", default=None, help="what the code is")
    parser.add_argument("--tiny", action="store_true", help="small, on a CPU")
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    log, begin, beside = Log(chosen.out / "layer_times.log"), time.monotonic(), dict[str, dict[str, Any]]()
    heads, size, batch, tokens = (2, 16, 2, 64) if chosen.tiny else (16, 128, 8, 4096)
    header = {**machine(DEVICE), "commit": chosen.commit, "op": "layers", "dtype": str(HALF)[6:]}
    shape = {"B": batch, "T": tokens, "D": heads * size}
    for name, fields in layers(heads, size).items():
        if time.monotonic() - begin > chosen.budget:
            log(f"none  {name}: the time is over")
            continue
        try:
            found = row_of(fields, batch, tokens, heads * size)
        except Exception as error:
            log.wrong.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[-300:]}")
            continue
        beside[name] = found
        is_causal = MIXERS[fields["kind"]].model_validate(fields).is_causal
        base = beside.get("attention" if is_causal else "attention, both sides")
        for phase in ("fwd", "fwdbwd"):
            told = {
                "impl": f"layer, {name}",
                "phase": phase,
                "shape": shape,
                "mixer": fields,
                "paths": found["paths"],
            }
            ratio = found[phase]["ms"] / base[phase]["ms"] if base else float("nan")
            told |= {**found[phase], "ratio": ratio if base else None}
            with (chosen.out / "evidence-layer-times.jsonl").open("a") as file:
                file.write(json.dumps({**header, **told}) + "\n")
            log(
                f"{name:26} {phase:7} {told['ms']:9.3f} ms {ratio:6.2f} of attention  {', '.join(found['paths'])}"
            )
    for line in (*log.wrong, f"{len(log.wrong)} wrong, {time.monotonic() - begin:.0f} s"):
        log(line)
    return 1 if log.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
