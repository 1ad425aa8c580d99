"""In how many steps conjugate gradients give local_linear_attention within its bound; on a CPU, in seconds.

    python tests/bench/lla_steps.py --commit "$(git rev-parse --short=12 HEAD)" --out tests/bench/results

The solve of the kernels in plain torch, all keys at once, operands of products rounded as theirs are: to the dtype once, or in
two parts. Appends rows to evidence-lla-steps.jsonl: the residual asked for, steps taken, error and bound.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path

import torch
from torch import Tensor

from heddle.kernels.accuracy import EPSILON, worst_error
from heddle.kernels.local_linear_attention import local_linear_attention, local_linear_attention_reference

SIZE, TOKENS, MOST = 64, 200, 256


def rounded(x: Tensor, dtype: torch.dtype, parts: int) -> Tensor:
    """A float32 tensor as the sum of so many numbers of the dtype."""
    total = torch.zeros_like(x)
    for _ in range(parts):
        total = total + (x - total).to(dtype).float()
    return total


def solved(
    q: Tensor, k: Tensor, v: Tensor, *, ridge: float, tolerance: float, parts: int
) -> tuple[Tensor, int]:
    """The output in the dtype of the inputs, and the steps until all rows had stopped."""
    dtype, (q, k, v) = v.dtype, (x.float() for x in (q, k, v))
    seen = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    p = torch.softmax((q @ k.mT * SIZE**-0.5).masked_fill(~seen, -torch.inf), dim=-1)
    mean = rounded(p, dtype, parts) @ k
    x, rest = torch.zeros_like(q), q - mean
    along, size = rest, rest.square().sum(-1, keepdim=True)
    enough, steps = size * tolerance**2, 0
    while steps < MOST and bool((size > enough).any()):
        length = along.norm(dim=-1, keepdim=True).clamp_min(1e-30)
        unit = rounded(along / length, dtype, parts)
        a = unit @ k.mT - (unit * mean).sum(-1, keepdim=True)
        spread = length * (rounded(p * a, dtype, parts) @ k) + ridge * along
        is_open = size > enough
        far = torch.where(is_open, size / (along * spread).sum(-1, keepdim=True), 0.0)
        x, rest = x + far * along, rest - far * spread
        left = torch.where(is_open, rest.square().sum(-1, keepdim=True), 0.0)
        along = torch.where(is_open, rest + left / size * along, 0.0)
        size, steps = left, steps + 1
    slope = rounded(x, dtype, parts)
    a = slope @ k.mT - (slope * mean).sum(-1, keepdim=True)
    return (rounded(p * (1 + a), dtype, parts) @ v).to(dtype), steps


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the rows")
    parser.add_argument("--commit", help="what the code is")
    chosen = parser.parse_args()
    made = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "commit": chosen.commit}
    for dtype, ridge in itertools.product(EPSILON, (10.0, 1.0, 0.1)):
        if dtype == torch.float64:
            continue
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, 2, TOKENS, SIZE).to(dtype) for _ in range(3))
        exact = local_linear_attention_reference(q, k, v, ridge=ridge).transpose(1, 2)
        plain = local_linear_attention(q, k, v, ridge=ridge).transpose(1, 2)
        bound = 2 * worst_error(plain, exact, timed=True)[0] + EPSILON[dtype]
        for parts, tolerance in itertools.product(
            (1,) if dtype == torch.float32 else (1, 2), (1e-3, 1e-4, 1e-6)
        ):
            found, steps = solved(q, k, v, ridge=ridge, tolerance=tolerance, parts=parts)
            error = worst_error(found.transpose(1, 2), exact, timed=True)[0]
            about = {
                "dtype": str(dtype).removeprefix("torch."),
                "ridge": ridge,
                "parts": parts,
                "residual": tolerance,
            }
            row = {**made, "op": "local_linear_attention", "d": SIZE, "T": TOKENS, **about, "steps": steps}
            row |= {"error": error, "bound": bound}
            with (chosen.out / "evidence-lla-steps.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(*about.values(), steps, f"{error:.1e} of {bound:.1e}", flush=True)


if __name__ == "__main__":
    main()
