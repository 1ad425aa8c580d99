"""Judges ways to search placements by the truth set, and appends a row for each way and budget.

    python tests/bench/truth_judge.py --commit SHA
    python tests/bench/truth_judge.py --synthetic --dry

The rows of `tests/bench/truth_set.py` stand for training and timing. A budget is a quantile of the measured decode latencies of
all placements. A way asks for placements within the budget – timing comes first and is free of charge, as it is next to
training – and is told the score of one seed, the mean over learning rates; probes over the budget are told and count too, and
can not win. What it found is the placement of the best score it was told; its gap is

    (best - found) / (best - median)

in the means over seeds, among placements within the budget. A repeat draws which seed is told, and the way's own draws. With
`--told all` an evaluation is the whole of a placement's trainings, and their mean is told. `gap_of_all` is the gap of one who
asks for every placement within the budget: what seeds leave to luck.
`gpu_s` is what the trainings asked for took, at each of the `evaluations` looked at: an equal part of a placement's for each
learning rate and seed, over the workers that shared the device. `own_s` is what the way took of one core in the median,
proposals and solving again included. Placements without a score at the task or without a latency are left out.

`--control shuffled` gives the scores to other placements, and with `duplicate` both kinds are one: all placements are as fast and
as good as each other, but for the noise of seeds. No way may then be ahead of random. With `infeasible` the budget is below the
fastest placement, and none may be found. `--synthetic` makes rows up (`made_up.py`): settings are looked at there, never at the
truth. There each repeat has its own landscape, the first of `--first-seed` (settings were looked at from 1,000 on); `--boundary`
is what a change of kind costs, ms beside 0.08 for a full layer, and `--timing-noise` by which share a timing is off. `timed` is
how many placements `heddle search` asked for in the median, `over` which share of them was over the budget in truth.
"""

from __future__ import annotations

import argparse
import json
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import optuna
from made_up import LANDSCAPES
from truth_told import Rows, latencies, read_rows, scores_of, sign, tasks_of, told_of

from heddle.errors import HeddleError
from heddle.search.placement import Budget, History, Question, Seen, Timed, propose
from heddle.search.placement.loop import Effort, Loop
from heddle.search.placement.seeds import is_seeded, solved
from heddle.specs import uniform_layers

HERE = Path(__file__).parent
ROWS, RESULTS = HERE / "results" / "truth_8x2.jsonl", HERE / "results" / "evidence-truth.jsonl"
EVALUATIONS, LOOKS = 25, (5, 13, 25)
QUANTILES = (0.25, 0.5, 0.75)
# The share of the fastest placement's latency that the budget of a control is.
BELOW = 0.99
Layers = tuple[int, ...]


class Truth:
    """Scores by placement and seed (higher is better), latencies, and what a training takes."""

    def __init__(self, scores: dict[Layers, list[float]], ms: dict[Layers, float], seconds: float) -> None:
        self.scores, self.ms, self.seconds = scores, ms, seconds
        self.length = len(next(iter(scores), ()))

    def within(self, budget: float) -> list[Layers]:
        return [layers for layers in self.scores if self.ms[layers] <= budget]


class Judge:
    """What a way may ask in one repeat, and a diary of it."""

    def __init__(
        self, truth: Truth, budget: float, seed: int, *, timing_noise: float = 0.0, tells_all: bool = False
    ) -> None:
        self.truth, self.budget, self.rng = truth, budget, np.random.default_rng([seed, 11])
        self._tells_all = tells_all
        self.told: dict[Layers, float] = {}
        self.diary: list[Layers] = []
        self._clock, self._noise = np.random.default_rng([seed, 13]), timing_noise
        self.timed: dict[Layers, float] = {}

    @property
    def left(self) -> int:
        return EVALUATIONS - len(self.diary)

    def fits(self, layers: Layers) -> bool:
        return self.truth.ms[layers] <= self.budget

    def time(self, layers: Layers) -> float:
        """What a timing shows, the same when it is asked for again."""
        if layers not in self.timed:
            self.timed[layers] = self.truth.ms[layers] * float(1.0 + self._noise * self._clock.normal())
        return self.timed[layers]

    def __call__(self, layers: Layers) -> float:
        """The score of one seed, or the mean of all; a placement asked for again is answered without a training."""
        if layers not in self.told:
            seeds = self.truth.scores[layers]
            self.told[layers] = mean(seeds) if self._tells_all else seeds[int(self.rng.integers(len(seeds)))]
            self.diary.append(layers)
        return self.told[layers]

    def gap(self, look: int) -> float:
        """The gap after so many evaluations; infinite where none was within the budget."""
        asked = [layers for layers in self.diary[:look] if self.fits(layers)]
        if not asked:
            return float("inf")
        found = mean(self.truth.scores[max(asked, key=lambda layers: self.told[layers])])
        true = [mean(self.truth.scores[layers]) for layers in self.truth.within(self.budget)]
        best, median = max(true), float(np.median(true))
        return (best - found) / (best - median) if best > median else 0.0


