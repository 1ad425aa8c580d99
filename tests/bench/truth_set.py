"""Trains and times every placement of a spec with two blocks: the truth that ways to search are judged by.

    python tests/bench/truth_set.py train --seconds 540 --workers 3 --commit SHA --out DIR
    python tests/bench/truth_set.py time --seconds 540 --commit SHA --out DIR
    python tests/bench/truth_set.py join A/truth_8x2.jsonl B/truth_8x2.jsonl ... --out DIR
    python tests/bench/truth_set.py show

A piece of work goes on where the rows (tests/bench/results/truth_8x2.jsonl, one for each placement) end: placements come in
an order drawn once, so that those done at any time are a random sample, and the whole file is written again to DIR after each.
Copy it back over the rows before the next piece. `--only 48 --tasks mqar` does the first 48 of the order at one task, to see
how hard it is; each form of a task needs a spec and a file of `--rows` of its own, since rows do not tell forms apart. On a
machine of several GPUs a process each (CUDA_VISIBLE_DEVICES) takes `--share 0/4`, `--share 1/4` and so on of the order, with
folders of their own; `join` puts their rows into one file.

`show` tells for each number of full layers what placements scored, and how hard a task is: of the placements with at most 3, 4
and 5 full layers (the quartiles of latency, which grows with them), the share of the others that lies within seed noise of the
best, that is no further from it than twice the standard error of a difference of two means over seeds, the deviation pooled
over all placements. More than a tenth is too many: then the next harder form is taken (`--spec`).

At each task a placement is trained 9 times, 3 seeds at 3 learning rates, side by side (`heddle.compose.train_many`). Equal
seeds see equal examples and, where the blocks agree, equal weights at the start. Batches have one shape, and another in the steps
that `easy_first` makes easy: those of the easier forms of MQAR that are mixed in are cut to as many rows and filled up on the
right, where nothing is asked. `seconds` is the wall time of the
trainings of a task while `workers` processes shared the device.

Timed are a decode step and a prefill at the places below, in turns with the model of all `full`, alone on the device.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, variance
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from heddle.compose.build import build_causal_lm
from heddle.compose.train import IGNORE, Batches, Recipe
from heddle.compose.train_many import fit_many
from heddle.errors import HeddleError
from heddle.search.environment import device_name, pick_device
from heddle.search.latency import Effort, Place, measure
from heddle.search.tasks import Task, batches, make_task, recipe_for
from heddle.specs import ModelSpec, SpecFile, load, spec_hash

HERE = Path(__file__).parent
SPEC, ROWS = HERE / "truth_8x2.yaml", HERE / "results" / "truth_8x2.jsonl"
SEEDS, LEARNING_RATES = (0, 1, 2), (1e-3, 3e-3, 1e-2)
ORDER_SEED = 8
# Full layers of a placement at the quartiles of all.
QUARTILES = (3, 4, 5)
# Rows of MQAR that are mixed in have a quarter of the length at least.
FILLED_UP = 4
PLACES = {
    "cuda": (Place("decode", 16, 65_536), Place("prefill", 1, 32_768)),
    "cpu": (Place("decode", 1, 1024), Place("prefill", 1, 256)),
}
EFFORT = Effort(warmup=2, least=10, most=100, seconds=0.3, builds=1)
Rows = dict[str, dict[str, Any]]
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Space:
    """The placements of a spec file: names of two letters, one for each layer, F where it is `full`."""

    file: SpecFile

    @property
    def length(self) -> int:
        assert self.file.space.placement is not None
        return self.file.space.placement.length

    def names(self) -> list[str]:
        """All placements in the order in which they are done."""
        names = ["".join(letters) for letters in product("LF", repeat=self.length)]
        random.Random(ORDER_SEED).shuffle(names)
        return names

    def model(self, name: str) -> ModelSpec:
        return self.file.resolve(layers=["full" if letter == "F" else "linear" for letter in name]).model

    def tasks(self) -> list[tuple[Task, Recipe]]:
        spec = self.file.spec
        assert spec.search is not None
        made = (
            make_task(item, spec.data, vocab_size=spec.model.vocab_size, tokenizer=spec.tokenizer)
            for item in spec.search.tasks
        )
        recipes = (recipe_for(item, spec.train) for item in spec.search.tasks)
        return list(zip(made, recipes, strict=True))


def read_rows(path: Path) -> Rows:
    """Rows by placement; none where the file is not there yet."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {row["placement"]: row for row in map(json.loads, lines)}


