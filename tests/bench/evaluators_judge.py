"""How well each quality evaluator orders the placements of the truth set, and what it costs.

    python tests/bench/evaluators_judge.py --seconds 420 --workers 6 --commit SHA --out DIR
    python tests/bench/evaluators_judge.py --seconds 0 --commit SHA
    python tests/bench/evaluators_judge.py --synthetic --dry

First every placement of the spec is valued by each evaluator, in `--workers` processes that share the device; what is done
stands as rows in evaluators_8x2.jsonl, and the next call goes on there (copy it from DIR over the rows first; nothing is
begun after `--seconds`). Then each evaluator is held against the rows of `truth_set.py`, if they are there, and a row for
each task and evaluator is appended to evidence-evaluators.jsonl.

    supernet                weights shared by all placements, trained with twice the tokens of a training, one path a step
    supernet ablation       what full layers lose, each alone, where the linear ones of the same supernet take their place
    supernet restoration    what they give back, each alone, where all others are linear; both are summed over full layers
    ablation, restoration   the same of an all-full model trained alone, whose mixers are replaced by nothing
    short 0.1, short 0.25   a training of its own, with this share of the tokens, and a seed that the truth has not
    random_features         nothing is trained (recall alone: of recall on text, what they say of the spec's other task)
    reach                   nothing runs (the same); one value for all where no layer has a window
    full layers, parameters counted
    random                  any order
    one seed                one of the truth's own seeds held against the others: how far a single whole training goes

Text of 8x2 took an H200 170 s with 6 workers, random features at MQAR a CPU 18 minutes. `gpu_s` is the wall time of
the jobs over the workers that shared the row's `device`, which may be a CPU. `top5_regret` is of the best of an evaluator's
first five,

    (best - found) / (best - median)

in the mean over the orders of equals; `budgets` are the same among the placements within the 25, 50 and 75 % quantiles of
the decode latency. `tau_same_count` counts only pairs of placements with as many full layers, about which counting says
nothing; `tau_over_parameters` is tau-b less that of counting parameters, fewer first where that goes with the truth; each, and
each regret, with its 95 % interval over draws of placements. Of these a draw has some 63 %: of a regret that is much.
"""

from __future__ import annotations

import argparse
import json
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from evaluator_values import KINDS, OF_ANSWERS, SPENT, read_lines, value_all
from made_up import plain
from numpy.typing import NDArray
from truth_set import HERE, SPEC, Space
from truth_told import RECALL, Rows, latencies, read_rows, scores_of, sign, tasks_of, told_of

from heddle.search.rank_correlation import RESAMPLES, SEED, _taus, interval, tau_b
from heddle.specs import load

VALUES, RESULTS = "evaluators_8x2.jsonl", "evidence-evaluators.jsonl"
QUANTILES = (0.25, 0.5, 0.75)
ORDERS = 500
# Of them so many for each draw of placements.
DRAWN_ORDERS = 16
# What a change of kind costs where landscapes are made up, in ms beside 0.08 for a full layer.
BOUNDARY = 0.002


@dataclass(frozen=True, slots=True)
class Truth:
    """By placement: the mean score over seeds and learning rates (higher is better), one seed's and that of the others,
    the decode latency where it was measured; and the seconds of a seed's trainings, one at each rate."""

    score: dict[str, float]
    seeds: dict[str, list[float]]
    ms: dict[str, float]
    seconds: float


def truth_of(rows: Rows, task: str) -> Truth:
    score, seeds, seconds, timed = {}, {}, [0.0], latencies(rows)
    for name, found in scores_of(rows, task).items():
        told = told_of(rows[name], task)
        if told is None:
            continue
        seeds[name] = [sign(task) * one for one in found]
        score[name] = mean(seeds[name])
        trainings = sum(len(one) for one in told["scores"].values())
        seconds.append(len(told["scores"]) * told["seconds"] / trainings / told.get("workers", 1))
    ms = {name: timed[name] for name in score if name in timed}
    return Truth(score, seeds, ms, mean(seconds[1:] or seconds))


def synthetic(seed: int) -> tuple[Truth, list[dict[str, Any]]]:
    """A made-up truth, and evaluators that are it with noise."""
    scores, latencies = plain(seed, BOUNDARY)
    seeds = {"".join("LF"[one] for one in layers): held for layers, held in scores.items()}
    ms = dict(zip(seeds, latencies.values(), strict=True))
    score, rng = {name: mean(held) for name, held in seeds.items()}, np.random.default_rng(seed)
    rows = [
        ("full layers", {name: float(name.count("F")) for name in seeds}),
        ("parameters", {name: float(name.count("F")) for name in seeds}),
        ("random", dict.fromkeys(seeds, 0.0)),
        *(
            (f"noise {size:g}", {n: v + float(size * rng.normal()) for n, v in score.items()})
            for size in (0.1, 1.0)
        ),
    ]
    told = [
        {
            "evaluator": name,
            "task": "synthetic",
            "kind": "synthetic",
            "seconds": 1.0,
            "workers": 1,
            "values": values,
        }
        for name, values in rows
    ]
    return Truth(score, seeds, ms, 1.0), told