Way = Callable[[Judge, int], None]


def ordered(length: int, full: Sequence[int]) -> Layers:
    return tuple(int(layer in full) for layer in range(length))


def spread(length: int, count: int) -> Layers:
    return tuple(int(name == "full") for name in uniform_layers(length, "linear", {"full": count}))


def by_rule(rule: Callable[[int, int], Layers]) -> Way:
    """The placements of a rule, from the most full layers that fit downwards."""

    def way(ask: Judge, seed: int) -> None:  # noqa: ARG001
        length = ask.truth.length
        for count in range(length, -1, -1):
            if ask.left and ask.fits(rule(length, count)):
                ask(rule(length, count))

    return way


def by_random(ask: Judge, seed: int) -> None:
    rng, fitting = np.random.default_rng(seed), ask.truth.within(ask.budget)
    for index in rng.permutation(len(fitting))[:EVALUATIONS]:
        ask(fitting[index])


def by_greedy(ask: Judge, seed: int) -> None:  # noqa: ARG001
    """From none, the full layer that helps most, as long as one fits."""
    length, chosen = ask.truth.length, set[int]()
    ask(ordered(length, []))
    while True:
        more = [layer for layer in range(length) if layer not in chosen]
        fitting = [layer for layer in more if ask.fits(ordered(length, [*chosen, layer]))]
        if not fitting or ask.left < len(fitting):
            return
        chosen.add(max(fitting, key=lambda layer: ask(ordered(length, [*chosen, layer]))))


def by_ranking(ask: Judge, seed: int) -> None:  # noqa: ARG001
    """Probes of none and of single full layers, then all that fits in the order of their sums."""
    length = ask.truth.length
    none = ask(ordered(length, []))
    worth = [ask(ordered(length, [layer])) - none for layer in range(length)]
    sums = {layers: float(np.dot(layers, worth)) for layers in ask.truth.within(ask.budget)}
    for layers in sorted(sums, key=lambda one: -sums[one]):
        if ask.left:
            ask(layers)


