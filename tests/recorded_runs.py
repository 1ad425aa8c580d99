"""Searches without their evaluations: every event and every entry goes through the search's own recorder, the numbers are drawn.

The time of a model is a sum over its layers, so that what is over the budget is what has too many slow ones.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from heddle.search.durable import write_json, write_whole
from heddle.search.events import EventLog
from heddle.search.ledger import Entry, Ledger
from heddle.search.record import RUN_FILE, BudgetInfo, Latency, Score, TaskInfo, rung_stage, trial_file

SPEC = """version: 1
name: {name}
model:
  vocab_size: 256
  hidden_size: 64
  blocks:
    linear: {{mixer: {{kind: {kind}, heads: 2}}, channel: {{kind: swiglu}}}}
    full: {{mixer: {{kind: attention, heads: 2}}, channel: {{kind: swiglu}}}}
  layers: [{layers}]
"""
KINDS = ("gated_deltanet", "lightning", "mamba2")
LAYERS = 24
TASKS = (
    TaskInfo("mqar", "accuracy", True, 0.125, 1.0),
    TaskInfo("text", "bits_per_byte", False, 4.6, 0.0),
)
BUDGET = BudgetInfo("decode_ms@1x4096", "decode", 0.8, "all-full", 1, 4096)
# Milliseconds without layers, and of a layer of each block.
FRAME_MS, LINEAR_MS, FULL_MS = 0.6, 0.1, 0.25
REFERENCE_MS = FRAME_MS + LAYERS * FULL_MS
# How far one timing is off, and how far what a model predicts.
NOISE, OFF = 0.01, 0.02
FAILED = 0.04
WHY = (
    "mqar: loss-not-finite: the loss is nan at step 7",
    "text: out-of-memory: CUDA out of memory",
    "text: worker-died: the process ended",
)


# Seconds that a timing takes, and a training; two workers share them.
TIMED_S, TRAINED_S, WORKERS = 4.0, 20.0, 2


class PacedLog(EventLog):
    """The engine's log on a clock that goes on when it is told to."""

    passed_s = 0.0

    @property
    def clock_s(self) -> float:
        return self.passed_s


