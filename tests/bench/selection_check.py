"""One call on a GPU machine: what choosing blocks costs beside reading them, by cached means and without, in bfloat16.

    python tests/bench/selection_check.py --out "$OUT" --budget 110 --commit "$(git rev-parse --short=12 HEAD)"
    python tests/bench/selection_check.py --out /tmp/selection --budget 60 --commit none --tiny

Holds the kernels of block_choice to float64 first: dtypes, head sizes, padding, marks, and 2,048 blocks, where lists may differ
by blocks whose worth differs by rounding alone. Then times a decode step (32 query heads, 2 key heads of 128, 64 blocks of 64,
batch 32 at 128 K), in a CUDA graph of many and eager: attention alone with lists that are there; with a choice by means that are
made of all keys anew (as it was before they were cached); by cached means in PyTorch; by cached means in kernels. A choice alone
finds means in the L2 cache, if they fit there; what it adds to attention is the honest figure. Then a prompt of 131,072 tokens
beside dense attention by cuDNN, and other launches of the step. A floor is the bytes that must be read (of the chosen blocks, and
of the means) by the rate of a large copy. Writes selection_check.log and rows to evidence-selection.jsonl, the table last; exits
with 1 if anything was wrong. `--tiny` tries the script itself on a CPU.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_check import Log
from layer_check import DEVICE, HALF, ON_GPU, Report, compared, forced, in_turns
from layer_stacks import made
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from heddle.compose.modules.selection import (
    Means,
    Places,
    Rule,
    attend_blocks,
    choose_blocks,
    choose_for_step,
    means_of,
)
from heddle.kernels import force_path
from heddle.kernels.bench import timed, timed_in_graph
from heddle.kernels.block_choice import block_choice, block_scores
from heddle.kernels.common.tuning import tuning
from heddle.kernels.configs.launch import Launch

PARTS = ("checks", "mean", "kernels", "prompts", "launches")
SCORES = ("mean", "kernels")
COLUMNS, WARPS, CHOOSING = (32, 64, 128), (4, 8), (1, 2, 8)
# Sums of so many float32 products may be apart by this share of the largest worth.
APART = 2e-5
Call = Callable[[], object]


@dataclass(frozen=True)
class Shape:
    """Of the step and, with `tokens`, of the prompt."""

    batch: int
    context: int
    tokens: int
    heads: tuple[int, int]
    head_dim: int
    block: int
    count: int

    def about(self) -> dict[str, int]:
        heads = {"H": self.heads[0], "N": self.heads[1], "K": self.head_dim}
        return {"B": self.batch, "S": self.context, **heads, "block": self.block, "count": self.count}


FULL = Shape(32, 131_072, 131_072, (32, 2), 128, 64, 64)
TINY = Shape(2, 200, 150, (4, 2), 16, 8, 5)


class Selection(Report):
    """As `Report`, with rows and a log of its own."""

    def __init__(self, folder: Path, commit: str | None, *, tiny: bool) -> None:
        super().__init__(folder, commit, made(tiny=tiny))
        self.log, self.file = Log(folder / "selection_check.log"), folder / "evidence-selection.jsonl"
        self.shape = TINY if tiny else FULL

    def row(self, **told: Any) -> None:
        super().row(**{"op": "selection", **told})


def rule_of(shape: Shape, scores: str) -> Rule:
    return Rule(count=shape.count, sink=1, recent=2, scores=scores)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=HALF)


def forms(dtype: torch.dtype) -> Iterator[tuple[str, dict[str, Any]]]:
    """What is checked: a name, and what it changes; in bfloat16 more sizes, each of which is compiled."""
    sizes: list[dict[str, Any]] = [{}, {"T": 3}, {"S": 131_073, "B": 4}, {"S": 100}]
    sizes += [{"K": 64}, {"K": 192}, {"K": 100}, {"H": 6}] if dtype == torch.bfloat16 else []
    for change, kernels in itertools.product(sizes, (False, True)):
        yield f"{change}", {"kernels": kernels, **change}
    for kernels in (False, True):
        yield "padded", {"kernels": kernels, "starts": (-1, 70, 999), "B": 3}
        yield "marked", {"kernels": kernels, "marks": True}
        yield "dense", {"kernels": kernels, "dense_length": 900, "starts": (300, 1999), "B": 2}


def drawn(dtype: torch.dtype, **change: Any) -> dict[str, Any]:
    """Arguments of block_choice, blocks of 64 keys."""
    how = {
        "B": 2,
        "T": 1,
        "H": 32,
        "K": 128,
        "S": 2000,
        "kernels": False,
        "starts": (),
        "marks": False,
    } | change
    how["S"] = how["S"] if ON_GPU else min(how["S"], 2000)
    parts = max(0, how["S"] // 16 - 1) if how["kernels"] else how["S"] // 64
    torch.manual_seed(how["S"] + how["K"])
    starts = how["starts"] or (how["S"] - how["T"],) * how["B"]
    q = torch.randn(how["B"], how["H"], how["T"], how["K"], device=DEVICE).to(dtype)
    means = (torch.randn(how["B"], 2, parts, how["K"], device=DEVICE) / 8.0).to(dtype)
    held = torch.rand(how["B"], parts, device=DEVICE) < 0.5 if how["marks"] else None
    told = {"q": q, "means": means, "start": torch.tensor(starts, device=DEVICE), "held": held}
    numbers = {"block": 64, "blocks": -(-how["S"] // 64), "count": 24, "sink": 1, "recent": 2}
    return {**told, **numbers, "kernels": how["kernels"], "dense_length": how.get("dense_length", 0)}


def worth_of(given: dict[str, Any], listed: Tensor) -> tuple[Tensor, float]:
    """What the listed blocks are worth in float64, in falling order, and the largest worth."""
    place = given["start"][:, None] + torch.arange(given["q"].shape[2], device=DEVICE)
    q, means = given["q"].double(), given["means"].double()
    how = {name: given[name] for name in ("block", "blocks", "held", "kernels")}
    score = block_scores(q, means, place, **how)
    score = torch.nn.functional.pad(score, (0, 1), value=-torch.inf)
    index = torch.where(listed < 0, given["blocks"], listed).long()
    largest = float(score[..., :-1].abs().max())
    return score.gather(-1, index).sort(dim=-1, descending=True).values, largest


def checks(report: Selection) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for name, change in forms(dtype):
            given = drawn(dtype, **change)
            with forced():
                found, again = block_choice(**given), block_choice(**given)
            exact = {key: given[key].double() for key in ("q", "means")}
            with force_path("torch"):
                wanted = block_choice(**given | exact)
            turned = int((found != wanted).any(dim=-1).sum())
            (one, largest), (other, _) = worth_of(given, found), worth_of(given, wanted)
            near = bool(((one - other).abs().nan_to_num() <= APART * largest).all())
            is_list = bool(((found.diff(dim=-1) > 0) | (found[..., 1:] < 0)).all())
            good = near and is_list and torch.equal(found, again) and torch.equal(found < 0, wanted < 0)
            what = f"{dtype} {name}{' kernels' if given['kernels'] else ''}"
            report.log(
                f"{'ok   ' if good else 'WRONG'} {what}: {turned} of {found[..., 0].numel()} lists differ"
            )
            report.row(impl="heddle", phase="check", kind=what, ok=good, differ=turned)
            if not good:
                report.log.wrong.append(what)


@dataclass
class Step:
    """A decode step's inputs, after `context` tokens."""

    shape: Shape
    q: Tensor
    k: Tensor
    v: Tensor
    places: Places

    @classmethod
    def of(cls, shape: Shape) -> Step:
        (heads, kv_heads), keys = shape.heads, shape.context + 1
        q = random(shape.batch, heads, 1, shape.head_dim)
        k, v = (random(shape.batch, kv_heads, keys, shape.head_dim) for _ in range(2))
        # A model makes it once for all layers.
        start = torch.full((shape.batch,), shape.context, dtype=torch.int32, device=DEVICE)
        return cls(shape, q, k, v, Places(shape.block, keys, None, DEVICE, start))

    def means(self, rule: Rule) -> Means:
        keys = self.places.keys
        return means_of(self.k, self.places, rule.parts(self.shape.block), weights=None, new=keys)[0]

    def attend(self, chosen: Tensor) -> Tensor:
        with forced():
            return attend_blocks(self.q, (self.k, self.v, None), self.places, chosen, None)

    def calls(self, rule: Rule) -> dict[str, Call]:
        means, (q, k, places) = self.means(rule), (self.q, self.k, self.places)

        def listed(path: str) -> Tensor:
            with forced() if path == "triton" else force_path("torch"):
                return choose_for_step(q, k, places, rule, means=means)

        there = listed("torch")
        return {
            "attention alone": lambda: self.attend(there),
            "means of all keys": lambda: self.attend(choose_blocks(q, k, places, rule)),
            "cached means, PyTorch": lambda: self.attend(listed("torch")),
            "cached means": lambda: self.attend(listed("triton")),
            "choice, PyTorch": lambda: listed("torch"),
            "choice": lambda: listed("triton"),
        }

    def floors(self, report: Selection, rule: Rule) -> dict[str, float]:
        shape, size = self.shape, self.q.element_size()
        rows = shape.batch * shape.heads[1] * shape.head_dim * size
        read = 2 * rows * min(shape.count * shape.block, self.places.keys)
        means = rows * self.means(rule).keys.shape[2]
        alone, choice, both = (report.floor(0.0, moved) for moved in (read, means, read + means))
        with_choice = dict.fromkeys(("means of all keys", "cached means, PyTorch", "cached means"), both)
        return {"attention alone": alone, "choice": choice, "choice, PyTorch": choice, **with_choice}


