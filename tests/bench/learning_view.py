"""How many answers of `learning_check.py` are in view of random blocks and of a window: what no training can exceed.

    python tests/bench/learning_view.py --out tests/bench/results --commit "$(git rev-parse --short=12 HEAD)"
    python tests/bench/learning_view.py --out /tmp/view --commit none --tiny

An answer is in view where the block of its pair is read by a head of its query, blocks drawn as those of the control are, or
where the pair is in the window that `liger` has there. Nothing is trained; a row of each goes to evidence-selecting.jsonl in
`--out`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from learning_check import GAP_POWER, ROWS, TINY, WHOLE, Sizes, net_of
from torch import Tensor

from heddle.compose.cache import Call
from heddle.kernels.bench import machine
from heddle.specs import spec_hash

# Sequences whose blocks are drawn at once.
PART = 32


def answers(sizes: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    """The sequence, the place and the key's place of each label of the held-out examples.  Shapes:  [labels], three times"""
    task = sizes.task()
    inputs, targets = task.held_out("cpu")
    row, place = (targets != -100).nonzero(as_tuple=True)
    return row, place, place - task.reach(inputs)[row, place]


@torch.no_grad()
def in_random_blocks(sizes: Sizes) -> Tensor:
    """Whether any head reads the block of the pair.  Shapes:  out: [labels] bool"""
    row, place, key = answers(sizes)
    torch.manual_seed(0)
    mixer, told = net_of(sizes, "random", 0, "cpu").model.layer_at(1).mixer, []
    for begin in range(0, int(row.max()) + 1, PART):
        mine = (row >= begin) & (row < begin + PART)
        q = torch.empty(PART, sizes.heads, sizes.length, 1)
        _, chosen = mixer._choice(q, q, None, Call(torch.arange(sizes.length)[None]))
        told.append(chosen.any(1)[row[mine] - begin, place[mine], key[mine] // sizes.block])
    return torch.cat(told)


def in_window(sizes: Sizes) -> Tensor:
    """Whether the pair is in a window of as many tokens as blocks are visible.  Shapes:  out: [labels] bool"""
    _, place, key = answers(sizes)
    return place - key < sizes.block * sizes.count


def rows(sizes: Sizes, commit: str | None) -> Iterator[dict[str, Any]]:
    for kind, of, seen in (
        ("random, in view", "random", in_random_blocks(sizes)),
        ("window, in view", "liger", in_window(sizes)),
    ):
        share = float(seen.float().mean())
        yield {
            "commit": commit,
            "device": "cpu",
            "run": machine(torch.device("cpu"))["run"],
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "task": "mqar",
            "spec_hash": spec_hash(sizes.model(of)),
            "kind": kind,
            "chance": sizes.task().chance,
            "gap_power": GAP_POWER,
            "score": share,
            "se": sqrt(share * (1 - share) / len(seen)),
        }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the rows")
    parser.add_argument("--commit", help="what the code is")
    parser.add_argument("--tiny", action="store_true", help="small sizes")
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    with (chosen.out / ROWS.name).open("a") as file:
        for row in rows(TINY if chosen.tiny else WHOLE, chosen.commit):
            file.write(json.dumps(row) + "\n")
            print(f"{row['kind']:18} {row['score']:.4f} of the answers, ± {row['se']:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
