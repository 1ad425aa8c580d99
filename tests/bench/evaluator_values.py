"""What each quality evaluator says of every placement of a spec: the work of `evaluators_judge.py`."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from truth_set import Space, of_one_shape

from heddle.compose.build import build_causal_lm
from heddle.compose.hf.model import HeddleForCausalLM
from heddle.compose.plan import plan
from heddle.compose.train import Batches, Recipe
from heddle.compose.train_many import fit_many
from heddle.errors import HeddleError
from heddle.search.environment import device_name, pick_device
from heddle.search.evaluators import LayerScores, layer_scores, random_feature_score, reach_score
from heddle.search.evaluators.supernet import Supernet, fit_supernet
from heddle.search.evaluators.supernet_evaluator import drawn, recipe_of
from heddle.search.evaluators.supernet_paths import paths_of
from heddle.search.tasks import Task, batches
from heddle.specs import load

# Seeds 0 to 2 and 4 to 6 are the truth's.
OWN_SEED = 3
SHARES = (0.1, 0.25)
# Placements of one job: of short trainings, which share their examples, and of probes.
TOGETHER, PROBED = 16, 32
# Sequences that the scores of layers are taken on.
SEQUENCES = 64
# What was spent for an evaluator besides its own rows: the training behind it, and passes that give two of them.
SPENT = {
    "supernet": ("weights",),
    "ablation": ("weights",),
    "restoration": ("weights", "ablation"),
    "supernet ablation": ("weights",),
    "supernet restoration": ("weights", "supernet ablation"),
}
Values = dict[str, float | None]


@dataclass(frozen=True, slots=True)
class Job:
    """What one process does: an evaluator, or several that come of one training, for some placements at a task."""

    kind: str
    task: int
    names: tuple[str, ...]
    share: float = 1.0


@dataclass(frozen=True, slots=True)
class Bench:
    """A task of the spec on a device."""

    space: Space
    task: Task
    recipe: Recipe
    device: str

    def examples(self, recipe: Recipe) -> Batches:
        """Batches of one shape, as a graph wants them."""
        draw, rows = batches(self.task, recipe, self.device), recipe.rows(self.task.sequence_length)
        return lambda step: of_one_shape(draw(step), rows, self.task.sequence_length)

    def value(self, net: HeddleForCausalLM) -> float:
        return float(self.task.evaluate(net, device=self.device).value)

    def trained(self, names: Sequence[str], recipe: Recipe) -> list[HeddleForCausalLM | None]:
        """Models trained one after the other, on equal examples; None where a training failed."""
        examples, on_cuda = self.examples(recipe), self.device == "cuda"
        held = [examples(step) for step in range(self.steps(recipe))]
        launch: Any = "graph" if on_cuda else "eager"
        found = []
        for name in names:
            net = build_causal_lm(self.space.model(name), seed=recipe.seed, device=self.device)
            (fit,) = fit_many([net], [held.__getitem__], [recipe], launch=launch, compiled=on_cuda)
            found.append(None if isinstance(fit, HeddleError) else net)
        return found

    def steps(self, recipe: Recipe) -> int:
        length = self.task.sequence_length
        return max(1, round(recipe.tokens / (recipe.rows(length) * length)))

    def sample(self) -> torch.Tensor:
        return self.task.sample(SEQUENCES, seed=OWN_SEED, device=self.device)[0]


Told = Iterator[tuple[str, Values]]


def by_supernet(bench: Bench, job: Job) -> Told:
    paths = paths_of(bench.space.file)
    recipe = replace(bench.recipe, seed=OWN_SEED)
    net = Supernet(paths.columns, seed=OWN_SEED, device=bench.device)
    longer = recipe_of(net, recipe)
    fit_supernet(
        net, lambda step: drawn(net, paths, seed=OWN_SEED, step=step), bench.examples(longer), longer
    )
    yield "weights", {}
    yield (
        "supernet",
        {name: bench.value(net.select(net.path_of(bench.space.model(name)))) for name in job.names},
    )
    teacher, student = (net.copied(bench.space.model(letter * bench.space.length)) for letter in "FL")
    scores = layer_scores(teacher, bench.sample(), student=student)
    yield from summed(scores, job.names, "supernet ")


def by_layer_scores(bench: Bench, job: Job) -> Told:
    recipe = replace(bench.recipe, seed=OWN_SEED)
    (teacher,) = bench.trained(["F" * bench.space.length], recipe)
    if teacher is None:
        return
    yield "weights", {}
    yield from summed(layer_scores(teacher, bench.sample()), job.names, "")


def summed(scores: LayerScores, names: Sequence[str], before: str) -> Told:
    """What the full layers of each placement are worth in all."""
    for kind, worth in (("ablation", scores.ablation), ("restoration", scores.restoration)):
        yield (
            f"{before}{kind}",
            {
                name: sum(one for one, letter in zip(worth, name, strict=True) if letter == "F")
                for name in names
            },
        )


def by_short_training(bench: Bench, job: Job) -> Told:
    recipe = replace(bench.recipe, seed=OWN_SEED, tokens=round(job.share * bench.recipe.tokens))
    nets = bench.trained(job.names, recipe)
    values = {
        name: None if net is None else bench.value(net) for name, net in zip(job.names, nets, strict=True)
    }
    yield f"short {job.share:g}", values


def by_random_features(bench: Bench, job: Job) -> Told:
    models = ((name, bench.space.model(name)) for name in job.names)
    yield (
        "random_features",
        {
            name: random_feature_score(model, bench.task, seed=OWN_SEED, device=bench.device).value
            for name, model in models
        },
    )


def by_counting(bench: Bench, job: Job) -> Told:
    models = {name: bench.space.model(name) for name in job.names}
    yield "full layers", {name: float(name.count("F")) for name in job.names}
    yield "parameters", {name: float(plan(model).parameters) for name, model in models.items()}
    yield "random", dict.fromkeys(job.names, 0.0)


def by_reach(bench: Bench, job: Job) -> Told:
    yield "reach", {name: reach_score(bench.space.model(name), bench.task).value for name in job.names}


KINDS: dict[str, Callable[[Bench, Job], Told]] = {
    "supernet": by_supernet,
    "layer_scores": by_layer_scores,
    "counting": by_counting,
    "reach": by_reach,
    "random_features": by_random_features,
    "short": by_short_training,
}
# Those that read right and wrong answers.
OF_ANSWERS = ("random_features", "reach")


def work(path: str, job: Job, device: str) -> list[dict[str, Any]]:
    """The rows of a job, one for each evaluator; each tells the seconds since the job began or since the one before."""
    torch.set_num_threads(1)
    space = Space(load(path))
    bench = Bench(space, *space.tasks()[job.task], device)
    rows, started = [], time.perf_counter()
    for name, values in KINDS[job.kind](bench, job):
        now = time.perf_counter()
        row = {"evaluator": name, "task": bench.task.name, "kind": job.kind, "share": job.share}
        rows.append({**row, "seconds": round(now - started, 3), "values": values})
        started = now
    return rows


def jobs_of(
    space: Space, rows: Sequence[Mapping[str, Any]], only: Sequence[str], labels: Sequence[str] | None
) -> list[Job]:
    """What is left to do at the tasks `labels`, all if None, the long ones first."""
    known = [(index, task.name, task.metric) for index, (task, _) in enumerate(space.tasks())]
    tasks = [one for one in known if labels is None or one[1] in labels]
    found = []
    for kind, (index, task, metric) in product(only, tasks):
        if kind in OF_ANSWERS and metric != "accuracy":
            continue
        for share in SHARES if kind == "short" else (1.0,):
            place = (kind, task, share)
            done = {
                name
                for row in rows
                if (row["kind"], row["task"], row["share"]) == place
                for name in row["values"]
            }
            left = [name for name in space.names() if name not in done]
            size = {"short": TOGETHER, "random_features": PROBED}.get(kind, len(space.names()))
            found += [
                Job(kind, index, tuple(left[at : at + size]), share) for at in range(0, len(left), size)
            ]
    return found


def value_all(space: Space, rows: list[dict[str, Any]], chosen: argparse.Namespace, out: Path) -> None:
    device, until = pick_device(), time.monotonic() + chosen.seconds
    left = iter(jobs_of(space, rows, chosen.only, chosen.tasks))
    header = {"commit": chosen.commit, "device": device_name(device), "workers": chosen.workers}
    with ProcessPoolExecutor(chosen.workers, get_context("spawn")) as pool:
        running: dict[Future[list[dict[str, Any]]], Job] = {}
        while True:
            while len(running) < chosen.workers and time.monotonic() < until and (job := next(left, None)):
                running[pool.submit(work, str(chosen.spec), job, device)] = job
            if not running:
                return
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(done)
                if done.exception() is not None:
                    print(f"{job.kind} failed: {done.exception()!r}", flush=True)
                    continue
                for row in done.result():
                    rows.append({**row, **header})
                    print(f"{row['evaluator']}, {row['task']}: {row['seconds']:.1f} s", flush=True)
                write_lines(rows, out)


def write_lines(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".new")
    beside.write_text("".join(json.dumps(row) + "\n" for row in rows))
    beside.replace(path)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
