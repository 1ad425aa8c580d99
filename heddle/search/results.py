"""What a search finds out, as frozen plain data: scores, timings, trials, and the winner's confirmation.

Needs only the standard library; `heddle.search.record` reads these from a run folder.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# What a timing is of: one token after others, a pass over all, a forward and a backward.
PHASES = ("decode", "prefill", "train")


@dataclass(frozen=True, slots=True)
class TaskInfo:
    """One objective of the search. `stage` is its folder in the ledger and its name in scores."""

    name: str
    metric: str
    higher_is_better: bool
    chance: float
    best: float


@dataclass(frozen=True, slots=True)
class BudgetInfo:
    """One limit. `at_most` is milliseconds, bytes or parameters, or with `relative_to` a ratio to that model's.

    `batch` and `context` are 0 where they mean nothing. `peak_in` is the label of the timings that tell the peak of bytes which
    it limits; None where it limits a time, or what `phase` names.
    """

    label: str
    phase: str
    at_most: float
    relative_to: str | None
    batch: int
    context: int
    peak_in: str | None = None

    @property
    def is_measured(self) -> bool:
        """Whether it is about what a timing tells, a time or a peak of bytes; the others are computed from the spec."""
        return self.phase in PHASES

    @property
    def is_timed(self) -> bool:
        """Whether it is about a latency."""
        return self.is_measured and self.peak_in is None

    @property
    def timing(self) -> str:
        """The label under which the timings stand that it goes by."""
        return self.peak_in or self.label

    def limited(self, row: Latency) -> float | None:
        """What of a timing the budget limits, or its ratio to the reference; None where the row does not have it."""
        if self.peak_in is not None:
            return row.peak_bytes if self.relative_to is None else row.peak_ratio
        return row.median_ms if self.relative_to is None else row.ratio


@dataclass(frozen=True, slots=True)
class Figure:
    """What is known of a budget's figure without a timing: `source` is "computed", and exact, or "predicted".

    `value` and `margin` are in the budget's unit; `reference` is the same of the model the budget is relative to. A margin
    of None says that nobody knows how far off a prediction may be.
    """

    value: float
    margin: float | None
    reference: float | None
    source: str

    @property
    def limited(self) -> float:
        """What the budget limits: the value, or its ratio to the reference."""
        return self.value if self.reference is None else self.value / self.reference

    @property
    def least(self) -> float | None:
        """The smallest that `limited` may be, by the margin."""
        if self.margin is None:
            return None
        low = self.value - self.margin
        return low if self.reference is None else low / self.reference


@dataclass(frozen=True, slots=True)
class Score:
    """What one training reached at one task; `normalised` is 0 at chance and 1 at the best possible."""

    task: str
    metric: str
    value: float
    se: float
    n: int
    normalised: float
    seed: int
    steps: int
    tokens: int
    wall_s: float
    # (step, loss in nats), thinned to at most 64 points.
    losses: tuple[tuple[int, float], ...]
    extras: dict[str, float] = field(default_factory=dict)
    # (layer counted from 0, share) of each router, over what the score was taken on.
    learned_share: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Rate:
    """What a training with one of several learning rates reached; `score` is None where it failed, `is_best` where it counts."""

    learning_rate: float
    score: Score | None
    is_best: bool


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What an evaluation gives: `result` is the plain data of a `Score`; `weights` a safetensors file's bytes."""

    result: dict[str, Any]
    weights: bytes | None = None


@dataclass(frozen=True, slots=True)
class Latency:
    """A timing in milliseconds with its 95 % interval, taken turn by turn with the reference model, and the memory it took.

    `ratio` is to the reference of the same turns. `method` is "cuda-graph", "cuda-events" or "cpu-timer";
    `foreign` counts processes of others on the device, None where that cannot be seen.
    """

    label: str
    phase: str
    batch: int
    context: int
    median_ms: float
    low_ms: float
    high_ms: float
    p10_ms: float
    p90_ms: float
    n: int
    reference: str | None
    reference_ms: float | None
    ratio: float | None
    ratio_low: float | None
    ratio_high: float | None
    device: str
    driver: str | None
    dtype: str
    method: str
    threads: int
    paths: dict[str, str]
    foreign: int | None
    # Clocks, power, temperature and throttling of the GPU while it was timed; None where NVML does not tell.
    gpu: dict[str, Any] | None = None
    # How often it was measured anew, since processes of others or throttling disturbed it; this is the last time.
    repeated: int = 0
    # "task" or "random" tokens, "trained" or "fresh" weights: where routers choose, both decide what is computed.
    inputs: str = "random"
    weights: str = "fresh"
    # [layer counted from 0, share] of each router in what was timed, as of `Score`.
    learned_share: list[list[float]] = field(default_factory=list)
    # The most bytes of tensors at one time, weights and caches included; None in a row of before they were measured.
    peak_bytes: int | None = None
    reference_peak_bytes: int | None = None

    @property
    def peak_ratio(self) -> float | None:
        """The peak over the reference's, where both are known."""
        if self.peak_bytes is None or self.reference_peak_bytes is None:
            return None
        return self.peak_bytes / self.reference_peak_bytes


