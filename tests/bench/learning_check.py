"""Recall of mixers that select, route or split tokens beside dense attention and two controls: MQAR, 3 rates × 3 seeds.

    python tests/bench/learning_check.py --estimate --out "$OUT" --commit "$(git rev-parse --short=12 HEAD)"
    python tests/bench/learning_check.py --out "$OUT" --budget 400 --limit 530 --commit "$(git rev-parse --short=12 HEAD)"
    python tests/bench/learning_check.py --out /tmp/learning --budget 60 --commit none --tiny

64 pairs in 1,024 tokens, a vocabulary of 1,024, and queries that stand anywhere behind the pairs (`gap_power` 1): with
Zoology's, which follow the pairs closely, most queries have few blocks before them, and blocks at random found 0.87 of the
answers. Every model is a window of two tokens, which finds the token before, and the mixer under test behind it. The first two
fifths of the steps are 8 pairs in 64 tokens: without them nothing, dense attention neither, had left chance. Blocks have 32
tokens, and of 32 at most 8 are visible, forced ones among them; NAtS-L and the token router are asked for a quarter (`share`
tells what came of it), the layer router for half of its prompts. Controls: linear attention by elu + 1 with keys of 16, and
blocks at random as many as are selected; the hash in their rows is that of the spec they were made from. Each run is a process
of its own, `--workers` at once.

What is done is read from `--rows` (evidence-selecting.jsonl of the results) and from the file of that name in `--out`, and not
done again: a run is a piece, and copying its rows into the results lets the next one go on. After `--budget` seconds nothing is
begun; at `--limit` what still runs is ended and lost. `--estimate` times some steps of each kind alone and tells what all would
cost.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from heddle.compose.build import build_causal_lm
from heddle.compose.cache import Call
from heddle.compose.mixers.attention import AttentionModule
from heddle.compose.modules.selection import Places
from heddle.compose.train import Batches, Recipe, fit
from heddle.errors import HeddleError
from heddle.kernels.bench import machine
from heddle.search.environment import device_name, pick_device
from heddle.search.tasks import batches
from heddle.search.tasks.mqar import Mqar
from heddle.specs import ModelSpec, spec_hash

ROWS = Path(__file__).parent / "results" / "evidence-selecting.jsonl"
RATES, SEEDS = (1e-3, 3e-3, 1e-2), (0, 1, 2)
CONTROLS = ("elu", "random")
# Of the best rate: within so many points of dense, and short of it by so many.
WITHIN, SHORT = 0.05, 0.20
PROBED = 12
# Queries stand anywhere behind the pairs.
GAP_POWER = 1.0
Job = tuple[str, float, int]


@dataclass(frozen=True)
class Sizes:
    width: int
    heads: int
    vocabulary: int
    pairs: int
    length: int
    block: int
    count: int
    tokens: int
    batch_tokens: int
    launch: Literal["eager", "graph"] = "eager"

    def kinds(self) -> dict[str, list[dict[str, Any]]]:
        """The mixers under test of each kind, a layer each, and those of `TRIED`."""
        plain = self.plain()
        return plain | {
            name: [with_fields(plain[kind][0], fields), *plain[kind][1:]]
            for name, (kind, fields) in TRIED.items()
        }

    def plain(self) -> dict[str, list[dict[str, Any]]]:
        chosen = {"block": self.block, "count": self.count, "sink": 1, "recent": 1}
        attention: dict[str, Any] = {"kind": "attention", "heads": self.heads}
        linear: dict[str, Any] = {"kind": "gated_deltanet", "heads": self.heads}
        blocks, visible = self.length // self.block, self.block * self.count
        # STILL sees its own chunk and the one before whole.
        kept = max(1, (visible - 2 * self.block) // (blocks - 2))
        near = {**attention, "window": visible}
        # As examples/specs/ttt.yaml has them.
        memory = {
            "kind": "ttt",
            "heads": self.heads,
            "memory": "mlp",
            "chunk": self.block,
            "rate": 0.01,
            "scale": 0.01,
        }
        # One matrix, by a kernel, which has its say from the first step on.
        by_matrix = {"memory": "linear", "loss": "l2", "rate": 0.05, "scale": 1.0}
        by_gate = {"chunk": self.block, "merge": "gate", "budget": 0.25}
        return {
            "dense": [attention],
            "elu": [attention],
            "random": [{**attention, "selection": chosen}],
            "selection": [{**attention, "selection": chosen}],
            "infllm": [{**attention, "selection": {**chosen, "scores": "kernels"}}],
            "reuse": [{**attention, "selection": chosen}, {**attention, "selection": {**chosen, "source": "it0"}}],
            "landmark": [{"kind": "landmark", "heads": self.heads, "block": self.block, "top": self.count - 1}],
            "routing": [{"kind": "routing", "heads": self.heads, "clusters": self.count // 2, "members": visible}],
            "moh": [{"kind": "moh", "mixer": {**attention, "heads": 4}, "shared_heads": 1, "active": 1}],
            "nats_l": [{"kind": "nats_l", "heads": self.heads, "chunk": self.block, "budget": 0.25}],
            "still": [{"kind": "still", "heads": self.heads, "chunk": self.block, "keep": kept}],
            "token_router": [{"kind": "token_router", "mixers": [attention, linear], **by_gate}],
            "layer_router": [{"kind": "layer_router", "mixers": [attention, near], "target": 0.5, "straight_through": True}],
            "liger": [{"kind": "liger", "heads": self.heads, "window": visible}],
            "allmem": [{"kind": "parallel", "mixers": [near, memory]}],
            "allmem_linear": [{"kind": "parallel", "mixers": [near, {**memory, **by_matrix}]}],
        }  # fmt: skip

    def model(self, kind: str) -> ModelSpec:
        under_test = {f"it{index}": mixer for index, mixer in enumerate(self.kinds()[kind])}
        near = {"kind": "attention", "heads": self.heads, "window": 2}
        blocks = {
            name: {"mixer": mixer, "channel": {"kind": "swiglu"}}
            for name, mixer in {"near": near, **under_test}.items()
        }
        data = {
            "vocab_size": self.vocabulary,
            "hidden_size": self.width,
            "blocks": blocks,
            "layers": ["near", *under_test],
        }
        return ModelSpec.model_validate(data)

    def task(self) -> Mqar:
        return Mqar(vocab_size=self.vocabulary, pairs=self.pairs, length=self.length, gap_power=GAP_POWER)

    def easy(self) -> Mqar:
        """What training begins with."""
        pairs, length = max(1, self.pairs // 8), max(8, self.length // 16)
        return Mqar(vocab_size=self.vocabulary, pairs=pairs, length=length, gap_power=GAP_POWER)

    @property
    def steps(self) -> int:
        return max(1, round(self.tokens / self.batch_tokens))

    def recipe(self, rate: float, seed: int) -> Recipe:
        return Recipe(self.tokens, self.batch_tokens, learning_rate=rate, seed=seed)


def with_fields(mixer: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """`mixer` with more fields, also inside its fields."""
    return mixer | {
        name: with_fields(mixer[name], value) if isinstance(value, dict) and name in mixer else value
        for name, value in fields.items()
    }


# The share of the steps that are easy.
EASY = 0.4
# What was tried for kinds that missed their goal, of the same size and view. In training: dense in the first steps; a loss of the
# choice. Of the method: no positions, also where features are made of turned keys; logits of the Routing Transformer's code, and
# twice the clusters of half the size; as many features of a head as STILL's code has; single tokens that are routed, as many of
# them visible as in blocks; a bias of Liger's keys, which its softmaxes do not see and which keeps its gates open, beside its
# window and without one.
FIRST, LEARNT = {"dense_first": 0.6}, {"distillation": 0.1}
TRIED: dict[str, tuple[str, dict[str, Any]]] = {
    "selection_first": ("selection", {"selection": FIRST}),
    "selection_both": ("selection", {"selection": FIRST | LEARNT}),
    "selection_strict": ("selection", {"selection": FIRST | {"distillation": 1.0}}),
    "infllm_first": ("infllm", {"selection": FIRST}),
    "infllm_both": ("infllm", {"selection": FIRST | LEARNT}),
    "infllm_nope": ("infllm", {"rope": None, "selection": FIRST | LEARNT}),
    "reuse_first": ("reuse", {"selection": FIRST}),
    "reuse_both": ("reuse", {"selection": FIRST | LEARNT}),
    "nats_l_first": ("nats_l", FIRST),
    "token_router_first": ("token_router", FIRST),
    "token_router_single": ("token_router", FIRST | {"chunk": 1}),
    "routing_scale": ("routing", {"scale": 1.0}),
    "routing_wide": ("routing", {"scale": 1.0, "clusters": 8, "decay": 0.99}),
    "still_nope": ("still", {"rope": None}),
    "still_wide": ("still", {"rope": None, "features": 128}),
    "liger_bias": ("liger", {"bias": "qkv"}),
    "liger_alone": ("liger", {"bias": "qkv", "share": 1.0}),
}
WHOLE = Sizes(128, 2, 1024, 64, 1024, 32, 8, 32_000_000, 16_384)
TINY = Sizes(16, 2, 32, 2, 32, 4, 4, 512, 128)


class EluAttention(nn.Module):
    """Linear attention by φ(x) = elu(x) + 1, all weights at once.        (arXiv 2006.16236)

        o_i = sum_{j <= i} φ(q_i) · φ(k_j) v_j / sum_{j <= i} φ(q_i) · φ(k_j)

    Shapes:  x, y: [B, T, D]
    """

    def __init__(self, width: int, heads: int, keys: int = 16) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj = (nn.Linear(width, heads * keys, bias=False) for _ in range(2))
        self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(2))

    def forward(self, x: Tensor, call: Call) -> Tensor:  # noqa: ARG002
        q, k, v = (
            proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        weights = ((F.elu(q.float()) + 1.0) @ (F.elu(k.float()) + 1.0).mT).tril()
        o = (weights / weights.sum(-1, keepdim=True)).to(v.dtype) @ v
        y: Tensor = self.o_proj(o.transpose(1, 2).flatten(2))
        return y


class RandomBlocks(AttentionModule):
    """Attention whose selected blocks are drawn at random, but for the forced ones."""

    def _choice(self, q: Tensor, k: Tensor, written: Tensor | None, call: Call) -> tuple[Places, Tensor]:  # noqa: ARG002
        places = Places(self.selection["block"], k.shape[2], None, q.device)
        own = torch.arange(k.shape[2] - q.shape[2], k.shape[2], device=q.device)[:, None] // places.block
        block = torch.arange(places.blocks, device=q.device)
        always = (block <= own) & (
            (block < self.selection["sink"]) | (block > own - self.selection["recent"])
        )
        score = torch.rand(q.shape[0], k.shape[1], *always.shape, device=q.device)
        score = score.masked_fill(always, 2.0).masked_fill(block > own, -1.0)
        best = score.topk(min(self.selection["count"], places.blocks), dim=-1).indices
        chosen = torch.zeros_like(score, dtype=torch.bool).scatter(-1, best, True)
        return places, chosen & (block <= own)


def net_of(sizes: Sizes, kind: str, seed: int, device: str) -> Any:
    net = build_causal_lm(sizes.model(kind), seed=seed, device=device)
    layer = net.model.layer_at(1)
    if kind == "elu":
        torch.manual_seed(seed)
        made = EluAttention(sizes.width, sizes.heads)
        for weight in made.parameters():
            nn.init.normal_(weight, std=0.02)
        layer.mixer = made.to(device)
    if kind == "random":
        layer.mixer.__class__ = RandomBlocks
    torch.manual_seed(seed)
    return net


def begun_easily(easy: Batches, full: Batches, steps: int) -> Batches:
    """Batches of the easy form first: on the full one alone nothing leaves chance in these steps."""

    def batch(step: int) -> tuple[Tensor, Tensor]:
        return (easy if step < EASY * steps else full)(step)

    return batch


def train(sizes: Sizes, job: Job, device: str) -> dict[str, Any]:
    """The row of a run."""
    torch.set_num_threads(1)
    kind, rate, seed = job
    task, recipe, spec = sizes.task(), sizes.recipe(rate, seed), sizes.model(kind)
    examples = begun_easily(batches(sizes.easy(), recipe, device), batches(task, recipe, device), sizes.steps)
    net = net_of(sizes, kind, seed, device)
    told = {"task": task.name, "spec_hash": spec_hash(spec), "kind": kind, "seed": seed, "lr": rate}
    told |= {"chance": task.chance, "gap_power": GAP_POWER, "easy_steps": EASY}
    told["parameters"] = sum(one.numel() for one in net.parameters())
    begin = time.perf_counter()
    try:
        fitted = fit(net, examples, recipe, launch=sizes.launch)
    except HeddleError as error:
        return {**told, "score": None, "error": str(error)[:300]}
    told["wall_s"] = round(time.perf_counter() - begin, 2)
    score = task.evaluate(net, device=device)
    told |= {"steps": fitted.steps, "score": score.value, "se": score.se, "loss": fitted.losses[-1]}
    return told | share_of(net, task.held_out(device)[0][:16])


@torch.no_grad()
def share_of(net: Any, inputs: Tensor) -> dict[str, float]:
    """Of a mixer that sends tokens or chunks to two others, how much goes to the first."""
    mixer, seen = net.model.layer_at(1).mixer, list[Tensor]()
    if not hasattr(mixer, "routes_out"):
        return {}
    hook = mixer.routes_out.register_forward_hook(lambda _, __, out: seen.append(out.float()))
    net.model(input_ids=inputs, use_cache=False)
    hook.remove()
    return {"share": float(seen[0][..., 0].sum() / seen[0].sum().clamp(min=1.0))}


def jobs(kinds: Sequence[str], done: set[tuple[str, float, int]]) -> Iterator[Job]:
    """What is left to do; first the kinds that all others are compared with."""
    order = sorted(kinds, key=lambda kind: (kind != "dense", kind not in CONTROLS))
    for kind in order:
        yield from ((kind, *run) for run in product(RATES, SEEDS) if (kind, *run) not in done)


def read_rows(paths: Sequence[Path], sizes: Sizes) -> list[dict[str, Any]]:
    """Rows of runs of the specs as they are now, each run once."""
    hashes = {kind: spec_hash(sizes.model(kind)) for kind in sizes.kinds()}
    found: dict[tuple[str, float, int], dict[str, Any]] = {}
    for path in paths:
        for line in path.read_text().splitlines() if path.exists() else []:
            row = json.loads(line)
            form = (row["spec_hash"], row.get("easy_steps"), row.get("gap_power"))
            if form == (hashes.get(row["kind"]), EASY, GAP_POWER):
                found[row["kind"], row["lr"], row["seed"]] = row
    return list(found.values())


def table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Of each kind the mean accuracy of the seeds at its best rate, and whether it keeps its goal beside dense."""
    best: dict[str, tuple[float, float]] = {}
    for kind in dict.fromkeys(row["kind"] for row in rows):
        by_rate = {
            rate: [row["score"] or 0.0 for row in rows if (row["kind"], row["lr"]) == (kind, rate)]
            for rate in RATES
        }
        whole = {rate: mean(scores) for rate, scores in by_rate.items() if len(scores) == len(SEEDS)}
        if whole:
            rate = max(whole, key=whole.__getitem__)
            best[kind] = (whole[rate], rate)
    dense = best.get("dense")
    for kind, (score, rate) in best.items():
        verdict = ""
        if dense is not None and kind != "dense":
            gap = dense[0] - score
            keeps = gap >= SHORT if kind in CONTROLS else gap <= WITHIN
            verdict = f", {100 * gap:.1f} points below dense: {'kept' if keeps else 'MISSED'}"
        yield f"{kind:14} {score:.3f} at {rate:g}{verdict}"


