"""Trains each kind of model in a spec's space at each of its tasks, and appends a row for each training.

    python tests/bench/evidence.py examples/quickstart.yaml --topic quickstart --learning-rates 1e-3 3e-3 1e-2 --seeds 2

    python tests/bench/evidence.py tests/bench/mixers.yaml --topic mixers --pure --tasks mqar --learning-rates 1e-3 3e-3 1e-2

    python tests/bench/evidence.py tests/bench/encoders.yaml --topic encoders --pure --learning-rates 1e-3 3e-3 --resume

The kinds are the options of the first choice of the space, with one layer of the last block of its placement, and the
model whose every layer is that block; with `--pure` every layer is the option. Nothing is timed; `wall_s` only tells what a
repetition costs. A training that fails has a row with its error in place of a score. With `--resume` what has a score of this
kind of device in the file, or in that of the results, is not trained again; `--budget` begins no training after so many seconds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import secrets
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import torch

from heddle.compose.build import build
from heddle.compose.plan import plan
from heddle.compose.train import fit
from heddle.search.environment import device_name, pick_device
from heddle.search.tasks import batches, recipe_for, task_of
from heddle.specs import ModelSpec, load, spec_hash

RESULTS = Path(__file__).parent / "results"
Launch = Literal["eager", "graph"]
Job = tuple[str, int, str, float, int, bool, int | None, Launch]


def kinds(path: str, *, pure: bool) -> Iterator[tuple[str, ModelSpec]]:
    """(name, model) of each option, and of the model of one block."""
    file = load(path)
    placement = file.space.placement
    assert placement is not None, "the spec has no placement"
    block = placement.of[-1]
    if not pure:
        yield f"all-{block}", file.resolve(layers=[block] * placement.length).model
    choice = next(parameter for parameter in file.space.parameters if parameter.kind == "choice")
    others = [name for name in placement.of if name != block]
    layers = list(itertools.islice(itertools.cycle(others), placement.length))
    if not pure:
        layers[-1] = block
    for option in choice.choices:
        yield name_of(option, choice.choices), file.resolve({choice.name: option}, layers=layers).model


def name_of(option: dict[str, Any], others: Sequence[dict[str, Any]]) -> str:
    """Its kind, and what else it says where another option is of that kind."""
    kind = str(option["kind"])
    if sum(other["kind"] == kind for other in others) == 1:
        return kind
    told = {
        name: f"{name} {value}".lower() if value is False or isinstance(value, str) else name
        for name, value in option.items()
    }
    return ", ".join((kind, *(text for name, text in told.items() if name not in ("kind", "heads"))))


def run(path: str, job: Job) -> dict[str, Any]:
    """One row: kind, index of the task, name of the device, learning rate, seed, tokens if others than the spec's, launch."""
    torch.set_num_threads(1)
    kind, index, device, learning_rate, seed, pure, tokens, launch = job
    spec, model = load(path).spec, dict(kinds(path, pure=pure))[kind]
    assert spec.search is not None
    wanted = spec.search.tasks[index]
    task = task_of(wanted, spec.model_copy(update={"model": model}))
    recipe = replace(recipe_for(wanted, spec.train, seed=seed), learning_rate=learning_rate)
    recipe = recipe if tokens is None else replace(recipe, tokens=tokens)
    started = time.perf_counter()
    net = build(model, seed=seed, device=device)
    fitted = fit(net, batches(task, recipe, device), recipe, launch=launch)
    score = task.evaluate(net, device=device)
    cost = plan(model).cost(task.sequence_length, element=4)
    return {
        "task": task.name,
        **({} if model.readout is None else {"readout": model.readout.kind}),
        "spec_hash": spec_hash(model),
        "kind": kind,
        "seed": seed,
        "lr": learning_rate,
        "steps": fitted.steps,
        "score": score.value,
        "se": score.se,
        "chance": task.chance,
        **({"extras": dict(score.extras)} if score.extras else {}),
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        "state_elements": round((cost["cache_bytes"] + cost["state_bytes"]) / 4),
        "wall_s": round(time.perf_counter() - started, 2),
    }