def in_graphs(
    report: Selection, phase: str, calls: Mapping[str, Call], floors: Mapping[str, float]
) -> dict[str, float]:
    """Median milliseconds of each call, in a CUDA graph of many; a call that fails is told and left out."""
    found = {}
    for name, call in calls.items():
        try:
            call()
            about = timed_in_graph(call) if ON_GPU else timed(call, DEVICE)
        except Exception as error:
            report.log.wrong.append(f"{phase} {name}: {' '.join(str(error).split())[-300:]}")
            continue
        found[name], floor = about["ms"], floors.get(name)
        report.row(impl=name, phase=phase, shape=report.shape.about(), floor_ms=floor, **about)
        share = "" if floor is None else f", of floor {floor / about['ms']:4.0%}"
        report.log(f"{phase:20} {name:28} {about['ms']:9.4f} ms{share}")
    return found


@torch.inference_mode()
def steps(report: Selection, scores: str) -> None:
    rule, step = rule_of(report.shape, scores), Step.of(report.shape)
    calls, floors = step.calls(rule), step.floors(report, rule)
    outs = {name: calls[name]() for name in ("means of all keys", "cached means, PyTorch", "cached means")}
    last = outs["cached means"]
    for name, out in outs.items():
        assert isinstance(out, Tensor)
        assert isinstance(last, Tensor)
        # A choice may turn by rounding: then one block of 64 differs in some heads.
        same = float(((out - last).abs().amax(-1) <= 2e-2).float().mean())
        report.row(impl=name, phase=f"{scores} equal", shape=report.shape.about(), share=same)
        if same < 0.95:
            report.log.wrong.append(f"{scores} {name}: {same:.1%} of heads are those of cached means")
    for graph in (True, False) if ON_GPU else (False,):
        phase = f"{scores} step {'graph' if graph else 'eager'}"
        times = (
            in_graphs(report, phase, calls, floors)
            if graph
            else in_turns(report, phase, report.shape.about(), calls, floors)
        )
        for name in (one for one in times if one in floors and "PyTorch" not in one):
            goal = "goal 1.5" if graph and name in ("attention alone", "cached means") else "no goal"
            report.table.append(
                f"{phase}, {name}: {times[name]:.4f} ms, floor {floors[name]:.4f}: {times[name] / floors[name]:.2f} x ({goal})"
            )
        compared(report, phase, times, "cached means", "means of all keys", "old way")


