"""Finds placements on synthetic landscapes by several methods at equal numbers of evaluations, and appends rows.

python tests/bench/placement_methods.py --commit "$(git rev-parse --short=12 HEAD)"

24 layers, 6 of them full. A placement S is worth Σ_{i in S} u_i + s Σ_{i<j in S} J_ij with u_i ~ N(0, 1),
J_ij ~ N(0, 1) 2^(1-|i-j|) and interaction strength s. The gap is (optimum - found) / (optimum - median) over all 134,596
placements. There is no noise. Interactions fall off with distance, which favours models of close pairs; those see distances 1
and 2 alone. Nothing is trained or timed: this compares how methods spend evaluations, not how good a search of models is.

Probes are evaluations too: of one full layer (24), or of one and of two at distance 1 or 2 (69). TPE draws 24 switches; sets
that do not have 6 layers are mended at random before they are evaluated, and TPE is told that value. The settings of the
loop are those it was first written with; it was looked at on the landscapes of seeds 1,000 to 1,004 alone.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import numpy as np
import optuna

from heddle.search.placement import Problem, Question, Seen, count_budget, propose
from heddle.search.placement.loop import Effort, Loop
from heddle.search.placement.table import Table
from heddle.specs import uniform_layers

RESULTS = Path(__file__).parent / "results"
LENGTH, FULL, EVALUATIONS = 24, 6, 100
LOOKS = (40, 70, 100)
EVERY = np.array(list(combinations(range(LENGTH), FULL)))
COUNT = (count_budget(1, (LENGTH, 2), FULL, FULL),)
Layers = tuple[int, ...]


class Landscape:
    """One landscape, with a diary of what was asked of it."""

    def __init__(self, seed: int, strength: float) -> None:
        rng = np.random.default_rng([seed, 7])
        self.alone = rng.normal(size=LENGTH)
        distance = np.abs(np.arange(LENGTH)[:, None] - np.arange(LENGTH)[None, :])
        pair = np.triu(rng.normal(size=(LENGTH, LENGTH)) * 2.0 ** (1 - distance), 1)
        self.pair = strength * (pair + pair.T)
        inside = self.pair[EVERY[:, :, None], EVERY[:, None, :]].sum(axis=(1, 2)) / 2
        values = self.alone[EVERY].sum(axis=1) + inside
        self.top, self.median = float(values.max()), float(np.median(values))
        self.diary: list[float] = []

    def __call__(self, layers: Layers) -> float:
        """The worth of a placement; one that has not 6 full layers is a probe and can not win."""
        full = np.flatnonzero(layers)
        value = float(self.alone[full].sum() + self.pair[np.ix_(full, full)].sum() / 2)
        self.diary.append(value if len(full) == FULL else -np.inf)
        return value

    def gaps(self) -> list[float]:
        """The gap after each number of evaluations of LOOKS; infinite while all were probes."""
        return [(self.top - max(self.diary[:look])) / (self.top - self.median) for look in LOOKS]


def placed(full: Sequence[int]) -> Layers:
    return tuple(int(layer in full) for layer in range(LENGTH))


def some(rng: np.random.Generator) -> Layers:
    return placed([int(layer) for layer in rng.choice(LENGTH, FULL, replace=False)])


def by_random(ask: Landscape, seed: int) -> None:
    rng, seen = np.random.default_rng(seed), set[Layers]()
    while len(ask.diary) < EVALUATIONS:
        one = some(rng)
        if one not in seen:
            seen.add(one)
            ask(one)


def by_tpe(ask: Landscape, seed: int) -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    rng = np.random.default_rng(seed)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    for _ in range(EVALUATIONS):
        trial = study.ask()
        chosen = [n for n in range(LENGTH) if trial.suggest_categorical(f"full{n}", [False, True])]
        rest = [n for n in range(LENGTH) if n not in chosen]
        if len(chosen) > FULL:
            chosen = [int(n) for n in rng.choice(chosen, FULL, replace=False)]
        else:
            chosen += [int(n) for n in rng.choice(rest, FULL - len(chosen), replace=False)]
        study.tell(trial, ask(placed(chosen)))


def probed(ask: Landscape, window: int) -> tuple[np.ndarray, np.ndarray, list[tuple[Layers, float]]]:
    """Worth of single layers and of pairs, by evaluations with one and two full layers."""
    known = [(placed([layer]), ask(placed([layer]))) for layer in range(LENGTH)]
    unary, pair = np.zeros((LENGTH, 2)), np.zeros((max(1, window), LENGTH, 2, 2))
    unary[:, 1] = [value for _, value in known]
    for distance in range(1, window + 1):
        for layer in range(distance, LENGTH):
            both = placed([layer - distance, layer])
            known.append((both, ask(both)))
            pair[distance - 1, layer, 1, 1] = known[-1][1] - unary[layer, 1] - unary[layer - distance, 1]
    return unary, pair, known


def by_ranking(window: int) -> Callable[[Landscape, int], None]:
    """Probes, and the best of the sums of what they found until the evaluations are spent."""

    def method(ask: Landscape, seed: int) -> None:  # noqa: ARG001
        unary, pair, _ = probed(ask, window)
        ranked = Table(Problem(unary, pair, COUNT), bound=False).ranked()
        for one in islice(ranked, EVALUATIONS - len(ask.diary)):
            ask(one)

    return method


def by_swaps(ask: Landscape, seed: int) -> None:
    """Additive probes, the best of their sums, and swaps of a full layer with another, kept where better."""
    rng = np.random.default_rng(seed)
    unary, pair, _ = probed(ask, 0)
    best = next(Table(Problem(unary, pair, COUNT), bound=False).ranked())
    value, seen, idle = ask(best), {best}, 0
    while len(ask.diary) < EVALUATIONS:
        idle += 1
        if idle > 1000:
            # Every swap was tried: from somewhere else.
            best, value, idle = some(rng), -np.inf, 0
        one = np.array(best)
        here, there = rng.choice(np.flatnonzero(one == 1)), rng.choice(np.flatnonzero(one == 0))
        one[[here, there]] = one[[there, here]]
        swapped = tuple(int(kind) for kind in one)
        if swapped not in seen:
            seen.add(swapped)
            idle = 0
            found = ask(swapped)
            best, value = (swapped, found) if found > value else (best, value)


def by_loop(probes: bool) -> Callable[[Landscape, int], None]:
    """The loop of heddle, from nothing or from 24 probes of one layer."""

    def method(ask: Landscape, seed: int) -> None:
        known = probed(ask, 0)[2] if probes else []
        effort = Effort(EVALUATIONS - len(ask.diary), tolerance=-1.0)
        Loop(
            lambda rows: [ask(one) for one in rows], (LENGTH, 2), COUNT, effort, known=known, seed=seed
        ).run()

    return method


def by_search(ask: Landscape, seed: int) -> None:
    """What `heddle search` asks for at a fixed count, in rounds of 5."""
    seen, history, names = set[tuple[str, ...]](), list[Seen](), ("linear", "full")
    uniform = tuple(uniform_layers(LENGTH, "linear", {"full": FULL}))
    question = Question({"full": FULL, "linear": LENGTH - FULL}, {}, uniform, seen.__contains__)
    for number in range(EVALUATIONS):
        told = number // 5 * 5
        asked = [(one.layers, {}) for one in history[told:]]
        layers = propose(replace(question, asked=asked), history[:told], seed=seed, number=number)
        seen.add(layers)
        history.append(Seen(layers, {}, ask(tuple(names.index(name) for name in layers))))


METHODS: dict[str, Callable[[Landscape, int], None]] = {
    "random": by_random,
    "tpe, a switch a layer": by_tpe,
    "additive top-K": by_ranking(0),
    "additive and swaps": by_swaps,
    "pair probes, window 2": by_ranking(2),
    "loop": by_loop(False),
    "probes and loop": by_loop(True),
    "heddle search": by_search,
}


def told(gap: float) -> float | None:
    """A gap as JSON has it: nothing where no placement was evaluated yet."""
    return gap if np.isfinite(gap) else None


def interval(gaps: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % bootstrap interval of the median."""
    if not np.isfinite(gaps).all():
        return None
    rng, values = np.random.default_rng(0), np.array(gaps)
    medians = np.median(values[rng.integers(0, len(values), (2000, len(values)))], axis=1)
    return float(np.quantile(medians, 0.025)), float(np.quantile(medians, 0.975))


