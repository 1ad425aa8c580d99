"""What layers lose that take over each other's choice of keys: HyLRA's policy beside an even stride and random places.

    python tests/bench/reuse_check.py --out "$OUT" --budget 400 --commit "$(git rev-parse --short=12 HEAD)"
    python tests/bench/reuse_check.py --out /tmp/reuse --budget 100 --commit none --tiny

A model of twelve layers of softmax attention learns text and recall (MQAR, 32 pairs in 1,024 tokens, asked anywhere behind them)
by turns, a step of text and two of recall, once for each seed; the first two fifths of the recall are 4 pairs in 128 tokens.
Its profile (`heddle.search.evaluators.layer_profile`, on held-out text and recall) tells how far layers choose the same blocks;
the exact solver makes the policy of most overlap (`best_overlap`) with one full layer and so many resets (arXiv 2602.00777).
Beside it stand, with as many layers that are full, choose, and take over: `even`, the first full and choices at an even stride,
and `random`, the mean over draws. Blocks have 32 tokens and 8 of 32 are read, the first and the last among them, in every query
of prefill. `dense` and `choose`, where every layer chooses for itself, are the ends.

A row for each seed, number of resets and way goes to evidence-reuse.jsonl in `--out`: recall and bits per byte of all held-out
examples. The table has means over seeds with 95 % intervals (Student's t); a way's is of its difference from `dense`.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from math import sqrt
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from learning_check import begun_easily
from torch import Tensor

from heddle.compose.build import build_causal_lm
from heddle.compose.hf.model import HeddleForCausalLM
from heddle.compose.train import Batches, Recipe, fit
from heddle.search.environment import device_name, pick_device
from heddle.search.evaluators.layer_profile import Blocks, layer_profile
from heddle.search.placement.reuse import Policy, Profile, Role, best_overlap
from heddle.search.reuse_policy import with_policy
from heddle.search.tasks import Mqar, Task, batches, make_task
from heddle.specs import ModelSpec, Spec, TextTask, loads

ROWS = "evidence-reuse.jsonl"
# Recall begins with so many times fewer pairs and tokens.
EASIER = 8
# Student's t of 95 % by the number of seeds.
T_95 = {2: 12.71, 3: 4.303}


@dataclass(frozen=True)
class Sizes:
    layers: int
    width: int
    length: int
    pairs: int
    blocks: Blocks
    resets: tuple[int, ...]
    tokens: int
    batch_tokens: int
    seeds: tuple[int, ...]
    draws: int
    profiled: int

    def model(self) -> ModelSpec:
        return self._spec().model

    def _spec(self) -> Spec:
        return loads(
            f"""
            version: 1
            name: reuse
            model:
              vocab_size: 256
              hidden_size: {self.width}
              blocks: {{full: {{mixer: {{kind: attention, heads: 4, kv_heads: 2}}, channel: {{kind: swiglu}}}}}}
              layers: [{{repeat: {self.layers}, pattern: [full]}}]
            tokenizer: bytes
            data: {{source: python-stdlib, sequence_length: {self.length}}}
            """
        ).spec

    def tasks(self) -> tuple[Task, Mqar]:
        spec = self._spec()
        text = make_task(TextTask(), spec.data, vocab_size=256, tokenizer=spec.tokenizer)
        return text, self.recall()

    def recall(self, by: int = 1) -> Mqar:
        """Recall with a share of the pairs in the same share of the length."""
        return Mqar(vocab_size=256, pairs=self.pairs // by, length=self.length // by, gap_power=1.0)

    def recipe(self, seed: int) -> Recipe:
        return Recipe(self.tokens, self.batch_tokens, learning_rate=1e-3, seed=seed)


WHOLE = Sizes(
    12, 256, 1024, 32, Blocks(32, 8, 32, 32), (2, 3, 4), 64_000_000, 16_384, (0, 1, 2), draws=5, profiled=4
)
TINY = Sizes(4, 32, 64, 8, Blocks(8, 3, 8, 8), (2,), 4096, 256, (0, 1), draws=2, profiled=1)


def by_turns(text: Batches, recall: Batches) -> Batches:
    """Text in every third step, recall in the others."""
    return lambda step: (recall if step % 3 else text)(step)


def trained(sizes: Sizes, seed: int, device: str) -> HeddleForCausalLM:
    text, recall = sizes.tasks()
    recipe = sizes.recipe(seed)
    net = build_causal_lm(sizes.model(), seed=seed, device=device)
    easy, full = (batches(task, recipe, device) for task in (sizes.recall(EASIER), recall))
    steps = max(1, round(recipe.tokens / recipe.batch_tokens))
    turns = by_turns(batches(text, recipe, device), begun_easily(easy, full, steps))
    fit(net, turns, recipe, launch="graph" if device == "cuda" else "eager")
    net.eval()
    return net


def solved(net: HeddleForCausalLM, sizes: Sizes, device: str) -> Profile:
    """The profile with its most fragile layer full."""
    held = [task.held_out(device)[0][: sizes.profiled] for task in sizes.tasks()]
    places = np.linspace(sizes.length // 2, sizes.length - 1, 16).astype(int).tolist()
    told = layer_profile(net, torch.cat(held), places, sizes.blocks)
    fragile = max(range(sizes.layers), key=told.coverage.__getitem__)
    return Profile(np.array(told.overlap), frozenset([fragile]))


def ways(profile: Profile, resets: int, draws: int) -> Iterator[tuple[str, Policy]]:
    """The solver's policy, and others with as many layers of each role."""
    best = best_overlap(profile, resets)
    yield "solver", best
    full, lists, length = best.roles.count("full"), best.lists, profile.length
    yield (
        "even",
        placed(profile, range(full), np.linspace(full, length, lists, endpoint=False).astype(int).tolist()),
    )
    for draw in range(draws):
        yield f"random {draw}", drawn(profile, full, lists, random.Random(f"{resets} {draw}"))