def by_search(ask: Judge, seed: int, margin: float = 0.0) -> None:
    """What `heddle search` does, in rounds of 4, `margin` a share added to each timing: Optuna has the number of full
    layers, which the solver puts to it in seeds. Trials over the budget are timed alone, and Optuna is told each at once."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    length, names = ask.truth.length, ("linear", "full")
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    history, timed, seen = History(), list[Timed](), set[tuple[str, ...]]()

    def question(count: int) -> Question:
        counts = {"full": count, "linear": length - count}
        uniform = tuple(names[kind] for kind in spread(length, count))
        return Question(counts, {}, uniform, seen.__contains__, timed=costs, asked=tuple(asked))

    for number in range(4 * EVALUATIONS):
        if not ask.left:
            return
        if number % 4 == 0:
            known, costs, asked = History.of(list(history)), list(timed), list[Any]()
        questions = [question(count) for count in range(length + 1)] if is_seeded(number) else []
        start = solved(questions, known)
        if start is not None:
            study.enqueue_trial({"full": start.count("full")})
        trial = study.ask()
        count = trial.suggest_int("full", 0, length)
        layers = propose(replace(question(count), start=start), known, seed=seed, number=number)
        placed = tuple(names.index(name) for name in layers)
        timed.append(Timed(layers, {}, {"decode": (1.0 + margin) * ask.time(placed) / ask.budget}))
        if ask.time(placed) > ask.budget or layers in seen:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            history.append(Seen(layers, {}, ask(placed)))
            study.tell(trial, history[-1].quality)
        seen.add(layers)
        asked.append((layers, {}))


def by_loop(ask: Judge, seed: int) -> None:
    """The loop, within a latency that is the sum of its layers as fitted to the measured placements."""
    truth, length = ask.truth, ask.truth.length
    rows = np.array(list(truth.ms))
    line = np.column_stack([np.ones(len(rows)), rows])
    fitted = np.linalg.lstsq(line, np.array(list(truth.ms.values())), rcond=None)[0]
    cost = np.column_stack([np.zeros(length), fitted[1:]])
    budget = Budget("latency", cost, ask.budget, constant=float(fitted[0]), steps=256)
    effort = Effort(EVALUATIONS, batch=4, expected=2, tolerance=-1.0)
    loop = Loop(lambda asked: [ask(one) for one in asked], (length, 2), (budget,), effort, seed=seed)
    try:
        loop.run()
    except HeddleError as error:
        # It says so where nothing keeps the budget, as the control wants.
        if error.code != "nothing-feasible":
            raise


WAYS: dict[str, Way] = {
    "uniform": by_rule(spread),
    "first K": by_rule(lambda length, count: ordered(length, range(count))),
    "last K": by_rule(lambda length, count: ordered(length, range(length - count, length))),
    "random": by_random,
    "greedy": by_greedy,
    "additive top-K": by_ranking,
    "loop": by_loop,
    "heddle search": by_search,
    "heddle search, margin": partial(by_search, margin=0.04),
}


def truth_of(rows: Rows, task: str) -> Truth:
    """What rows with the task's scores and a decode latency say; the seconds are those of a training alone at each rate."""
    scores, ms, seconds, timed = {}, {}, [], latencies(rows)
    for name, seeds in scores_of(rows, task).items():
        told = told_of(rows[name], task)
        if name not in timed or told is None:
            continue
        rates = told["scores"].values()
        layers = tuple(int(letter == "F") for letter in name)
        scores[layers] = [sign(task) * one for one in seeds]
        ms[layers] = timed[name]
        # Workers that share a device share its time.
        trainings = sum(len(seeds) for seeds in rates) * told.get("workers", 1)
        seconds.append(len(rates) * told["seconds"] / trainings)
    return Truth(scores, ms, mean(seconds or [0.0]))


def shuffled(truth: Truth, seed: int) -> Truth:
    """The same latencies, with the scores of other placements."""
    order = np.random.default_rng(seed).permutation(len(truth.scores))
    values = list(truth.scores.values())
    scores = {layers: values[index] for layers, index in zip(truth.scores, order, strict=True)}
    return Truth(scores, truth.ms, truth.seconds)


def duplicate(truth: Truth, seed: int) -> Truth:
    """Equal latencies, and scores that differ by noise alone: of each placement, how its seeds lie about their mean."""
    rng, middle = np.random.default_rng(seed), float(np.median(list(truth.ms.values())))
    # Drawn with replacement, or all means would be equal.
    scores = {
        layers: [float(one) for one in rng.choice(np.subtract(seeds, mean(seeds)), len(seeds))]
        for layers, seeds in truth.scores.items()
    }
    return Truth(scores, dict.fromkeys(truth.ms, middle), truth.seconds)


CONTROLS: dict[str, Callable[[Truth, int], Truth]] = {
    "shuffled": shuffled,
    "duplicate": duplicate,
    "infeasible": lambda truth, seed: truth,  # noqa: ARG005
}


def interval(gaps: Sequence[float]) -> list[float] | None:
    """The 95 % bootstrap interval of the median."""
    if not np.isfinite(gaps).all():
        return None
    rng, values = np.random.default_rng(0), np.array(gaps)
    medians = np.median(values[rng.integers(0, len(values), (2000, len(values)))], axis=1)
    return [float(share) for share in np.quantile(medians, [0.025, 0.975])]