def overrides(scores: str) -> dict[str, dict[str, Any]]:
    """Other launches of the kernels of one choice, by name."""
    found: dict[str, dict[str, Any]] = {"as set": {}}
    for columns, warps in itertools.product(COLUMNS, WARPS):
        for kernel in (
            ("mean",) if scores == "mean" else ("logit", "pool") if warps == WARPS[0] else ("logit",)
        ):
            found[f"{kernel} {columns} {warps}"] = {kernel: Launch(1, columns, warps, 1)}
    return found | {f"choosing warps {warps}": {"choosing_warps": warps} for warps in CHOOSING}


@torch.inference_mode()
def launches(report: Selection) -> None:
    """Steps with other launches of the choice; lists must be those of the launches that are set."""
    step = Step.of(report.shape)
    for scores in SCORES:
        rule, calls, expected = rule_of(report.shape, scores), dict[str, Call](), None
        means = step.means(rule)

        def choice(override: dict[str, Any], rule: Rule = rule, means: Means = means) -> Tensor:
            with forced(), tuning(**override):
                return choose_for_step(step.q, step.k, step.places, rule, means=means)

        for name, override in overrides(scores).items():
            try:
                found = choice(override)
            except Exception as error:
                report.log(f"none  {scores} {name}: {' '.join(str(error).split())[-200:]}")
                continue
            expected = found if expected is None else expected
            # Sums in another order may turn a choice.
            differ = float((found != expected).any(dim=-1).float().mean())
            if differ > 0.05:
                report.log.wrong.append(f"{scores} {name}: {differ:.0%} of lists differ")
            calls[name] = lambda choice=choice, override=override: step.attend(choice(override))
        times = in_graphs(report, f"{scores} launches", calls, {})
        best = sorted(times, key=times.__getitem__)[:4]
        told = ", ".join(f"{name} {times[name]:.4f}" for name in best)
        report.table.append(f"{scores} step as set {times.get('as set', 0.0):.4f} ms; best: {told}")


