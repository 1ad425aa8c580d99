"""A run folder as `heddle search` writes it, made up: a front of three, every state, a confirmation."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from heddle.search.ledger import Entry, Ledger

MakeRun = Callable[..., Path]

SPEC = """version: 1
name: made-up
model:
  vocab_size: 256
  hidden_size: 64
  blocks:
    linear: {{mixer: {{kind: gated_deltanet, heads: 2}}, channel: {{kind: swiglu}}}}
    full: {{mixer: {{kind: attention, heads: 2{window}}}, channel: {{kind: swiglu}}}}
  layers: [{layers}]
"""
LABELS = {"decode": "decode_ms@1x4096", "prefill": "prefill_ms@1x4096"}


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Writes a run folder and gives its path; `name` goes wherever a user's words go."""

    def make(
        *, name: str = "made-up", feasible: bool = True, same: bool = False, mean: float = 0.012
    ) -> Path:
        folder = tmp_path / "run"
        writer = _Writer(folder, name)
        writer.trials(feasible)
        writer.meta()
        if feasible:
            writer.confirm(same=same, mean=mean)
        writer.finish("finished" if feasible else "nothing-feasible")
        return folder

    return make


class _Writer:
    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir()
        self.folder, self.name = folder, name
        self.ledger = Ledger(folder / "ledger")
        self.random = random.Random(0)
        self.clock = 0.0
        self.front: list[int] = []

    def event(self, kind: str, **fields: Any) -> None:
        self.clock += 3.5
        line = {
            "event": kind,
            "session": "a",
            "clock_s": self.clock,
            "time": "2026-11-24T03:00:00+00:00",
            **fields,
        }
        with open(self.folder / "events.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    def meta(self) -> None:
        task = {"chance": 0.125, "best": 1.0}
        meta = {
            "kind": "search",
            "name": self.name,
            "spec": SPEC.format(window="", layers="linear, full"),
            "tasks": [
                {"name": "mqar", "metric": "accuracy", "higher_is_better": True, **task},
                {
                    "name": "text",
                    "metric": "bits_per_byte",
                    "higher_is_better": False,
                    "chance": 4.6,
                    "best": 0.0,
                },
            ],
            "budgets": [
                {
                    "label": LABELS["decode"],
                    "phase": "decode",
                    "at_most": 0.8,
                    "relative_to": "all-full",
                    "batch": 1,
                    "context": 4096,
                }
            ],
            "environment": {
                "device_name": f"Test CPU {self.name}",
                "packages": {"torch": "2.13.0"},
                "driver": None,
            },
        }
        (self.folder / "run.json").write_text(json.dumps(meta))

    def trials(self, feasible: bool) -> None:
        self.event("search_started")
        self.trial(-1, "complete", ["full"] * 8, ratio=1.0, mqar=0.99, text=2.40)
        for number in range(12):
            full = number % 7 + 1
            ratio = 0.3 + 0.1 * full
            state = "complete" if feasible and ratio <= 0.8 else "infeasible"
            layers = ["linear"] * (8 - full) + ["full"] * full
            self.trial(number, state, layers, ratio=ratio, mqar=0.4 + 0.1 * full, text=2.6 - 0.03 * number)
        self.trial(
            12,
            "failed",
            ["linear"] * 8,
            reason=f"loss-not-finite: the loss is nan at step 7 of 90 {self.name}",
        )

    def trial(self, number: int, state: str, layers: list[str], **measured: Any) -> None:
        spec_hash = f"{number + 1:016x}"
        params = {"layers.placement.count.full": layers.count("full"), "blocks.full.mixer": self.name}
        spec = SPEC.format(window=", window: 16" if number == 3 else "", layers=", ".join(layers))
        shared = {"number": number, "params": params, "layers": layers, "hash": spec_hash, "round": 0}
        self.event("trial_started", **shared, spec=spec, parameters=123456 + number)
        latency, scores, constraints = {}, {}, {}
        if "ratio" in measured:
            latency = {
                label: self.latency(spec_hash, phase, label, measured["ratio"])
                for phase, label in LABELS.items()
            }
            constraints = {LABELS["decode"]: measured["ratio"] / 0.8 - 1}
        if state == "complete":
            scores = {
                "mqar": self.score(spec_hash, "mqar", measured["mqar"]),
                "text": self.score(spec_hash, "text", measured["text"]),
            }
        told = {
            "state": state,
            "latency": latency,
            "scores": scores,
            "constraints": constraints,
            "attempts": 1,
            "wall_s": 4.2,
        }
        reason = measured.get("reason") or ("decode_ms 1.2 over budget" if state == "infeasible" else None)
        self.event("trial_finished", number=number, **told, reason=reason, duplicate_of=None)

    def latency(self, spec_hash: str, phase: str, label: str, ratio: float, again: str = "") -> str:
        ms = 2.0 * ratio
        row = {
            "label": label,
            "phase": phase,
            "batch": 1,
            "context": 4096,
            "median_ms": ms,
            "low_ms": ms * 0.98,
            "high_ms": ms * 1.02,
        }
        row |= {
            "p10_ms": ms * 0.9,
            "p90_ms": ms * 1.1,
            "n": 40,
            "reference": "all-full",
            "reference_ms": 2.0,
            "ratio": ratio,
        }
        row |= {
            "ratio_low": ratio * 0.99,
            "ratio_high": ratio * 1.01,
            "device": "cpu",
            "driver": None,
            "dtype": "float32",
        }
        row |= {
            "method": "cpu-timer",
            "threads": 2,
            "foreign": None,
            "paths": {"attention": "sdpa", "gated_deltanet": "torch"},
        }
        key = f"{phase}{again}"
        self.ledger.put(Entry(spec=spec_hash, stage="latency", key=key, inputs={}, result=row))
        return key

    def score(self, spec_hash: str, task: str, value: float) -> str:
        metric = "accuracy" if task == "mqar" else "bits_per_byte"
        row = {
            "task": task,
            "metric": metric,
            "value": value,
            "se": 0.01,
            "n": 500,
            "seed": 0,
            "steps": 90,
            "tokens": 400000,
        }
        row |= {
            "normalised": value if task == "mqar" else (4.6 - value) / 4.6,
            "wall_s": 3.1,
            "losses": [[1, 5.5], [90, 0.4]],
            "extras": {},
        }
        self.ledger.put(Entry(spec=spec_hash, stage=task, key="k0", inputs={}, result=row))
        return "k0"

    def confirm(self, *, same: bool, mean: float) -> None:
        pair = {"winner": [0.9 + mean, 0.91 + mean, 0.92 + mean], "uniform": [0.9, 0.91, 0.92]}
        text = {
            "winner": [2.5, 2.5, 2.51],
            "uniform": [2.5, 2.51, 2.5],
            "mean": 0.0,
            "low": -0.01,
            "high": 0.01,
        }
        mqar = {
            "task": "mqar",
            "metric": "accuracy",
            "higher_is_better": True,
            **pair,
            "mean": mean,
            "low": mean - 0.01,
            "high": mean + 0.01,
        }
        value = {
            "number": 4,
            "hash": f"{5:016x}",
            "layers": ["linear"] * 3 + ["full"] * 5,
            "uniform_hash": "f" * 16,
            "uniform_layers": ["linear", "full"] * 4,
            "same": same,
            "seeds": [1001, 1002, 1003],
            "scores": {"mqar": pair["winner"], "text": text["winner"]},
            "differences": []
            if same
            else [mqar, {"task": "text", "metric": "bits_per_byte", "higher_is_better": False, **text}],
            "failures": [],
        }
        (self.folder / "confirm.json").write_text(json.dumps(value))

    def finish(self, status: str) -> None:
        if status == "finished":
            for number in (2, 3, 4):
                key = self.latency(
                    f"{number + 1:016x}", "decode", LABELS["decode"], 0.31 + 0.1 * (number % 7 + 1), "-again"
                )
                self.event("remeasured", number=number, latency={LABELS["decode"]: key})
            self.event("front", front=[2, 3, 4], best=4, least_violating=[])
        else:
            self.event("front", front=[], best=None, least_violating=[0, 7])
        self.event("search_finished", status=status)


@pytest.fixture
def two_runs(make_run: MakeRun, tmp_path: Path) -> Path:
    """A folder with the runs `one` and `two`."""
    runs = tmp_path / "runs"
    runs.mkdir()
    for name in ("one", "two"):
        make_run(name=f"search {name}").rename(runs / name)
    return runs