def rows(names: Sequence[str], strengths: Sequence[float], seeds: range) -> Iterator[dict[str, Any]]:
    for name in names:
        for strength in strengths:
            used, gaps = time.process_time(), []
            for seed in seeds:
                ask = Landscape(seed, strength)
                METHODS[name](ask, seed)
                assert len(ask.diary) == EVALUATIONS
                gaps.append(ask.gaps())
            by_look = list(zip(*gaps, strict=True))
            yield {
                "task": "placement: 24 choose 6",
                "impl": name,
                "strength": strength,
                "seeds": [seeds.start, seeds.stop],
                "evaluations": list(LOOKS),
                "gap": [told(float(np.median(one))) for one in by_look],
                "gap_interval": [interval(one) for one in by_look],
                "gap_worst": [told(max(one)) for one in by_look],
                "optimum_found": [sum(gap < 1e-9 for gap in one) for one in by_look],
                "cpu_s": (time.process_time() - used) / len(seeds),
            }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--strengths", type=float, nargs="*", default=[0.0, 0.5, 1.0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "evidence-placement.jsonl")
    parser.add_argument("--commit", help="what the code is")
    chosen = parser.parse_args()
    common = {"run": secrets.token_hex(4), "commit": chosen.commit, "device": "cpu"}
    seeds = range(chosen.first_seed, chosen.first_seed + chosen.seeds)
    for row in rows(chosen.methods, chosen.strengths, seeds):
        made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        with chosen.out.open("a") as file:
            file.write(json.dumps({**common, "time": made, "load": os.getloadavg()[0], **row}) + "\n")
        gaps = ", ".join("no" if gap is None else f"{100 * gap:.2f}" for gap in row["gap"])
        print(
            f"{row['impl']:24} s {row['strength']:g}: gap {gaps} % at {row['evaluations']}, {row['cpu_s']:.2f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
