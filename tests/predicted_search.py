"""A tiny search with budgets whose latency model is made up, and a score that is arithmetic: nothing is trained."""

from __future__ import annotations

import sys
from typing import Any

import ray.cloudpickle

from heddle.compose.plan import plan
from heddle.search import space
from heddle.search.evaluate import Evaluation, Training
from heddle.search.latency import Effort, Place
from heddle.search.latency_model.fit import HeldOut, Sum, Way
from heddle.search.latency_model.model import LatencyModel, PlaceFit
from heddle.search.latency_model.stacks import stack_of
from heddle.search.latency_model.table import timing_environment
from heddle.specs import SpecFile

# The workers cannot import this file.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

QUICK = Effort(warmup=1, least=3, most=4, seconds=0.1, builds=1)
SPEC = """
version: 1
name: limits
model:
  vocab_size: 256
  hidden_size: 32
  context_length: 256
  blocks:
    near: {mixer: {kind: attention, heads: 2, window: 8}, channel: {kind: gelu, ratio: 1.0}}
    full: {mixer: {kind: attention, heads: 2}, channel: {kind: gelu, ratio: {choice: [1.0, 2.0]}}}
  layers: {placement: {length: 3, of: [near, full], count: {full: {int: [1, 2]}}}}
search:
  tasks: [{mqar: {pairs: 2, length: 16}}]
  trials: 12
  round: 12
  confirm_seeds: 0
  budgets: []
"""
# Milliseconds of held-out stacks, predicted and measured.
UNSEEN = ((1.0, 1.0), (4.0, 4.4), (4.4, 4.4), (4.9, 5.0))
DECODE = "decode_ms: {at_most: 1.0, relative_to: all-full, context: 64}"


def spec_with(*budgets: str, more: str = "") -> str:
    lines = "".join(f"\n    - {one}" for one in budgets)
    return SPEC.replace("  budgets: []", f"  budgets:{lines}\n{more}".rstrip())


def scored(training: Training, task: Any) -> Evaluation:
    """More parameters, more quality: no training."""
    value = plan(training.model).parameters / 1e5
    result = {
        "task": task.name,
        "metric": task.metric,
        "value": value,
        "se": 0.01,
        "n": 1,
        "normalised": value,
    }
    spent = {"seed": training.recipe.seed, "steps": 1, "tokens": 1, "wall_s": 0.0, "losses": [(1, 0.0)]}
    return Evaluation({**result, **spent, "extras": {}})


def model_of(
    file: SpecFile, *, margin: float | None = 0.05, machine: dict[str, Any] | None = None
) -> LatencyModel:
    """1 ms without layers, 1 ms a layer, 2 ms a full one that is wide: all-full has 4 ms, and 7 ms with wide ones."""
    wide = file.resolve({"blocks.full.channel.ratio": 2.0}).model
    stacks = [stack_of(file.spec.model), stack_of(wide)]
    weights: dict[tuple[str, ...], float] = {("frame", stacks[0].frame): 1.0}
    weights |= {("term", term): 1.0 for stack in stacks for term in stack.terms}
    weights["term", stacks[1].terms[-1]] = 2.0
    unseen = HeldOut(30, 0.02, 0.06, 0.99, 0.001, None, 0, 0.2, 0.1, 2.0, -0.001, margin, UNSEEN)
    reference = space.reference(file, "all-full")
    how = Sum(Way(non_negative=False, has_pairs=False, penalty=1e-3), weights)
    fit = PlaceFit(
        Place("decode", 1, 64), "all-full", reference.hash, 4.0, 4.0, "cpu-timer", 20, 0, 0.02, how, unseen
    )
    return LatencyModel("limits", machine or timing_environment("cpu"), {}, (fit,))