def regret(value: Mapping[str, float], score: Mapping[str, float], among: Sequence[str]) -> float | None:
    """How far the best of an evaluator's first five lies from the best, in the mean over orders of equals."""
    true = np.array([score[name] for name in among])
    best, median = true.max(initial=-np.inf), np.median(true) if len(true) else 0.0
    if len(true) < 2 or best <= median:
        return None
    found = [true[order[:5]].max() for order in orders(value, among)]
    return float((best - np.mean(found)) / (best - median))


def orders(value: Mapping[str, float], among: Sequence[str]) -> NDArray[np.int64]:
    """`among`, as indices, in the orders that an evaluator gives it, best first and equals at random. [ORDERS, placements]"""
    rng, values = np.random.default_rng(SEED), np.array([value[name] for name in among])
    found = [np.lexsort((rng.random(len(values)), -values)) for _ in range(ORDERS)]
    return np.array(found, dtype=np.int64)


def regret_interval(
    value: Mapping[str, float], score: Mapping[str, float], among: Sequence[str]
) -> list[float] | None:
    """The 95 % interval of `regret` over draws of placements: those that a draw has not are neither first, found nor best."""
    if regret(value, score, among) is None:
        return None
    true, all_orders = np.array([score[name] for name in among]), orders(value, among)
    rng = np.random.default_rng(SEED)
    often = rng.multinomial(len(true), np.full(len(true), 1 / len(true)), size=RESAMPLES)
    lost = []
    for draw in often:
        order = all_orders[rng.integers(ORDERS, size=DRAWN_ORDERS)]
        has = draw[order] > 0
        found = np.where(has & (has.cumsum(axis=1) <= 5), true[order], -np.inf).max(axis=1).mean()
        best, median = true[draw > 0].max(), np.median(np.repeat(true, draw))
        if best > median:
            lost.append((best - found) / (best - median))
    return [*map(float, np.quantile(lost, [0.025, 0.975]))] if lost else None