def write_rows(rows: Rows, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".new")
    beside.write_text("".join(json.dumps(rows[name]) + "\n" for name in sorted(rows)))
    beside.replace(path)


# Training: in processes that keep their tasks and examples.


@functools.cache
def _space(path: str) -> Space:
    torch.set_num_threads(1)
    return Space(load(path))


@functools.cache
def _task(path: str, index: int) -> tuple[Task, Recipe]:
    return _space(path).tasks()[index]


def of_one_shape(drawn: Batch, rows: int, length: int) -> Batch:
    """Inputs and targets as [rows, length]: rows cut off, and short ones filled up where nothing is asked.

    The shortest, which all trainings begin with at the same steps (`easy_first`), stay as they are.
    """
    if drawn[0].shape[1] * FILLED_UP < length:
        return drawn
    inputs, targets = (each[:rows] for each in drawn)
    missing = length - inputs.shape[1]
    return F.pad(inputs, (0, missing)), F.pad(targets, (0, missing), value=IGNORE)


@functools.cache
def _examples(path: str, index: int, seed: int, device: str) -> Batches:
    """All batches of a seed, drawn once: every placement is trained with them."""
    task, recipe = _task(path, index)
    rows = recipe.rows(task.sequence_length)
    draw = batches(task, replace(recipe, seed=seed), device)
    steps = max(1, round(recipe.tokens / (rows * task.sequence_length)))
    held = [of_one_shape(draw(step), rows, task.sequence_length) for step in range(steps)]
    return held.__getitem__


def train(path: str, name: str, index: int, device: str) -> dict[str, Any]:
    """The scores of a placement at a task, by learning rate and seed; null where a training failed."""
    model, (task, recipe) = _space(path).model(name), _task(path, index)
    kinds = list(product(LEARNING_RATES, SEEDS))
    recipes = [replace(recipe, learning_rate=rate, seed=seed) for rate, seed in kinds]
    nets = [build_causal_lm(model, seed=seed, device=device) for _, seed in kinds]
    examples = [_examples(path, index, seed, device) for _, seed in kinds]
    started = time.perf_counter()
    fits = fit_many(
        nets, examples, recipes, launch="graph" if device == "cuda" else "eager", compiled=device == "cuda"
    )
    seconds = time.perf_counter() - started
    scores = [
        None if isinstance(fit, HeddleError) else task.evaluate(net, device=device).value
        for net, fit in zip(nets, fits, strict=True)
    ]
    by_rate = {
        f"{rate:g}": [score for (one, _), score in zip(kinds, scores, strict=True) if one == rate]
        for rate in LEARNING_RATES
    }
    return {"scores": by_rate, "tokens": recipe.tokens, "chance": task.chance, "seconds": round(seconds, 2)}


def train_all(space: Space, rows: Rows, chosen: argparse.Namespace, out: Path) -> None:
    device, path = pick_device(), str(chosen.spec)
    tasks = [task.name for task, _ in space.tasks()]
    wanted = [index for index, task in enumerate(tasks) if chosen.tasks is None or task in chosen.tasks]
    # All placements at one task before the next: what is cut off is a sample of placements, not of tasks.
    left = iter(
        [
            (name, index)
            for index, name in product(wanted, shared(space.names()[: chosen.only], chosen.share))
            if tasks[index] not in rows.get(name, {})
        ]
    )
    until = time.monotonic() + chosen.seconds
    header = {"commit": chosen.commit, "device": device_name(device), "workers": chosen.workers}
    with ProcessPoolExecutor(chosen.workers, get_context("spawn")) as pool:
        running: dict[Future[dict[str, Any]], tuple[str, int]] = {}
        while True:
            while len(running) < chosen.workers and time.monotonic() < until and (job := next(left, None)):
                running[pool.submit(train, path, *job, device)] = job
            if not running:
                return
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                name, index = running.pop(done)
                row = rows.setdefault(name, new_row(space, name))
                row[tasks[index]] = {**done.result(), **header}
                write_rows(rows, out)
                print(name, tasks[index], row[tasks[index]]["scores"], flush=True)


def shared(names: Sequence[str], share: str) -> list[str]:
    """Every Nth name from the Kth on, for "K/N"."""
    first, of = map(int, share.split("/"))
    return list(names[first::of])


def join(paths: Sequence[Path], rows: Rows) -> Rows:
    """The rows with all that those of other files tell of the same placements."""
    for path in paths:
        for name, row in read_rows(path).items():
            rows[name] = {**rows.get(name, {}), **row}
    return rows


def new_row(space: Space, name: str) -> dict[str, Any]:
    return {"placement": name, "full": name.count("F"), "spec_hash": spec_hash(space.model(name))}