def judged(truths: Sequence[Truth], way: str, quantile: float, chosen: argparse.Namespace) -> dict[str, Any]:
    """One row: repeats of a way at a budget, in turns over `truths`."""
    gaps, asked, timed, over, own, of_all, tells_all = [], [], [], [], [], [], chosen.told == "all"
    for repeat in range(chosen.repeats):
        truth = truths[repeat % len(truths)]
        budget = float(np.quantile(list(truth.ms.values()), quantile))
        if chosen.control == "infeasible":
            budget = BELOW * min(truth.ms.values())
        ask, everything = (
            Judge(truth, budget, repeat, timing_noise=chosen.timing_noise, tells_all=tells_all)
            for _ in range(2)
        )
        started = time.process_time()
        WAYS[way](ask, repeat)
        own.append(time.process_time() - started)
        gaps.append([ask.gap(look) for look in LOOKS])
        asked.append(len(ask.diary))
        timed.append(len(ask.timed))
        over.append(sum(ms > budget for ms in ask.timed.values()) / max(1, len(ask.timed)))
        for layers in truth.within(budget):
            everything(layers)
        of_all.append(everything.gap(len(everything.diary)))
    by_look = list(zip(*gaps, strict=True))
    each = len(next(iter(truths[0].scores.values()))) if tells_all else 1
    return {
        "impl": way,
        "budget_quantile": quantile,
        "placements": len(truths[0].within(budget)),
        "repeats": chosen.repeats,
        "evaluations": list(LOOKS),
        "gap": [float(np.median(one)) if np.isfinite(np.median(one)) else None for one in by_look],
        "gap_interval": [interval(one) for one in by_look],
        "gap_of_all": float(np.median(of_all)) if np.isfinite(of_all).all() else None,
        "gap_mean": [float(np.mean(one)) if np.isfinite(one).all() else None for one in by_look],
        **({"timed": float(np.median(timed)), "over": float(np.mean(over))} if any(timed) else {}),
        "asked": float(np.median(asked)),
        "gpu_s": [float(np.median(np.minimum(asked, look))) * truths[0].seconds * each for look in LOOKS],
        "own_s": float(np.median(own)),
    }


def rows(chosen: argparse.Namespace) -> Iterator[dict[str, Any]]:
    known = {} if chosen.synthetic else read_rows(chosen.rows)
    if not chosen.synthetic and not known:
        print(f"no truth in {chosen.rows} yet")
    seeds = range(chosen.first_seed, chosen.first_seed + chosen.repeats)
    make = LANDSCAPES[chosen.landscape]
    for task in ("synthetic",) if chosen.synthetic else tasks_of(known):
        truths = (
            [Truth(*make(seed, chosen.boundary), 1.0) for seed in seeds]
            if chosen.synthetic
            else [truth_of(known, task)]
        )
        if len(truths[0].scores) < 2:
            print(f"{task}: no placement of {chosen.rows} is trained and timed")
            continue
        made_of = {
            "landscape": chosen.landscape,
            "seeds": [seeds.start, seeds.stop],
            "boundary": chosen.boundary,
        }
        if chosen.control:
            # One draw for each repeat: a single one would be what a way may find by luck.
            truths = [
                CONTROLS[chosen.control](truths[repeat % len(truths)], 5 + repeat)
                for repeat in range(chosen.repeats)
            ]
        for quantile, way in product(QUANTILES, chosen.ways):
            yield {
                "task": task,
                "control": chosen.control,
                "told": chosen.told,
                **({**made_of, "timing_noise": chosen.timing_noise} if chosen.synthetic else {}),
                **judged(truths, way, quantile, chosen),
            }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--synthetic", action="store_true")
    parser.add_argument("--landscape", choices=list(LANDSCAPES), default="plain", help="of what is made up")
    parser.add_argument("--control", choices=list(CONTROLS))
    parser.add_argument("--told", choices=["seed", "all"], default="seed", help="what an evaluation tells")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--boundary", type=float, default=0.002)
    parser.add_argument("--timing-noise", type=float, default=0.0)
    parser.add_argument("--dry", action="store_true", help="print, append nothing")
    parser.add_argument("--commit", help="what the code is")
    chosen = parser.parse_args()
    common = {"run": secrets.token_hex(4), "commit": chosen.commit, "device": "cpu"}
    for row in rows(chosen):
        made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        if not chosen.dry:
            with chosen.out.open("a") as file:
                file.write(json.dumps({**common, "time": made, **row}) + "\n")
        gaps = ", ".join("no" if gap is None else f"{100 * gap:.1f}" for gap in row["gap"])
        print(
            f"{row['task']:9} {row['budget_quantile']:.2f} {row['impl']:20} gap {gaps} %, {row['asked']:g} asked, "
            f"mean {[round(100 * gap, 1) for gap in row['gap_mean'] if gap is not None]}, over {row.get('over', 0):.2f}, "
            f"{row['gpu_s'][-1]:.0f} GPU s, own {row['own_s']:.2f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