def same_count(value: Mapping[str, float], score: Mapping[str, float]) -> list[float] | None:
    """tau-b over pairs with as many full layers, with its 95 % interval over draws of placements."""
    names = list(score)
    count = np.array([name.count("F") for name in names])
    pair = (count[:, None] == count[None, :]).astype(np.float64)
    one, other = (np.array([side[name] for name in names]) for side in (value, score))
    signs = [np.sign(side[:, None] - side[None, :]) * pair for side in (one, other)]
    rng = np.random.default_rng(SEED)
    often = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=RESAMPLES)
    drawn = np.concatenate([np.ones((1, len(names))), often])
    same, first, second = (
        (drawn @ each * drawn).sum(axis=1) for each in (signs[0] * signs[1], abs(signs[0]), abs(signs[1]))
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        taus = same / np.sqrt(first * second)
    if np.isnan(taus[0]):
        return None
    return [float(taus[0]), *map(float, np.nanquantile(taus, [0.025, 0.975]))]


def over(value: Sequence[float], counted: Sequence[float], score: Sequence[float]) -> list[float] | None:
    """tau-b less that of parameters in the order that serves them, with its 95 % interval over the same draws of placements."""
    rng = np.random.default_rng(SEED)
    often = rng.multinomial(len(score), np.full(len(score), 1 / len(score)), size=RESAMPLES)
    drawn = np.concatenate([np.ones((1, len(score))), often]).astype(np.float32)
    fewer_first = (tau_b(counted, score) or 0.0) < 0.0
    gain = _taus(value, score, drawn) - _taus(
        [-one for one in counted] if fewer_first else counted, score, drawn
    )
    if np.isnan(gain[0]):
        return None
    return [float(gain[0]), *map(float, np.nanquantile(gain, [0.025, 0.975]))]


def judged(rows: Sequence[Mapping[str, Any]], task: str, truth: Truth) -> Iterator[dict[str, Any]]:
    """A row for each evaluator that has valued all placements of the truth, and for one of the truth's own seeds."""
    mine = [row for row in rows if asked_of(row, task)]
    values: dict[str, dict[str, float]] = {}
    for row in mine:
        # Scores of layers and counts are better higher at every task.
        is_score = row["evaluator"] == "supernet" or row["kind"] == "short"
        better = sign(task) if is_score else 1.0
        known = {name: better * one for name, one in row["values"].items() if one is not None}
        # A training that failed is the worst.
        lost = dict.fromkeys(row["values"], min(known.values(), default=0.0) - 1.0)
        values.setdefault(row["evaluator"], {}).update(lost | known)
    for name, value in values.items():
        if not value or truth.score.keys() - value.keys():
            continue
        kind = next(row["kind"] for row in mine if row["evaluator"] == name)
        spent = {name, *SPENT.get(name, ())}
        own = [row for row in mine if row["kind"] == kind and row["evaluator"] in spent]
        cost = {
            "gpu_s": sum(row["seconds"] / row["workers"] for row in own),
            "workers": max(row["workers"] for row in own),
            "device": own[0].get("device", "cpu"),
        }
        yield {"impl": name, **told(value, values.get("parameters"), truth.score, truth.ms), **cost}
    seeds = {name: held for name, held in truth.seeds.items() if len(held) > 1}
    first, others = (
        {name: held[0] for name, held in seeds.items()},
        {name: mean(held[1:]) for name, held in seeds.items()},
    )
    yield {
        "impl": "one seed",
        **told(first, values.get("parameters"), others, truth.ms),
        "gpu_s": truth.seconds * len(seeds),
        "workers": 1,
    }


def asked_of(row: Mapping[str, Any], task: str) -> bool:
    """Whether an evaluator's row is held against a task's truth.

    Of recall on text evaluators are asked what they say of the text, and those that read right and wrong answers what they
    say of the spec's task of recall.
    """
    if task != RECALL:
        return bool(row["task"] == task)
    return bool(row["task"] == "text" or row["kind"] in OF_ANSWERS)


def told(
    value: Mapping[str, float],
    counted: Mapping[str, float] | None,
    score: Mapping[str, float],
    ms: Mapping[str, float],
) -> dict[str, Any]:
    names = list(score)
    sides = [[side[name] for name in names] for side in (value, score)]
    tau = tau_b(*sides)
    limits: Any = np.quantile([ms[name] for name in names], QUANTILES) if score.keys() <= ms.keys() else []
    within = [[name for name in names if ms[name] <= limit] for limit in limits]
    return {
        "placements": len(names),
        "tau": tau,
        "tau_interval": None if tau is None else interval(*sides),
        "tau_same_count": same_count(value, score),
        "tau_over_parameters": None
        if counted is None
        else over(sides[0], [counted[name] for name in names], sides[1]),
        "top5_regret": regret(value, score, names),
        "top5_interval": regret_interval(value, score, names),
        "budgets": [regret(value, score, among) for among in within],
        "budgets_intervals": [regret_interval(value, score, among) for among in within],
    }


def judge_all(rows: Sequence[Mapping[str, Any]], chosen: argparse.Namespace, out: Path) -> None:
    made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    header = {"run": secrets.token_hex(4), "time": made, "commit": chosen.commit}
    known = {} if chosen.synthetic else read_rows(chosen.truth)
    if not chosen.synthetic and not known:
        print(f"no truth in {chosen.truth} yet")
    for task in ["synthetic"] if chosen.synthetic else tasks_of(known):
        if chosen.synthetic:
            truth, rows = synthetic(0)
        else:
            truth = truth_of(known, task)
        if len(truth.score) < 2:
            print(f"{task}: no two placements of {chosen.truth} are trained")
            continue
        device = next((row["device"] for row in rows if "device" in row), "cpu")
        for row in judged(rows, task, truth):
            if not chosen.dry:
                with out.open("a") as file:
                    file.write(json.dumps({**header, "device": device, "task": task, **row}) + "\n")
            print(line(task, row), flush=True)


def line(task: str, row: Mapping[str, Any]) -> str:
    def shown(found: Sequence[float] | None) -> str:
        return "none" if found is None else "{:+.2f} [{:+.2f}, {:+.2f}]".format(*found)

    whole = None if row["tau"] is None or row["tau_interval"] is None else [row["tau"], *row["tau_interval"]]
    lost = ", ".join(
        "none" if one is None else f"{100 * one:.0f}" for one in (row["top5_regret"], *row["budgets"])
    )
    return (
        f"{task:9} {row['impl']:20} tau {shown(whole)}, same count {shown(row['tau_same_count'])}, "
        f"over parameters {shown(row['tau_over_parameters'])}, regret {lost} %, {row['gpu_s']:.0f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--spec", type=Path, default=SPEC)
    parser.add_argument("--truth", type=Path, default=HERE / "results" / "truth_8x2.jsonl")
    parser.add_argument("--values", type=Path, default=HERE / "results" / VALUES, help="rows to go on from")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder that is written to")
    parser.add_argument("--seconds", type=float, default=420.0, help="nothing is begun after so many")
    parser.add_argument("--workers", type=int, default=6)
    parser.add_argument("--only", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--tasks", nargs="+", help="tasks that are valued; all of the spec if not given")
    parser.add_argument("--synthetic", action="store_true", help="judge made-up rows")
    parser.add_argument("--dry", action="store_true", help="judge, append nothing")
    parser.add_argument("--commit", help="what the code is")
    chosen = parser.parse_args()
    rows = read_lines(chosen.values)
    known = [task.name for task, _ in Space(load(chosen.spec)).tasks()]
    if strange := set(chosen.tasks or ()) - set(known):
        parser.error(f"no {', '.join(sorted(strange))}: there is {', '.join(known)}")
    if chosen.seconds > 0 and not chosen.synthetic:
        value_all(Space(load(chosen.spec)), rows, chosen, chosen.out / VALUES)
    judge_all(rows, chosen, chosen.out / RESULTS)


if __name__ == "__main__":
    main()