def told(path: str, job: Job, until: float) -> dict[str, Any] | None:
    """The row of a job, whatever becomes of it; None if the time was up before."""
    if time.time() > until:
        return None
    try:
        return run(path, job)
    except Exception as error:
        kind, index, _, learning_rate, seed, *_ = job
        spec = load(path).spec
        assert spec.search is not None
        text = " ".join(str(error).split())[:300]
        task = spec.search.tasks[index].kind
        return {"task": task, "kind": kind, "seed": seed, "lr": learning_rate, "score": None, "error": text}


def asked() -> argparse.Namespace:
    """What is asked for on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("spec")
    parser.add_argument("--topic", required=True, help="rows go to results/evidence-<topic>.jsonl")
    parser.add_argument("--learning-rates", type=float, nargs="+", required=True)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--pure", action="store_true", help="every layer is the option")
    parser.add_argument(
        "--tasks", nargs="*", help="the kinds of tasks to train for; all of the spec if not given"
    )
    parser.add_argument("--kinds", nargs="*", help="the kinds to train; all of the spec if not given")
    parser.add_argument("--tokens", type=int, help="tokens of a training, in place of the spec's")
    parser.add_argument(
        "--launch", choices=["eager", "graph"], default="eager", help="graph: each step as one CUDA graph"
    )
    parser.add_argument("--resume", action="store_true", help="leave out what has a score already")
    parser.add_argument("--budget", type=float, help="seconds after which no training is begun")
    parser.add_argument("--commit", help="what the code is, where git cannot tell")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the rows")
    return parser.parse_args()


def main() -> None:
    chosen = asked()
    spec, device = load(chosen.spec).spec, pick_device()
    assert spec.search is not None
    names = [name for name, _ in kinds(chosen.spec, pure=chosen.pure)]
    names = [name for name in names if chosen.kinds is None or name in chosen.kinds]
    tasks = [
        n for n, task in enumerate(spec.search.tasks) if chosen.tasks is None or task.kind in chosen.tasks
    ]
    choices = (
        names,
        tasks,
        [device],
        chosen.learning_rates,
        range(chosen.seeds),
        [chosen.pure],
        [chosen.tokens],
        [chosen.launch],
    )
    jobs = list(itertools.product(*choices))
    path = chosen.out / f"evidence-{chosen.topic}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    if chosen.resume:
        kept = [file for file in {path, RESULTS / path.name} if file.exists()]
        done = set().union(*(scored(file, device_name(device)) for file in kept))
        hashes = {name: spec_hash(model) for name, model in kinds(chosen.spec, pure=chosen.pure)}
        jobs = [
            job
            for job in jobs
            if (spec.search.tasks[job[1]].kind, hashes[job[0]], job[3], job[4]) not in done
        ]
    train_all(chosen, path, jobs, device)


def scored(path: Path, device: str) -> set[tuple[str, str, float, int]]:
    """(task, hash of the spec, learning rate, seed) of each training on such a device that has a score."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    done = [row for row in rows if row.get("score") is not None and row["device"] == device]
    return {(row["task"], row["spec_hash"], row["lr"], row["seed"]) for row in done}


def train_all(chosen: argparse.Namespace, path: Path, jobs: list[Job], device: str) -> None:
    """Trains in several processes, and appends a row as each is done."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False
    )
    header = {
        "run": secrets.token_hex(4),
        "commit": chosen.commit or commit.stdout.strip() or None,
        "device": device_name(device),
    }
    until = math.inf if chosen.budget is None else time.time() + chosen.budget
    left = 0
    # A process that is forked cannot use the GPU that this one has looked at.
    with ProcessPoolExecutor(chosen.workers, get_context("spawn")) as pool, path.open("a") as rows:
        for done in as_completed([pool.submit(told, chosen.spec, job, until) for job in jobs]):
            row = done.result()
            if row is None:
                left += 1
                continue
            made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            rows.write(json.dumps({**header, "time": made, **row}) + "\n")
            rows.flush()
            print(
                f"{row['task']:5} {row['kind']:16} lr {row['lr']:g} seed {row['seed']} {row.get('error', row['score'])}",
                flush=True,
            )
    if left:
        print(f"{left} trainings were not begun in {chosen.budget:g} s; --resume goes on with them")


if __name__ == "__main__":
    main()