def time_all(space: Space, rows: Rows, chosen: argparse.Namespace, out: Path) -> None:
    device, until = pick_device(), time.monotonic() + chosen.seconds
    reference = space.model("F" * space.length)
    for name, place in product(shared(space.names()[: chosen.only], chosen.share), PLACES[device]):
        row = rows.setdefault(name, new_row(space, name))
        if place.label in row:
            continue
        if time.monotonic() > until:
            return
        found = measure(
            space.model(name),
            place,
            reference=reference,
            reference_name="all-full",
            device=device,
            effort=EFFORT,
        )
        kept = ("median_ms", "low_ms", "high_ms", "reference_ms", "ratio", "ratio_low", "ratio_high")
        figures = {key: round(getattr(found, key), 6) for key in kept}
        row[place.label] = {
            **figures,
            "method": found.method,
            "commit": chosen.commit,
            "device": found.device,
        }
        write_rows(rows, out)
        print(name, place.label, figures["median_ms"], f"ratio {figures['ratio']:.4f}", flush=True)


# What the rows tell.


def best_rate(scores: Mapping[str, Sequence[float | None]], *, higher: bool) -> list[float]:
    """The scores of the seeds at the learning rate whose mean is best; failed trainings make a rate the worst."""
    whole = [[one for one in seeds if one is not None] for seeds in scores.values() if None not in seeds]
    if not whole:
        return []
    return (max if higher else min)(whole, key=mean)


def table(rows: Rows) -> Iterator[str]:
    """For each number of full layers: placements done, and the best, median and worst mean score."""
    for task, higher in (("mqar", True), ("text", False)):
        found: dict[int, list[float]] = {}
        for row in rows.values():
            seeds = best_rate(row[task]["scores"], higher=higher) if task in row else []
            if seeds:
                found.setdefault(row["full"], []).append(mean(seeds))
        for full, scores in sorted(found.items()):
            order = sorted(scores, reverse=higher)
            middle = order[len(order) // 2]
            yield f"{task}: {full} full, {len(order):3} placements: {order[0]:.4f} {middle:.4f} {order[-1]:.4f}"


def near_best(scores: Mapping[str, Sequence[float]], *, higher: bool) -> float:
    """The share of the other placements within seed noise of the best; `scores`: of each seed, by placement."""
    noise = mean(variance(seeds) for seeds in scores.values())
    means = [mean(seeds) for seeds in scores.values()]
    best, count = (max if higher else min)(means), len(next(iter(scores.values())))
    reach = 2.0 * math.sqrt(2.0 * noise / count)
    return (sum(abs(one - best) <= reach for one in means) - 1) / (len(means) - 1)


def hardness(rows: Rows) -> Iterator[str]:
    """How many placements a task cannot tell from the best, for the budgets of a quarter, half and three quarters."""
    for task, higher in (("mqar", True), ("text", False)):
        told = {
            name: best_rate(row[task]["scores"], higher=higher) for name, row in rows.items() if task in row
        }
        for most in QUARTILES:
            within = {
                name: seeds for name, seeds in told.items() if len(seeds) > 1 and name.count("F") <= most
            }
            if len(within) > 1:
                share = near_best(within, higher=higher)
                among = f"{len(within)} placements with at most {most} full layers"
                yield f"{task}: {share:.0%} of {among} are within noise of the best"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["train", "time", "join", "show"])
    parser.add_argument("files", type=Path, nargs="*", help="rows to join")
    parser.add_argument("--tasks", nargs="+", help="the tasks trained at; all if not given")
    parser.add_argument(
        "--share", default="0/1", help="K/N: every Nth placement of the order from the Kth on"
    )
    parser.add_argument("--spec", type=Path, default=SPEC)
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--out", type=Path, help="folder that the rows are written to; theirs if not given")
    parser.add_argument("--seconds", type=float, default=540.0, help="nothing is begun after so many")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--only", type=int, help="so many placements of the order")
    parser.add_argument("--commit")
    chosen = parser.parse_args()
    space, rows = Space(load(chosen.spec)), read_rows(chosen.rows)
    out = (chosen.out or chosen.rows.parent) / chosen.rows.name
    if chosen.what == "train":
        train_all(space, rows, chosen, out)
    elif chosen.what == "time":
        time_all(space, rows, chosen, out)
    elif chosen.what == "join":
        write_rows(join(chosen.files, rows), out)
    print("\n".join((*table(rows), *hardness(rows))))


if __name__ == "__main__":
    main()
