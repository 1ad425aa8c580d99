"""A made-up run of `tests/dashboards` as a search that goes by a latency model leaves it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from heddle import specs
from heddle.search.latency_model.stacks import stack_of
from heddle.search.record import read_run

TRIAL = 4
# Milliseconds of held-out stacks, predicted and measured.
UNSEEN = [[1.0 + n / 10, 1.05 + n / 10] for n in range(30)]
# Milliseconds: without layers, of a linear and of a full layer, and where they meet.
FRAME_MS, LINEAR_MS, FULL_MS, PAIR_MS = 0.3, 0.1, 0.25, -0.01


def with_model(
    folder: Path,
    *,
    phases: tuple[str, ...] = ("decode", "prefill"),
    whole: bool = True,
    number: int = TRIAL,
    times: tuple[float, float, float, float] = (FRAME_MS, LINEAR_MS, FULL_MS, PAIR_MS),
) -> Path:
    """A latency model as a search leaves it in its folder, of the terms of one trial; without a term of the full layers
    unless `whole`. `times` are milliseconds."""
    run = read_run(folder)
    frame_ms, linear_ms, full_ms, pair_ms = times
    stack = stack_of(specs.loads(run.trial(number).spec).spec.model)
    terms = dict(zip(stack.blocks, stack.terms, strict=True))
    weights: list[dict[str, Any]] = [{"column": ["frame", stack.frame], "ms": frame_ms}]
    weights.append({"column": ["term", terms["linear"]], "ms": linear_ms})
    weights += [{"column": ["term", terms["full"]], "ms": full_ms}] if whole else []
    weights += [{"column": ["pair", *pair], "ms": pair_ms} for pair in stack.pairs]
    assert run.reference is not None
    fits = [
        {
            "place": {"phase": phase, "batch": 1, "context": 4096},
            "reference_hash": run.reference.hash,
            "sum": {"way": {"has_pairs": True}, "weights": weights},
            "held_out": {"margin": 0.1},
        }
        for phase in phases
    ]
    held = {"kind": "latency-model", "format": 1, "fits": fits}
    (folder / "latency_model.json").write_text(json.dumps(held))
    return folder


def with_predictions(folder: Path) -> Path:
    """The same run as if its search had gone by a model: 5 % too low for every trial."""
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    run = read_run(folder)
    for event in lines:
        if event["event"] == "trial_finished" and event["number"] >= 0:
            timed = run.trial(event["number"]).latency.get("decode_ms@1x4096")
            ms = 1.0 if timed is None else timed.median_ms / 1.05
            figure = {"value": ms, "margin": 0.1, "reference": 2.0, "source": "predicted"}
            event["figures"] = {"decode_ms@1x4096": figure}
    (folder / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    meta = json.loads((folder / "run.json").read_text())
    unseen = dict.fromkeys(("mape", "worst", "constant_mape", "flops_mape", "spearman", "margin"), 0.05)
    unseen |= {"n": 30, "measured_over_predicted": 0.01, "pairs": UNSEEN}
    unseen |= {"bias": -0.012, "bias_near_budget": -0.034, "near_budget": 7}
    meta["latency_model"] = [{"label": "decode_ms@1x4096", "method": "cpu-timer", "held_out": unseen}]
    (folder / "run.json").write_text(json.dumps(meta))
    return folder
