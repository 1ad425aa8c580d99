"""One call on a GPU machine: is a compiled step of the truth set right, what does it take, and how many processes share a GPU?

    python tests/bench/truth_step.py --out "$OUT" --budget 240 --commit "$(git rev-parse --short=12 HEAD)"
    python tests/bench/truth_step.py --out /tmp/step --budget 100 --tiny

In turn: `rule`, the launches of narrow heads against the float64 reference, and their times beside heads with room; `exact`,
compiled trainings against those that are not, in float32; `step`, milliseconds of a step of nine stacked models, and the kernels
that take the time; `share`, steps a second of all processes that share the GPU (start MPS before to see what it brings). Writes a
row for each to evidence-truth-step.jsonl. Exits with 1 if anything was wrong. `--tiny`: small, on a CPU, not timed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from truth_set import LEARNING_RATES, SEEDS, SPEC, Space, of_one_shape

from heddle.compose import train_layers
from heddle.compose.build import build_causal_lm
from heddle.compose.train_many import _Many, fit_many
from heddle.errors import HeddleError
from heddle.kernels import _gated_delta_rule_launch, gated_delta_rule
from heddle.kernels.accuracy import compare, draw
from heddle.kernels.bench import machine
from heddle.kernels.common.tuning import tuning
from heddle.kernels.configs.gated_delta_rule import HOPPER
from heddle.kernels.configs.launch import Launch
from heddle.search.tasks import batches
from heddle.specs import load

TINY = "--tiny" in sys.argv
DEVICE = "cpu" if TINY else "cuda"
# Of the spec's eight layers; and the steps of a timing.
PLACEMENTS, TIMED = ("LLLLLLLL", "LFLFLFLF", "FFFFFFFF"), 2 if TINY else 60
STEPS = 4 if TINY else 12
# Of the rule: as stacked models call it.
NARROW = {"B": 9 * 64, "H": 2, "HV": 2, "K": 16, "V": 32}
TRIED = [Launch(chunk, 32, warps, 1) for chunk in (16, 32, 64) for warps in (1, 2)] + [Launch(32, 32, 4, 1)]
TOLD = 14
Row = dict[str, Any]


def rule() -> Iterator[Row]:
    """Right, and how fast, by launches of all its kernels."""
    dtype = torch.float32 if TINY else torch.bfloat16
    for K, V, T in ((16, 32, 130), (32, 64, 96), (24, 40, 300)):
        shape = {"B": 2, "H": 1, "HV": 2, "K": K, "V": V, "T": T}
        found = compare(gated_delta_rule, draw(gated_delta_rule, shape, dtype), DEVICE)
        yield {"what": "rule", "shape": shape, "wrong": [str(one) for one in found if not one.ok]}
    if TINY:
        return
    sample = draw(gated_delta_rule, {**NARROW, "T": 128}, dtype).to(DEVICE)
    given = {name: x.requires_grad_(name in sample.wanted) for name, x in sample.arguments.items()}
    given.pop("initial_state", None)

    def call() -> None:
        out, _ = gated_delta_rule(**given)
        torch.autograd.grad(out, [x for x in given.values() if x.requires_grad], sample.upstream[0])

    for launch in TRIED:
        names = ("solve", "forward", "keep", "backward", "gradient")
        with tuning(**dict.fromkeys(names, launch)):
            yield {"what": "rule", "launch": str(launch), "us": by_kernel(call)}
    table = _gated_delta_rule_launch._family
    _gated_delta_rule_launch._family = lambda _: replace(HOPPER, half_narrow=HOPPER.half)  # type: ignore[assignment]
    try:
        yield {"what": "rule", "launch": "with room", "us": by_kernel(call)}
    finally:
        _gated_delta_rule_launch._family = table


def by_kernel(call: Callable[[], object], calls: int = 5) -> dict[str, float]:
    """Microseconds of each kernel in a call, and of all."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    found: dict[str, float] = defaultdict(float)
    for event in seen.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found[event.name[:60]] += event.time_range.elapsed_us() / calls
            found["count"] += 1 / calls
    total = sum(us for name, us in found.items() if name != "count")
    first = sorted(found.items(), key=lambda item: -item[1] * (item[0] != "count"))[:TOLD]
    return {
        "all": round(total, 1),
        "kernels": round(found["count"]),
        **{name: round(us, 1) for name, us in first},
    }


def stacked(space: Space, name: str, index: int, tokens: int | None = None, precision: str = "auto") -> Row:
    """Nine models of a placement with recipes and batches, as arguments of `fit_many`."""
    task, recipe = space.tasks()[index]
    rows = recipe.rows(task.sequence_length)
    size = rows * task.sequence_length
    kinds = list(product(LEARNING_RATES, SEEDS))
    recipe = replace(recipe, tokens=size * TIMED if tokens is None else tokens, precision=precision)
    recipes = [replace(recipe, learning_rate=rate, seed=seed) for rate, seed in kinds]
    held = {
        seed: [
            of_one_shape(batches(task, replace(recipe, seed=seed), DEVICE)(step), rows, task.sequence_length)
            for step in range(8)
        ]
        for seed in SEEDS
    }
    draws = [lambda step, seed=seed: held[seed][step % 8] for _, seed in kinds]
    nets = [build_causal_lm(space.model(name), seed=seed, device=DEVICE) for _, seed in kinds]
    return {"models": nets, "batches": draws, "recipes": recipes}