class Recorded:
    """A search of `trials` in `folder`; `has_all` is one with rungs, a latency model and second timings too."""

    def __init__(
        self, folder: Path, trials: int, *, name: str = "ten-thousand", seed: int = 0, has_all: bool = False
    ) -> None:
        self.folder, self.trials, self.name, self.has_all = folder, trials, name, has_all
        self.ledger = Ledger(folder / "ledger")
        self.random = random.Random(seed)
        self.scores: dict[int, tuple[float, float]] = {}
        self.layers: dict[int, Sequence[str]] = {}

    def write(self) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / RUN_FILE, self.meta())
        with closing(PacedLog(self.folder)) as log:
            log.write("search_started", machine={}, trials=self.trials, seconds=None)
            self.trial(log, -1, ["full"] * LAYERS)
            for number in range(self.trials):
                full = self.random.randrange(1, LAYERS)
                layers = ["full"] * full + ["linear"] * (LAYERS - full)
                self.random.shuffle(layers)
                self.trial(log, number, layers)
            found = self.front()
            for number in found["front"] if self.has_all else ():
                timed = self.timing(log, number, self.layers[number], key="again")
                log.write("remeasured", number=number, latency={BUDGET.label: timed})
            log.write("front", **found)
            log.write("search_finished", status="finished")
        return self.folder

    def meta(self) -> dict[str, Any]:
        source = SPEC.format(name=self.name, kind="gated_deltanet", layers="linear, full")
        meta: dict[str, Any] = {"format": 1, "kind": "search", "id": "load", "name": self.name}
        meta |= {"spec": source, "tasks": [asdict(task) for task in TASKS], "budgets": [asdict(BUDGET)]}
        meta |= {"trials": self.trials, "seconds": None, "round": 4, "sampler": "tpe"}
        meta |= {"environment": {"device_name": "made up", "packages": {}}}
        if self.has_all:
            meta["rungs"] = {"eta": 3.0, "before": [{"tasks": [asdict(TASKS[0])], "tokens": [100_000]}]}
            meta["latency_model"] = [self.fit()]
        return meta

    def fit(self) -> dict[str, Any]:
        """What is told of a latency model: how far it was off on stacks that it had not seen."""
        placed = [["full"] * full + ["linear"] * (LAYERS - full) for full in range(LAYERS)]
        pairs = [[milliseconds(layers), self.timed(layers)] for layers in placed]
        errors = [measured / predicted - 1 for predicted, measured in pairs]
        unseen = {
            "n": len(pairs),
            "pairs": pairs,
            "mape": fmean(map(abs, errors)),
            "worst": max(map(abs, errors)),
        }
        unseen |= {"constant_mape": 0.31, "flops_mape": 0.08, "spearman": 0.997, "margin": 3 * OFF}
        unseen["measured_over_predicted"] = fmean(errors)
        unseen["bias"] = fmean(predicted / measured - 1 for predicted, measured in pairs)
        unseen |= {"bias_near_budget": unseen["bias"], "near_budget": len(pairs)}
        return {"label": BUDGET.label, "method": "cpu-timer", "held_out": unseen}

    def front(self) -> dict[str, Any]:
        """The members that no other beats in both tasks, from the best in the first task down."""
        members: list[int] = []
        for number, (_, text) in sorted(self.scores.items(), key=lambda item: -item[1][0]):
            if not members or text < self.scores[members[-1]][1]:
                members.append(number)
        best = max(members, key=lambda number: sum(map(_normalised, TASKS, self.scores[number])))
        return {"front": sorted(members), "best": best, "least_violating": []}

    def trial(self, log: PacedLog, number: int, layers: list[str]) -> None:
        kind = KINDS[number % len(KINDS)]
        text = SPEC.format(name=self.name, kind=kind, layers=", ".join(layers))
        params = {
            "blocks.linear.mixer": {"kind": kind, "heads": 2},
            "layers.placement.count.full": layers.count("full"),
        }
        if number >= 0:
            write_whole(trial_file(self.folder, number), text.encode())
        self.layers[number] = layers
        asked = {
            "round": number // 4,
            "params": params,
            "layers": layers,
            "hash": _hash(number),
            "spec": text,
        }
        log.write("trial_started", number=number, **asked, parameters=1_000_000 + 1000 * layers.count("full"))
        log.write("trial_finished", number=number, **self.told(log, number, layers))

    def told(self, log: PacedLog, number: int, layers: list[str]) -> dict[str, Any]:
        """What became of a trial: it was timed, and trained where it kept the budget."""
        ms = self.timed(layers)
        over = ms / REFERENCE_MS / BUDGET.at_most - 1
        told: dict[str, Any] = {
            "scores": {},
            "attempts": 1,
            "duplicate_of": None,
            "reason": None,
            "wall_s": TIMED_S,
        }
        told |= {
            "latency": {BUDGET.label: self.timing(log, number, layers, ms)},
            "constraints": {BUDGET.label: over},
        }
        if self.has_all:
            off = milliseconds(layers) * (1 + self.random.gauss(0, OFF))
            figure = {"value": off, "margin": 3 * OFF * off, "reference": REFERENCE_MS, "source": "predicted"}
            told["figures"] = {BUDGET.label: figure}
        if number >= 0 and over > 0:
            return told | {"state": "infeasible"}
        if number >= 0 and self.random.random() < FAILED:
            return told | {"state": "failed", "reason": self.random.choice(WHY), "constraints": {}}
        values = self.values(layers)
        if self.has_all and number >= 0:
            told["rungs"] = [{TASKS[0].name: self.training(log, number, TASKS[0], values[0] - 0.2, rung=0)}]
            if number % 4 and values[0] < 0.5 + 0.4 * self.random.random():
                return told | {"state": "pruned", "wall_s": TIMED_S + TRAINED_S}
        if number >= 0:
            self.scores[number] = values
        scores = {
            task.name: self.training(log, number, task, value)
            for task, value in zip(TASKS, values, strict=True)
        }
        spent = TIMED_S + TRAINED_S * (len(scores) + len(told.get("rungs", ())))
        return told | {"state": "complete", "scores": scores, "wall_s": spent}

    def timed(self, layers: Sequence[str]) -> float:
        return milliseconds(layers) * (1 + self.random.gauss(0, NOISE))

    def timing(
        self, log: PacedLog, number: int, layers: Sequence[str], ms: float | None = None, key: str = "k0"
    ) -> str:
        ms = self.timed(layers) if ms is None else ms
        low, high, ratio = ms * 0.98, ms * 1.02, ms / REFERENCE_MS
        row = Latency(
            BUDGET.label, "decode", 1, 4096, ms, low, high, low, high, 40, "all-full", REFERENCE_MS, ratio,
            ratio * 0.98, ratio * 1.02, "cpu", None, "float32", "cpu-timer", 1, {"attention": "sdpa"}, None,
        )  # fmt: skip
        return self.evaluation(log, number, "latency", asdict(row), key)

    def values(self, layers: Sequence[str]) -> tuple[float, float]:
        """Accuracy and bits per byte: full layers are good for both, upper ones for the first and lower ones for the second."""
        share = layers.count("full") / len(layers)
        upper = layers[len(layers) // 2 :].count("full") / len(layers)
        mqar = min(1.0, 0.45 + 0.8 * upper + self.random.gauss(0, 0.04))
        return mqar, 2.4 - 0.4 * (share - upper) + self.random.gauss(0, 0.04)

    def training(
        self, log: PacedLog, number: int, task: TaskInfo, value: float, rung: int | None = None
    ) -> str:
        losses = tuple((step, 5.5 / (1 + step / 30)) for step in range(1, 65))
        score = Score(
            task.name, task.metric, value, 0.01, 500, _normalised(task, value), 0, 90, 400_000, 3.0, losses
        )
        stage = task.name if rung is None else rung_stage(rung, task.name)
        return self.evaluation(log, number, stage, asdict(score))

    def evaluation(
        self, log: PacedLog, number: int, stage: str, result: dict[str, Any], key: str = "k0"
    ) -> str:
        place = {"number": number, "hash": _hash(number), "stage": stage, "key": key}
        wall_s = TIMED_S if stage == "latency" else TRAINED_S
        log.write("evaluation_started", **place, attempt=1)
        self.ledger.put(
            Entry(spec=_hash(number), stage=stage, key=key, inputs={}, result=result, wall_s=wall_s)
        )
        log.passed_s += wall_s / WORKERS
        log.write("evaluation_finished", **place, ok=True, wall_s=wall_s)
        return key


def milliseconds(layers: Sequence[str]) -> float:
    full = list(layers).count("full")
    return FRAME_MS + full * FULL_MS + (len(layers) - full) * LINEAR_MS


def _hash(number: int) -> str:
    return f"{number + 1:016x}"


def _normalised(task: TaskInfo, value: float) -> float:
    return (value - task.chance) / (task.best - task.chance)
