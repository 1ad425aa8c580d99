"""Trains and times every placement of a spec with two blocks: the truth that ways to search are judged by.

    python tests/bench/truth_set.py train --seconds 540 --workers 3 --commit SHA --out DIR
    python tests/bench/truth_set.py train --more-seeds --seconds 540 --workers 6 --commit SHA --out DIR
    python tests/bench/truth_set.py time --seconds 540 --commit SHA --out DIR
    python tests/bench/truth_set.py join A/truth_8x2.jsonl B/truth_8x2.jsonl ... --out DIR
    python tests/bench/truth_set.py show

A piece of work goes on where the rows (tests/bench/results/truth_8x2.jsonl, one for each placement) end: placements come in
an order drawn once, so that those done at any time are a random sample, and the whole file is written again to DIR after each.
Copy it back over the rows before the next piece, or name it as `--rows`. `--until 590` begins no job that would end later
than that, by what the last ones took: a piece that is cut off loses what was running, and nothing else. `--only 48 --tasks mqar`
does the first 48 of the order at one task, to see how hard it is; each form of a task needs a spec and a file of `--rows` of its
own, since rows do not tell forms apart. On a machine of several GPUs `--gpus 4` has processes on each, of `time` one. Several
machines take `--share 0/4`, `--share 1/4` and so on of the order, with folders of their own, whose rows `join` puts together.

`show` tells for each number of full layers what placements scored and how fast they are, as a table in Markdown; what all of it
took of GPUs; and how hard a task is: of the placements within the quartiles of decode latency (until all are timed, with at most
3, 4 and 5 full layers), the share of the others that lies within seed noise of the best, that is no further from it than twice
the standard error of a difference of two means over seeds, the deviation pooled over all placements. More than a tenth is too
many: then the next harder form is taken (`--spec`), or all placements are trained with three seeds more (`--more-seeds`), which
count like the first. It also tells at which rates trainings learn the task at all, and whether
seeds agree on it.

At each task a placement is trained 9 times, 3 seeds at 3 learning rates, side by side (`heddle.compose.train_many`); its score is
the mean of the nine. Equal seeds see equal examples and, where the blocks agree, equal weights at the start. Batches have one
shape, and another in the steps that `easy_first` makes easy: those of the easier forms of recall that are mixed in are cut to
as many rows and filled up on the right, where nothing is asked. `extras` is what a task tells beside its scores, in their order.
`seconds` is the wall time of the trainings of a task while `workers` processes shared the device, `job_seconds` that of all that
was done for it.

A training on text tells of recall as well: `text recall` is bits per byte where the last four bytes stood earlier in the window.

Timed are a decode step and a prefill at the places below, in turns with the model of all `full`, alone on the device.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import time
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from truth_pools import Job, Pace, Pools, Work, visible
from truth_told import MORE, Rows, by_rate, hardness, ratio_curve, read_rows, spent

from heddle.compose.build import build_causal_lm
from heddle.compose.train import IGNORE, Batches, Recipe
from heddle.compose.train_many import fit_many
from heddle.errors import HeddleError
from heddle.search.environment import device_name, pick_device
from heddle.search.latency import Effort, Place, measure
from heddle.search.tasks import Score, Task, batches, make_task, recipe_for
from heddle.specs import ModelSpec, SpecFile, load, spec_hash

HERE = Path(__file__).parent
SPEC, ROWS = HERE / "truth_8x2.yaml", HERE / "results" / "truth_8x2.jsonl"
SEEDS, MORE_SEEDS, LEARNING_RATES = (0, 1, 2), (4, 5, 6), (2e-3, 3e-3, 4.5e-3)
ORDER_SEED = 8
# Rows of recall that are mixed in have a quarter of the length at least.
FILLED_UP = 4
PLACES = {
    "cuda": (Place("decode", 16, 65_536), Place("prefill", 1, 32_768)),
    "cpu": (Place("decode", 1, 1024), Place("prefill", 1, 256)),
}
EFFORT = Effort(warmup=2, least=10, most=100, seconds=0.3, builds=1)
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


def train(path: str, name: str, index: int, device: str, *, seeds: Sequence[int] = SEEDS) -> dict[str, Any]:
    """The scores of a placement at a task, by learning rate and seed; null where a training failed."""
    model, (task, recipe) = _space(path).model(name), _task(path, index)
    kinds = list(product(LEARNING_RATES, seeds))
    recipes = [replace(recipe, learning_rate=rate, seed=seed) for rate, seed in kinds]
    nets = [build_causal_lm(model, seed=seed, device=device) for _, seed in kinds]
    examples = [_examples(path, index, seed, device) for _, seed in kinds]
    started = time.perf_counter()
    fits = fit_many(
        nets, examples, recipes, launch="graph" if device == "cuda" else "eager", compiled=device == "cuda"
    )
    seconds = time.perf_counter() - started
    scores = [
        None if isinstance(fit, HeddleError) else task.evaluate(net, device=device)
        for net, fit in zip(nets, fits, strict=True)
    ]
    by_rate = {
        f"{rate:g}": [score for (one, _), score in zip(kinds, scores, strict=True) if one == rate]
        for rate in LEARNING_RATES
    }
    return {
        "scores": {rate: [score and score.value for score in seeds] for rate, seeds in by_rate.items()},
        "extras": {rate: extras_of(seeds) for rate, seeds in by_rate.items()},
        "tokens": recipe.tokens,
        "chance": task.chance,
        "seconds": round(seconds, 2),
        "device": device_name(device),
    }


def extras_of(seeds: Sequence[Score | None]) -> dict[str, list[float | None]]:
    """What the scores of seeds hold beside their values, by name; null where a training failed."""
    names = {name: None for score in seeds if score is not None for name in score.extras}
    return {name: [score and round(score.extras[name], 4) for score in seeds] for name in names}


def timed(path: str, name: str, index: int, device: str) -> dict[str, Any]:
    """The latency of a placement at a place, in turns with that of all `full`."""
    space, place = _space(path), PLACES[device][index]
    reference = space.model("F" * space.length)
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
    return {**figures, "method": found.method, "device": found.device}


# What is done of every placement: in processes on each GPU, in the order of the space.


@dataclass(frozen=True, slots=True)
class Kind:
    """Work that gives rows `labels`, each of its size, in so many processes on a GPU; `told`: what is printed of each."""

    work: Work
    labels: Sequence[str]
    sizes: Sequence[int]
    told: str
    workers: int


def kind_of(space: Space, chosen: argparse.Namespace) -> Kind:
    if chosen.what == "time":
        labels = [place.label for place in PLACES[pick_device()]]
        # What is timed has its GPU for itself.
        return Kind(timed, labels, [1] * len(labels), "median_ms", 1)
    tasks = space.tasks()
    labels, sizes = [task.name for task, _ in tasks], [recipe.tokens for _, recipe in tasks]
    if chosen.more_seeds:
        more = functools.partial(train, seeds=MORE_SEEDS)
        return Kind(more, [label + MORE for label in labels], sizes, "scores", chosen.workers)
    return Kind(train, labels, sizes, "scores", chosen.workers)


def jobs(space: Space, rows: Rows, kind: Kind, chosen: argparse.Namespace) -> list[Job]:
    """What is to be done and not in the rows: all placements at one task or place before the next, so that what is cut off is a
    sample of placements, not of tasks."""
    known = [label.removesuffix(MORE) for label in kind.labels]
    if strange := set(chosen.tasks or ()) - set(known):
        raise SystemExit(f"no {', '.join(sorted(strange))}: there is {', '.join(known)}")
    wanted = [index for index, label in enumerate(known) if label in (chosen.tasks or known)]
    names = shared(space.names()[: chosen.only], chosen.share)
    return [
        (name, index)
        for index, name in product(wanted, names)
        if kind.labels[index] not in rows.get(name, {})
    ]


def work_all(space: Space, rows: Rows, chosen: argparse.Namespace, out: Path) -> None:
    device, path, started, kind = pick_device(), str(chosen.spec), time.monotonic(), kind_of(space, chosen)
    left, pace = jobs(space, rows, kind, chosen), Pace(kind.sizes)
    header = {"commit": chosen.commit, "workers": kind.workers}
    with ExitStack() as stack:
        gpus = [None] if chosen.gpus == 1 else visible(chosen.gpus)
        many = [ProcessPoolExecutor(kind.workers, get_context("spawn")) for _ in gpus]
        pools = Pools(kind.work, gpus, [stack.enter_context(one) for one in many], kind.workers)
        while True:
            while left and not pools.is_full():
                now = time.monotonic() - started
                if now > chosen.seconds or now + pace.expected(left[0][1]) > chosen.until:
                    print(f"{len(left)} jobs are left for the next piece", flush=True)
                    left.clear()
                else:
                    pools.begin(path, left.pop(0), device)
            if not pools.running:
                return
            for done, (name, index), seconds in pools.ended():
                label = kind.labels[index]
                if (error := done.exception()) is not None:
                    print(f"{name} {label} failed: {error!r}", flush=True)
                    if isinstance(error, BrokenExecutor):
                        left.clear()
                    continue
                pace.tell(index, seconds)
                row = rows.setdefault(name, new_row(space, name))
                row[label] = {**done.result(), **header, "job_seconds": round(seconds, 2)}
                write_rows(rows, out)
                print(name, label, f"{seconds:.1f} s", row[label][kind.told], flush=True)


def shared(names: Sequence[str], share: str) -> list[str]:
    """Every Nth name from the Kth on, for "K/N"; for "K,L/N" those from the Lth on as well."""
    parts, of = share.split("/")
    return [name for index, name in enumerate(names) if index % int(of) in map(int, parts.split(","))]


def join(paths: Sequence[Path], rows: Rows) -> Rows:
    """The rows with all that those of other files tell of the same placements."""
    for path in paths:
        for name, row in read_rows(path).items():
            rows[name] = {**rows.get(name, {}), **row}
    return rows


def new_row(space: Space, name: str) -> dict[str, Any]:
    return {"placement": name, "full": name.count("F"), "spec_hash": spec_hash(space.model(name))}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["train", "time", "join", "show"])
    parser.add_argument("files", type=Path, nargs="*", help="rows to join")
    parser.add_argument("--tasks", nargs="+", help="tasks trained at or places timed; all if not given")
    parser.add_argument(
        "--share",
        default="0/1",
        help="K/N: every Nth placement of the order from the Kth on; K,L/N: several such",
    )
    parser.add_argument("--spec", type=Path, default=SPEC)
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--out", type=Path, help="folder that the rows are written to; theirs if not given")
    parser.add_argument("--seconds", type=float, default=540.0, help="nothing is begun after so many")
    parser.add_argument(
        "--until", type=float, default=float("inf"), help="no training is begun that would end after so many"
    )
    parser.add_argument("--workers", type=int, default=3, help="processes that train on a GPU")
    parser.add_argument("--more-seeds", action="store_true", help="train with three seeds more")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--only", type=int, help="so many placements of the order")
    parser.add_argument("--commit")
    chosen = parser.parse_args()
    space, rows = Space(load(chosen.spec)), read_rows(chosen.rows)
    out = (chosen.out or chosen.rows.parent) / chosen.rows.name
    if chosen.what in ("train", "time"):
        work_all(space, rows, chosen, out)
    elif chosen.what == "join":
        write_rows(join(chosen.files, rows), out)
    print("\n".join((*ratio_curve(rows), *hardness(rows), *by_rate(rows), *spent(rows))))


if __name__ == "__main__":
    main()