def exact(space: Space) -> Iterator[Row]:
    """How far the losses of compiled trainings are from those of trainings that are not: about as far as those of weights that
    are changed by a rounding."""
    name, launch = PLACEMENTS[1][: space.length], "eager" if TINY else "graph"
    for index, (task, recipe) in enumerate(space.tasks()):
        tokens = STEPS * recipe.rows(task.sequence_length) * task.sequence_length

        def losses(
            compiled: bool, rounding: float = 0.0, index: int = index, tokens: int = tokens
        ) -> torch.Tensor:
            given = stacked(space, name, index, tokens, "float32")
            for weight in (one for net in given["models"] for one in net.parameters()):
                weight.data *= 1.0 + rounding
            fits = fit_many(*given.values(), launch=launch, compiled=compiled)
            return torch.tensor([fit.losses for fit in fits if not isinstance(fit, HeddleError)])

        usual = losses(False)
        apart, rounded = (float((one - usual).abs().max()) for one in (losses(True), losses(False, 2.0**-22)))
        wrong = [f"{apart:.2e} apart, {rounded:.2e} by a rounding"] if apart > 10.0 * rounded + 1e-5 else []
        yield {
            "what": "exact",
            "task": task.name,
            "placement": name,
            "apart": apart,
            "rounding": rounded,
            "wrong": wrong,
        }


def place(step: int) -> int:
    """A step of the schedule, those of the warm-up only once."""
    return step if step < 5 or TINY else 5 + step % (TIMED - 6)


def step(space: Space) -> Iterator[Row]:
    for (index, (task, _)), name in product(
        enumerate(space.tasks()), PLACEMENTS[1:2] if TINY else PLACEMENTS
    ):
        started = time.perf_counter()
        given = stacked(space, name[: space.length], index)
        run = _Many(given["models"], given["recipes"], TIMED, torch.device(DEVICE), compiled=True)
        drawn = [
            [torch.stack(each) for each in zip(*(draw(at) for draw in given["batches"]), strict=True)]
            for at in range(8)
        ]
        at = iter(range(1 << 30))

        def one(run: _Many = run, at: Iterator[int] = at, drawn: list[list[torch.Tensor]] = drawn) -> None:
            now = next(at)
            run.step(place(now), *drawn[now % 8], graph=not TINY)

        for _ in range(0 if TINY else 5):
            one()
        row = {
            "what": "step",
            "task": task.name,
            "placement": name,
            "first_s": round(time.perf_counter() - started, 1),
        }
        if TINY:
            one()
            yield row
            continue
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(TIMED):
            one()
        torch.cuda.synchronize()
        ms = 1000 * (time.perf_counter() - started) / TIMED
        yield {**row, "ms": round(ms, 3), "us": by_kernel(one)}


def share(path: str, workers: int) -> Row:
    """Steps a second of so many processes, each with a placement of its own."""
    command = [sys.executable, __file__, "--spec", path, "--alone"]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(workers)]
    spans = [[float(one) for one in (each.communicate()[0] or "0 1").split()[-3:]] for each in running]
    first, last = max(begin for begin, _, _ in spans), min(end for _, end, _ in spans)
    # Of the time in which all ran.
    rates = [steps / (end - begin) for begin, end, steps in spans]
    return {
        "what": "share",
        "workers": workers,
        "steps_a_second": round(sum(rates), 1),
        "together_s": round(last - first, 1),
    }


def alone(space: Space) -> None:
    """Prints when it began and ended to step, and how many steps it took."""
    given = stacked(space, PLACEMENTS[1], 0)
    run = _Many(given["models"], given["recipes"], TIMED, torch.device(DEVICE), compiled=True)
    drawn = [draw(0) for draw in given["batches"]]
    inputs, targets = map(torch.stack, zip(*drawn, strict=True))
    for at in range(5):
        run.step(at, inputs, targets, graph=True)
    torch.cuda.synchronize()
    begin, steps = time.time(), 0
    while time.time() < begin + 12:
        for _ in range(20):
            run.step(place(5 + steps), inputs, targets, graph=True)
            steps += 1
        torch.cuda.synchronize()
    print(begin, time.time(), steps)


def work(space: Space, chosen: argparse.Namespace) -> Iterator[Row]:
    began = time.monotonic()
    parts: list[Callable[[], Iterator[Row]]] = [rule, lambda: exact(space), lambda: step(space)]
    if not TINY:
        parts += [lambda many=many: iter([share(str(chosen.spec), many)]) for many in (1, 2, 3, 4, 6)]
    for part in parts:
        if time.monotonic() - began > chosen.budget:
            return
        yield from part()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", type=float, default=240.0, help="seconds after which nothing is begun")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the rows")
    parser.add_argument("--spec", type=Path, default=SPEC.with_name("truth_tiny.yaml") if TINY else SPEC)
    parser.add_argument("--commit", help="the code that ran")
    parser.add_argument("--tiny", action="store_true", help="small, on a CPU")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    space = Space(load(chosen.spec))
    if chosen.alone:
        alone(space)
        return 0
    if TINY:
        train_layers.BACKEND = "eager"
    chosen.out.mkdir(parents=True, exist_ok=True)
    header, lines, wrong = {**machine(torch.device(DEVICE)), "commit": chosen.commit}, [], 0
    for row in work(space, chosen):
        wrong += len(row.get("wrong", ()))
        lines.append(" ".join(f"{key}={value}" for key, value in row.items() if key != "what")[:900])
        print(row["what"], lines[-1], flush=True)
        with (chosen.out / "evidence-truth-step.jsonl").open("a") as file:
            file.write(json.dumps({**header, **row}) + "\n")
    print(f"{len(lines)} rows, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