@torch.inference_mode()
def prompts(report: Selection) -> None:
    shape, (heads, kv_heads) = report.shape, report.shape.heads
    q = random(1, heads, shape.tokens, shape.head_dim)
    k, v = (random(1, kv_heads, shape.tokens, shape.head_dim) for _ in range(2))
    places = Places(shape.block, shape.tokens, None, DEVICE)

    def attend(chosen: Tensor) -> Tensor:
        with forced():
            return attend_blocks(q, (k, v, None), places, chosen, None)

    def dense() -> Tensor:
        wide = [side.repeat_interleave(heads // kv_heads, dim=1) for side in (k, v)]
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION if ON_GPU else SDPBackend.MATH):
            return scaled_dot_product_attention(q, *wide, is_causal=True)

    def choose(rule: Rule, path: str) -> Tensor:
        with forced() if path == "triton" else force_path("torch"):
            return choose_blocks(q, k, places, rule)

    calls: dict[str, Call] = {"dense": dense}
    for scores in SCORES:
        rule = rule_of(shape, scores)
        calls[f"choice, {scores}"] = lambda rule=rule: choose(rule, "triton")
        calls[f"choice and attention, {scores}"] = lambda rule=rule: attend(choose(rule, "triton"))
        plain, there = choose(rule, "torch"), choose(rule, "triton")
        if not torch.equal(plain, there):
            report.log.wrong.append(f"prompt, {scores}: marks differ")
    calls["choice in PyTorch, mean"] = lambda: choose(rule_of(shape, "mean"), "torch")
    calls["attention alone, kernels"] = lambda: attend(there)
    del plain
    about = {**shape.about(), "B": 1, "T": shape.tokens, "S": shape.tokens}
    times = in_turns(report, "prompt", about, calls, {})
    for name in [name for name in calls if name != "dense"]:
        compared(
            report, f"prompt 1 x {shape.tokens}, {name}", times, name, "dense", "goal 5 with choice, 8 alone"
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", type=float, default=110.0, help="seconds after which no part is begun")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the log and the rows")
    parser.add_argument("--commit", help="what the code is")
    parser.add_argument("--only", nargs="*", default=PARTS, choices=PARTS, help="parts run")
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a CPU")
    chosen = parser.parse_args()
    begin, report = time.monotonic(), Selection(chosen.out, chosen.commit, tiny=chosen.tiny)
    runs: dict[str, Call] = {
        "checks": lambda: checks(report),
        "mean": lambda: steps(report, "mean"),
        "kernels": lambda: steps(report, "kernels"),
        "prompts": lambda: prompts(report),
        "launches": lambda: launches(report),
    }
    for name in (name for name in PARTS if name in chosen.only):
        if time.monotonic() - begin > chosen.budget:
            report.log(f"{name}: out of time")
            continue
        try:
            runs[name]()
        except Exception as error:
            report.log.wrong.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[-300:]}")
        if ON_GPU:
            torch.cuda.empty_cache()
        report.log(f"{name} done after {time.monotonic() - begin:.0f} s")
    log = report.log
    for line in (*log.wrong, *report.table, f"{len(log.wrong)} wrong, {time.monotonic() - begin:.0f} s"):
        log(line)
    return 1 if log.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