@dataclass(frozen=True, slots=True)
class Trial:
    """One spec of the search.

    `state` is "running", "complete", "infeasible" (over a budget, never trained), "pruned" (not among the best at a
    rung, see `rungs`) or "failed" (see `reason`).
    `constraints` are violations as shares of the budget: at most 0 keeps it. `duplicate_of` is the earlier
    trial with the same spec, whose results were taken from the ledger.
    """

    number: int
    state: str
    params: dict[str, Any]
    layers: tuple[str, ...]
    hash: str
    round: int
    spec: str
    parameters: int
    scores: dict[str, Score]
    latency: dict[str, Latency]
    constraints: dict[str, float]
    reason: str | None
    attempts: int
    wall_s: float
    duplicate_of: int | None
    # The timing taken again at the end, for members of the Pareto front; all phases, not only budgeted ones.
    remeasured: dict[str, Latency] = field(default_factory=dict)
    # By label of the budget: what was computed, and what a latency model predicted. Never a measurement.
    figures: dict[str, Figure] = field(default_factory=dict)
    # What shorter trainings reached, by rung and task. Never comparable with `scores`, which a pruned trial has none of.
    rungs: tuple[dict[str, Score], ...] = ()
    # By the folder of the ledger, a task's name or that of a rung: each of several learning rates, in the order of the list.
    rates: dict[str, tuple[Rate, ...]] = field(default_factory=dict)

    @property
    def feasible(self) -> bool:
        """Measured, and within every budget."""
        return self.state == "complete" and all(value <= 0 for value in self.constraints.values())

    @property
    def violation(self) -> float:
        """How far over the budgets, summed over those that are broken; 0 when none is."""
        return sum(value for value in self.constraints.values() if value > 0)

    @property
    def quality(self) -> float | None:
        """Mean normalised score over the tasks; None before all of them are scored."""
        if self.state != "complete" or not self.scores:
            return None
        return sum(score.normalised for score in self.scores.values()) / len(self.scores)

    def quality_at(self, rung: int) -> float | None:
        """Mean normalised score at a rung before the last, counted from 0; None where the trial was not scored there."""
        if rung >= len(self.rungs):
            return None
        return sum(score.normalised for score in self.rungs[rung].values()) / len(self.rungs[rung])

    def best_rate(self, stage: str) -> float | None:
        """The learning rate whose score counts; None where there was one alone, or none that came to a score."""
        return next(
            (one.learning_rate for one in self.rates.get(stage, ()) if one.is_best and one.score), None
        )

    def best_is_at(self, stage: str) -> str | None:
        """ "first" or "last" where the best learning rate is that end of its list and better than all others: there may be
        better ones beyond it."""
        rates = self.rates.get(stage, ())
        best = next((one.score.value for one in rates if one.is_best and one.score), None)
        found = [place for place, one in enumerate(rates) if one.score and one.score.value == best]
        return "first" if found == [0] else "last" if found == [len(rates) - 1] else None

    def summary(self) -> dict[str, Any]:
        """The trial in a few plain figures."""
        rungs = [{task: one.value for task, one in rung.items()} for rung in self.rungs]
        rates = {
            stage: [(one.learning_rate, one.score and one.score.value) for one in each]
            for stage, each in self.rates.items()
        }
        return {
            **({"rungs": rungs} if rungs else {}),
            **({"learning_rates": rates} if rates else {}),
            "number": self.number,
            "state": self.state,
            "hash": self.hash,
            "params": self.params,
            "layers": list(self.layers),
            "parameters": self.parameters,
            "scores": {
                task: {"value": s.value, "se": s.se, "metric": s.metric} for task, s in self.scores.items()
            },
            "quality": self.quality,
            "latency": {
                label: {"median_ms": row.median_ms, "ratio": row.ratio, "peak_bytes": row.peak_bytes}
                for label, row in self.latency.items()
            },
            "figures": {
                label: {"value": one.value, "margin": one.margin, "source": one.source}
                for label, one in self.figures.items()
            },
            "constraints": self.constraints,
            "reason": self.reason,
        }


@dataclass(frozen=True, slots=True)
class RankCorrelation:
    """Kendall's tau-b between the scores of a rung, counted from 1, and of the one after it, with a 95 % bootstrap interval.

    Over the `n` specs that were scored at both, which are those that went on. `task` is None for the mean normalised score.
    tau is None with too few specs, or where one of the two says the same of all.
    """

    rung: int
    task: str | None
    n: int
    tau: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Difference:
    """Winner minus uniform, paired by seed, in the metric's own unit, with its 95 % t interval."""

    task: str
    metric: str
    higher_is_better: bool
    winner: tuple[float, ...]
    uniform: tuple[float, ...]
    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """ "better", "worse" or "no difference shown", by whether the interval leaves out zero."""
        if self.low <= 0.0 <= self.high:
            return "no difference shown"
        return "better" if (self.mean > 0) == self.higher_is_better else "worse"


@dataclass(frozen=True, slots=True)
class Confirm:
    """The winner and the uniform placement of equal counts, trained again with seeds the search has not seen.

    `same` says that the winner is the uniform placement: then there is nothing to compare, and differences
    are empty.
    """

    number: int
    hash: str
    layers: tuple[str, ...]
    uniform_hash: str
    uniform_layers: tuple[str, ...]
    same: bool
    seeds: tuple[int, ...]
    scores: dict[str, tuple[float, ...]]
    differences: tuple[Difference, ...]
    failures: tuple[str, ...] = ()
    # The winner's, of tasks that have several: both were trained with them.
    learning_rates: dict[str, float] = field(default_factory=dict)
