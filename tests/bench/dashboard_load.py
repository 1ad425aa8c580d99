"""Times `heddle dashboard` on a run of 10,000 trials, written by the search's own event log and ledger; appends a row.

    python tests/bench/dashboard_load.py [--trials 10000] [--run FOLDER] [--note "the machine was shared"]

Start is from the command to the first answer; first view is to all plots drawn in Chromium; an interaction is from a
click to the new page drawn. Figures of a machine that others use at the same time say so in `note`.
"""

from __future__ import annotations

import random
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from heddle.search.durable import write_json, write_whole
from heddle.search.events import EventLog
from heddle.search.ledger import Entry, Ledger
from heddle.search.record import RUN_FILE, BudgetInfo, Latency, Score, TaskInfo, trial_file

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "tests/bench/results/evidence-dashboard.jsonl"
SPEC = """version: 1
name: ten-thousand
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
# Shares of trials that are over budget, that fail, and that wait.
OVER, FAILED = 0.25, 0.03


class Writer:
    """A search without its evaluations: every event and every entry goes through the search's own writers."""

    def __init__(self, folder: Path, trials: int) -> None:
        self.folder, self.trials = folder, trials
        self.ledger = Ledger(folder / "ledger")
        self.random = random.Random(0)
        self.scores: dict[int, tuple[float, float]] = {}

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        source = SPEC.format(kind="gated_deltanet", layers="linear, full")
        meta: dict[str, Any] = {"format": 1, "kind": "search", "id": "load", "name": "ten-thousand"}
        meta |= {"spec": source, "tasks": [asdict(task) for task in TASKS], "budgets": [asdict(BUDGET)]}
        meta |= {"trials": self.trials, "seconds": None, "round": 4, "sampler": "tpe"}
        meta |= {"environment": {"device_name": "made up", "packages": {}}}
        write_json(self.folder / RUN_FILE, meta)
        with closing(EventLog(self.folder)) as log:
            log.write("search_started", machine=meta["environment"], trials=self.trials, seconds=None)
            self.trial(log, -1, ["full"] * LAYERS)
            for number in range(self.trials):
                full = self.random.randrange(1, LAYERS)
                layers = ["full"] * full + ["linear"] * (LAYERS - full)
                self.random.shuffle(layers)
                self.trial(log, number, layers)
            log.write("front", **self.front())
            log.write("search_finished", status="finished")

    def front(self) -> dict[str, Any]:
        """The members that no other beats in both tasks, from the best in the first task down."""
        members: list[int] = []
        for number, (_, text) in sorted(self.scores.items(), key=lambda item: -item[1][0]):
            if not members or text < self.scores[members[-1]][1]:
                members.append(number)
        return {"front": sorted(members), "best": members[0], "least_violating": []}

    def trial(self, log: EventLog, number: int, layers: list[str]) -> None:
        kind = KINDS[number % len(KINDS)]
        text = SPEC.format(kind=kind, layers=", ".join(layers))
        params = {
            "blocks.linear.mixer": {"kind": kind, "heads": 2},
            "layers.placement.count.full": layers.count("full"),
        }
        spec = f"{number + 1:016x}"
        if number >= 0:
            write_whole(trial_file(self.folder, number), text.encode())
        asked = {"round": number // 4, "params": params, "layers": layers, "hash": spec, "spec": text}
        log.write("trial_started", number=number, **asked, parameters=1_000_000 + 1000 * layers.count("full"))
        fate = self.random.random() if number >= 0 else 1.0
        ratio = 0.3 + 0.5 * layers.count("full") / LAYERS + self.random.gauss(0, 0.02)
        told: dict[str, Any] = {
            "scores": {},
            "latency": {},
            "constraints": {},
            "attempts": 1,
            "duplicate_of": None,
        }
        if fate < FAILED:
            told |= {
                "state": "failed",
                "reason": "mqar: loss-not-finite: the loss is nan at step 7",
                "wall_s": 1.0,
            }
        else:
            told["latency"] = {BUDGET.label: self.timing(log, number, spec, ratio)}
            told["constraints"] = {BUDGET.label: ratio / BUDGET.at_most - 1}
            over = number >= 0 and (fate < FAILED + OVER or ratio > BUDGET.at_most)
            told |= {"state": "infeasible" if over else "complete", "reason": None, "wall_s": 2.0}
            told["scores"] = {} if over else self.trainings(log, number, spec, layers)
        log.write("trial_finished", number=number, **told)

    def timing(self, log: EventLog, number: int, spec: str, ratio: float) -> str:
        low, high = ratio * 0.98, ratio * 1.02
        row = Latency(
            BUDGET.label, "decode", 1, 4096, ratio, low, high, low, high, 40, "all-full", 1.0, ratio, low, high,
            "cpu", None, "float32", "cpu-timer", 1, {"attention": "sdpa"}, None,
        )  # fmt: skip
        return self.evaluation(log, number, spec, "latency", asdict(row))

    def trainings(self, log: EventLog, number: int, spec: str, layers: list[str]) -> dict[str, str]:
        share = layers.count("full") / LAYERS
        mqar = min(1.0, 0.5 + 0.4 * share + self.random.gauss(0, 0.05))
        text = 2.4 - 0.3 * share + self.random.gauss(0, 0.05)
        if number >= 0:
            self.scores[number] = (mqar, text)
        return {
            task.name: self.evaluation(log, number, spec, task.name, asdict(self.score(task, value)))
            for task, value in zip(TASKS, (mqar, text), strict=True)
        }

    def score(self, task: TaskInfo, value: float) -> Score:
        losses = tuple((step, 5.5 / (1 + step / 30)) for step in range(1, 65))
        normalised = (value - task.chance) / (task.best - task.chance)
        return Score(task.name, task.metric, value, 0.01, 500, normalised, 0, 90, 400_000, 3.0, losses)

    def evaluation(self, log: EventLog, number: int, spec: str, stage: str, result: dict[str, Any]) -> str:
        place = {"number": number, "hash": spec, "stage": stage, "key": "k0"}
        log.write("evaluation_started", **place, attempt=1)
        self.ledger.put(Entry(spec=spec, stage=stage, key="k0", inputs={}, result=result, wall_s=1.0))
        log.write("evaluation_finished", **place, ok=True, wall_s=1.0)
        return "k0"