def estimate(sizes: Sizes, device: str, workers: int) -> Iterator[str]:
    """Some steps of each kind alone, and what all runs would take if `workers` at once did not slow each other down."""
    total = longest = 0.0
    for kind in sizes.kinds():
        # The first steps compile; they are taken off as a shorter run.
        took = []
        for count in (PROBED // 2, PROBED):
            short = replace(sizes, tokens=count * sizes.batch_tokens)
            took.append(train(short, (kind, RATES[0], 0), device)["wall_s"])
        each = max(took[1] - took[0], 0.0) / (PROBED - PROBED // 2)
        seconds = each * sizes.steps * len(RATES) * len(SEEDS)
        total, longest = total + seconds, max(longest, each * sizes.steps)
        yield f"{kind:14} {1e3 * each:8.1f} ms a step, {seconds:7.0f} s for all runs, first steps {took[0]:.1f} s"
    yield f"all: {total:.0f} s one after the other; {max(total / workers, longest):.0f} s at least with {workers} workers"


def run_all(sizes: Sizes, chosen: argparse.Namespace, rows: list[dict[str, Any]], out: Path) -> None:
    device, begin = pick_device(), time.monotonic()
    header = {
        "commit": chosen.commit,
        "device": device_name(device),
        "run": machine(torch.device(device))["run"],
    }
    left = iter(list(jobs(chosen.kinds, {(row["kind"], row["lr"], row["seed"]) for row in rows})))
    # A process that is forked cannot use a GPU that this one has looked at.
    with ProcessPoolExecutor(chosen.workers, get_context("spawn")) as pool:
        running: dict[Future[dict[str, Any]], Job] = {}
        while True:
            while len(running) < chosen.workers and time.monotonic() - begin < chosen.budget:
                job = next(left, None)
                if job is None:
                    break
                running[pool.submit(train, sizes, job, device)] = job
            late = chosen.limit - (time.monotonic() - begin)
            if not running or late <= 0:
                break
            for done in wait(running, timeout=late, return_when=FIRST_COMPLETED).done:
                rows += keep(done, running.pop(done), header, out)
        for process in list((pool._processes or {}).values()) if running else []:
            process.terminate()
        pool.shutdown(wait=not running, cancel_futures=True)


def keep(done: Future[dict[str, Any]], job: Job, header: dict[str, Any], out: Path) -> list[dict[str, Any]]:
    """Writes the row of a run; of one that broke nothing but a line, so that it is tried again."""
    what = f"{job[0]:14} lr {job[1]:g} seed {job[2]}"
    try:
        row = {**header, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **done.result()}
    except Exception as error:
        print(f"{what}: {type(error).__name__}: {' '.join(str(error).split())[-300:]}", flush=True)
        return []
    with out.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(f"{what}: {row['score']} in {row.get('wall_s', 0.0):.0f} s", flush=True)
    return [row]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", type=float, default=400.0, help="seconds after which nothing is begun")
    parser.add_argument("--limit", type=float, default=530.0, help="seconds after which what runs is ended")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of the rows")
    parser.add_argument("--rows", type=Path, default=ROWS, help="rows of earlier pieces")
    parser.add_argument("--commit", help="what the code is")
    parser.add_argument("--workers", type=int, default=9)
    parser.add_argument("--kinds", nargs="*", default=list(WHOLE.kinds()), choices=list(WHOLE.kinds()))
    parser.add_argument(
        "--launch", choices=["eager", "graph"], default="eager", help="graph: each step as one CUDA graph"
    )
    parser.add_argument("--estimate", action="store_true", help="tell what all would cost, train nothing")
    parser.add_argument("--tiny", action="store_true", help="small sizes, for a CPU")
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    sizes = replace(TINY if chosen.tiny else WHOLE, launch=chosen.launch)
    out = chosen.out / ROWS.name
    if chosen.estimate:
        for line in estimate(sizes, pick_device(), chosen.workers):
            print(line, flush=True)
        return 0
    rows = read_rows([chosen.rows, out], sizes)
    before = len(rows)
    run_all(sizes, chosen, rows, out)
    wanted = len(chosen.kinds) * len(RATES) * len(SEEDS)
    for line in (*table(rows), f"{len(rows) - before} runs done, {len(rows)} of {wanted} there"):
        print(line)
    return 0 if len(rows) > before or before >= wanted else 1


if __name__ == "__main__":
    sys.exit(main())
