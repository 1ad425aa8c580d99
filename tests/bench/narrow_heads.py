"""Forces chunks of 64 where states are narrow, and shows what comes out; needs a Hopper GPU.

    python tests/bench/narrow_heads.py --out rows.jsonl --commit "$(git rev-parse --short=12 HEAD)"
    TRITON_PTXAS_PATH=/usr/local/cuda/bin/ptxas TRITON_CACHE_DIR=/tmp/other python tests/bench/narrow_heads.py --out rows.jsonl

The evidence of docs/decisions/0005-ragged-heads.md. A row says which ptxas compiled, and at which level.
"""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from triton import knobs

from heddle.kernels import decay_attention
from heddle.kernels._decay_attention_fwd import launch_forward, tuning
from heddle.kernels.accuracy import draw
from heddle.kernels.bench import machine
from heddle.kernels.configs.decay_attention import Launch
from heddle.kernels.decay_attention import decay_attention_reference

CHUNKS_OF_64 = Launch(chunk=64, columns=64, warps=4, stages=2)
SCALE, LENGTH, CHUNK = 0.5, 200, 64
# Heads, K, V, and how many elements heads lie apart beyond their own size. The last one may end the process's CUDA context.
CASES = (
    (2, 40, 24, 0), (2, 40, 24, 8), (2, 64, 32, 0), (2, 64, 32, 8), (2, 64, 16, 8), (2, 40, 40, 0), (2, 64, 64, 8),
    (16, 64, 32, 8), (16, 40, 24, 0),
)  # fmt: skip
WRONG = 0.02


def one(H: int, K: int, V: int, gap: int, launch: Launch | None, dtype: torch.dtype) -> dict[str, Any]:
    """Relative errors of one forward: per chunk of the output, and of the final state."""
    given = draw(decay_attention, {"B": 1, "H": H, "K": K, "V": V, "T": LENGTH}, dtype).arguments
    exact = decay_attention_reference(**given, scale=SCALE)
    there = {name: x.cuda() for name, x in given.items()}
    q, k, v = (pad(there[name], (0, gap))[..., : there[name].shape[-1]] for name in ("q", "k", "v"))
    state = there["initial_state"].float()
    about = {"H": H, "K": K, "V": V, "head_strides": [K + gap, V + gap], "dtype": str(dtype)[6:]}
    about["launch"] = "table" if launch is None else asdict(launch)
    try:
        with nullcontext() if launch is None else tuning(output=launch):
            found = launch_forward(q, k, v, there["log_decay"], SCALE, state, None)
        torch.cuda.synchronize()
    except torch.AcceleratorError as error:
        return about | {"out": None, "final_state": None, "wrong": True, "error": str(error).splitlines()[0]}
    chunks = [_error(found[0][:, t : t + CHUNK], exact[0][:, t : t + CHUNK]) for t in range(0, LENGTH, CHUNK)]
    final = _error(found[1], exact[1])
    wrong = not max(*chunks, final) <= WRONG
    return about | {"out": chunks, "final_state": final, "wrong": wrong, "error": None}


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.double().cpu() - exact).norm() / exact.norm())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="file the rows are appended to")
    parser.add_argument("--commit", help="what the code is, where git cannot tell")
    chosen = parser.parse_args()
    header = machine(torch.device("cuda"))
    header["commit"] = header["commit"] or chosen.commit
    header |= {"ptxas": knobs.nvidia.ptxas.version, "optimised": not knobs.nvidia.disable_ptxas_opt}
    with chosen.out.open("a") as file:
        for launch in (None, CHUNKS_OF_64):
            for H, K, V, gap in CASES:
                for dtype in (torch.bfloat16,) if launch else (torch.bfloat16, torch.float16):
                    row = header | one(H, K, V, gap, launch, dtype)
                    file.write(json.dumps(row) + "\n")
                    file.flush()
                    told = {
                        name: row[name]
                        for name in ("ptxas", "optimised", "H", "K", "V", "head_strides", "dtype")
                    }
                    kind = "table" if launch is None else "chunks of 64"
                    print("WRONG" if row["wrong"] else "ok", kind, told, row["error"] or "", flush=True)


if __name__ == "__main__":
    main()