def drawn(profile: Profile, full: int, lists: int, rng: random.Random) -> Policy:
    """Places drawn again until a choice stands before every layer that takes one over."""
    while True:
        order = rng.sample(range(profile.length), full + lists)
        reads, chooses = order[:full], order[full:]
        before = [layer for layer in range(min(chooses)) if layer not in reads]
        if not before:
            return placed(profile, reads, chooses)


def placed(profile: Profile, reads: Sequence[int], chooses: Sequence[int]) -> Policy:
    """The policy of given places; the others take over the nearest choice before them."""
    roles: list[Role] = ["reuse"] * profile.length
    for layer in chooses:
        roles[layer] = "select"
    for layer in reads:
        roles[layer] = "full"
    nearest, sources = -1, []
    for layer, role in enumerate(roles):
        nearest = layer if role == "select" else nearest
        sources.append(nearest if role == "reuse" else -1)
    taken = [float(profile.mean[source, layer]) for layer, source in enumerate(sources) if source >= 0]
    return Policy(
        tuple(roles), tuple(sources), profile.length - len(taken) + sum(taken), min(taken, default=1.0)
    )


def scores(weights: dict[str, Tensor], model: ModelSpec, sizes: Sizes, device: str) -> dict[str, float]:
    net = build_causal_lm(model, device=device)
    net.load_state_dict(weights)
    text, recall = (task.evaluate(net.eval(), device=device) for task in sizes.tasks())
    return {
        "recall": recall.value,
        "recall_se": recall.se,
        "bits_per_byte": text.value,
        "bits_per_byte_se": text.se,
    }


def run(sizes: Sizes, seed: int, device: str, until: float) -> list[dict[str, Any]]:
    """The rows of a seed, as many as there is time for."""
    torch.set_num_threads(1)
    begin = time.time()
    net, model = trained(sizes, seed, device), sizes.model()
    weights, told = net.state_dict(), {"seed": seed, "train_s": round(time.time() - begin, 1)}
    layers = range(sizes.layers)
    every = placed(Profile(np.eye(sizes.layers)), [], layers)
    ends = {"dense": model, "choose": with_policy(model, layers, every, sizes.blocks)}
    rows = [{**told, "way": way, **scores(weights, one, sizes, device)} for way, one in ends.items()]
    profile = solved(net, sizes, device)
    for resets in sizes.resets:
        for way, policy in ways(profile, resets, sizes.draws):
            if time.time() > until:
                return rows
            found = scores(weights, with_policy(model, layers, policy, sizes.blocks), sizes, device)
            told_of = {
                "resets": resets,
                "way": way,
                "roles": list(policy.roles),
                "sources": list(policy.sources),
            }
            rows.append({**told, **told_of, "least": policy.least, "total": policy.total, **found})
    return rows


def table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """For each number of resets and way the loss against dense attention, in the mean over seeds."""
    dense = {row["seed"]: row for row in rows if row["way"] == "dense"}
    for figure in ("recall", "bits_per_byte"):
        for way in ("dense", "choose"):
            yield f"{figure:14} {way:16} {interval([row[figure] for row in rows if row['way'] == way])}"
        for resets in sorted({row["resets"] for row in rows if "resets" in row}):
            for way in ("solver", "even", "random"):
                found: dict[int, list[float]] = {}
                for row in rows:
                    if row.get("resets") == resets and row["way"].split()[0] == way:
                        lost = row[figure] - dense[row["seed"]][figure]
                        found.setdefault(row["seed"], []).append(lost)
                yield f"{figure:14} {way:8} {resets} resets {interval([mean(each) for each in found.values()])}"


def interval(values: Sequence[float]) -> str:
    if len(values) not in T_95:
        return f"{mean(values):+.4f} (of {len(values)})" if values else "none"
    return f"{mean(values):+.4f} ± {T_95[len(values)] * stdev(values) / sqrt(len(values)):.4f}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the rows")
    parser.add_argument("--budget", type=float, default=400.0, help="seconds after which no policy is scored")
    parser.add_argument("--commit", help="what the code is")
    parser.add_argument("--tiny", action="store_true", help="small sizes, for a CPU")
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    sizes, device = TINY if chosen.tiny else WHOLE, pick_device()
    header = {"commit": chosen.commit, "device": device_name(device), "tokens": sizes.tokens}
    until, rows = time.time() + chosen.budget, list[dict[str, Any]]()
    with ProcessPoolExecutor(len(sizes.seeds), get_context("spawn")) as pool:
        for done in as_completed(pool.submit(run, sizes, seed, device, until) for seed in sizes.seeds):
            if (error := done.exception()) is not None:
                print(f"{type(error).__name__}: {error}", flush=True)
                continue
            stamp = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
            rows += (made := [{**header, **stamp, **row} for row in done.result()])
            with (chosen.out / ROWS).open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in made)
    print("\n".join(table(rows)))
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
