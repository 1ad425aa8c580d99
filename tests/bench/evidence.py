"""Trains each kind of model in a spec's space at each of its tasks, and appends a row for each training.

    python tests/bench/evidence.py examples/quickstart.yaml --topic quickstart --learning-rates 1e-3 3e-3 1e-2 --seeds 2

    python tests/bench/evidence.py tests/bench/mixers.yaml --topic mixers --pure --tasks mqar --learning-rates 1e-3 3e-3 1e-2

The kinds are the options of the first choice of the space, with one layer of the last block of its placement, and the
model whose every layer is that block; with `--pure` every layer is the option. Nothing is timed; `wall_s` only tells what a
repetition costs. A training that fails has a row with its error in place of a score.
"""

from __future__ import annotations

import argparse
import itertools
import json
import secrets
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from heddle.compose.build import build
from heddle.compose.plan import plan
from heddle.compose.train import fit
from heddle.search.environment import device_name, pick_device
from heddle.search.tasks import batches, make_task, recipe_for
from heddle.specs import ModelSpec, load, spec_hash

RESULTS = Path(__file__).parent / "results"
Job = tuple[str, int, str, float, int, bool]


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
    return ", ".join((kind, *(name for name in option if name not in ("kind", "heads"))))


def run(path: str, job: Job) -> dict[str, Any]:
    """One row: kind, index of the task, name of the device, learning rate, seed."""
    torch.set_num_threads(1)
    kind, index, device, learning_rate, seed, pure = job
    spec, model = load(path).spec, dict(kinds(path, pure=pure))[kind]
    assert spec.search is not None
    wanted = spec.search.tasks[index]
    task = make_task(wanted, spec.data, vocab_size=model.vocab_size, tokenizer=spec.tokenizer)
    recipe = replace(recipe_for(wanted, spec.train, seed=seed), learning_rate=learning_rate)
    started = time.perf_counter()
    net = build(model, seed=seed, device=device)
    fitted = fit(net, batches(task, recipe, device), recipe)
    score = task.evaluate(net, device=device)
    cost = plan(model).cost(task.sequence_length, element=4)
    return {
        "task": task.name,
        "spec_hash": spec_hash(model),
        "kind": kind,
        "seed": seed,
        "lr": learning_rate,
        "steps": fitted.steps,
        "score": score.value,
        "se": score.se,
        "chance": task.chance,
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        "state_elements": round((cost["cache_bytes"] + cost["state_bytes"]) / 4),
        "wall_s": round(time.perf_counter() - started, 2),
    }


def told(path: str, job: Job) -> dict[str, Any]:
    """The row of a job, whatever becomes of it."""
    try:
        return run(path, job)
    except Exception as error:
        kind, index, _, learning_rate, seed, _ = job
        spec = load(path).spec
        assert spec.search is not None
        text = " ".join(str(error).split())[:300]
        task = spec.search.tasks[index].kind
        return {"task": task, "kind": kind, "seed": seed, "lr": learning_rate, "score": None, "error": text}


def main() -> None:
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
    parser.add_argument("--commit", help="what the code is, where git cannot tell")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the rows")
    chosen = parser.parse_args()
    spec, device = load(chosen.spec).spec, pick_device()
    assert spec.search is not None
    names = [name for name, _ in kinds(chosen.spec, pure=chosen.pure)]
    names = [name for name in names if chosen.kinds is None or name in chosen.kinds]
    tasks = [
        n for n, task in enumerate(spec.search.tasks) if chosen.tasks is None or task.kind in chosen.tasks
    ]
    choices = (names, tasks, [device], chosen.learning_rates, range(chosen.seeds), [chosen.pure])
    jobs = list(itertools.product(*choices))
    commit = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False
    )
    header = {
        "run": secrets.token_hex(4),
        "commit": chosen.commit or commit.stdout.strip() or None,
        "device": device_name(device),
    }
    path = chosen.out / f"evidence-{chosen.topic}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    # A process that is forked cannot use the GPU that this one has looked at.
    with ProcessPoolExecutor(chosen.workers, get_context("spawn")) as pool, path.open("a") as rows:
        for done in as_completed([pool.submit(told, chosen.spec, job) for job in jobs]):
            row = done.result()
            made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            rows.write(json.dumps({**header, "time": made, **row}) + "\n")
            rows.flush()
            print(
                f"{row['task']:5} {row['kind']:16} lr {row['lr']:g} seed {row['seed']} {row.get('error', row['score'])}",
                flush=True,
            )


if __name__ == "__main__":
    main()
