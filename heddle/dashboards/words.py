"""A run in words: how scores, latencies and verdicts are written, in the terminal and in the report alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from heddle.dashboards.doubts import at_chance
from heddle.specs.open_values import RESERVED

if TYPE_CHECKING:
    from heddle.search.longer_results import Longer
    from heddle.search.record import (
        BudgetInfo,
        Confirm,
        Difference,
        Figure,
        Latency,
        Run,
        Score,
        TaskInfo,
        Trial,
    )

PATH_WORDS = {
    "triton": "Triton kernel",
    "torch": "plain PyTorch",
    "sdpa": "PyTorch scaled_dot_product_attention",
}
STATE_WORDS = {
    "complete": "trained",
    "pruned": "pruned",
    "infeasible": "over budget",
    "failed": "failed",
    "running": "not finished",
}


def value_text(metric: str, value: float) -> str:
    """A score's value: accuracy in percent, anything else with four digits."""
    return f"{100 * value:.1f} %" if metric == "accuracy" else f"{value:.4f}"


def score_text(score: Score) -> str:
    """A score with its standard error."""
    if score.metric == "accuracy":
        return f"{100 * score.value:.1f} ± {100 * score.se:.1f} %"
    return f"{score.value:.4f} ± {score.se:.4f}"


def rate_text(trial: Trial, stage: str) -> str:
    """Which of several learning rates a score is of, to be put behind it; nothing where there was one."""
    rate, end = trial.best_rate(stage), trial.best_is_at(stage)
    if rate is None:
        return ""
    return f" at learning rate {rate:g}" + ("" if end is None else f" (the {end} of its list)")


def unit_text(metric: str) -> str:
    """What a score counts."""
    return {"bits_per_byte": "bits per byte"}.get(metric, metric)


def metric_text(task: TaskInfo) -> str:
    """The task's name, its unit and which way is better."""
    return (
        f"{task.name}, {unit_text(task.metric)} ({'higher' if task.higher_is_better else 'lower'} is better)"
    )


def duration_text(seconds: float) -> str:
    """A time span with two units at most."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def count_text(value: float) -> str:
    """A count with a unit prefix: 1.23 M."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:.0f}"


def bytes_text(value: float) -> str:
    """A number of bytes in binary units."""
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if abs(value) >= 1 << power:
            return f"{value / (1 << power):.3g} {unit}"
    return f"{value:.0f} B"


def budget_text(budget: BudgetInfo) -> str:
    """What a budget demands, in one clause."""
    limit = (
        figure_text(budget, budget.at_most)
        if budget.relative_to is None
        else f"{budget.at_most:g} × {budget.relative_to}"
    )
    place = f" (batch {budget.batch}, context {budget.context})" if budget.context else ""
    return f"{_measured(budget)} at most {limit}{place}"


def budget_name(budget: BudgetInfo) -> str:
    """What a budget measures, short enough for a column or an axis."""
    if budget.relative_to is not None:
        return f"{_measured(budget)} ÷ {budget.relative_to}"
    return f"{budget.phase} ms" if budget.is_timed else _measured(budget)


def _measured(budget: BudgetInfo) -> str:
    return budget.phase if budget.peak_in is None else f"{budget.phase} peak bytes"


def figure_text(budget: BudgetInfo, value: float) -> str:
    """A figure in the budget's own unit."""
    if budget.is_timed:
        return f"{value:g} ms"
    is_bytes = budget.phase == "cache_bytes" or budget.peak_in is not None
    return bytes_text(value) if is_bytes else count_text(value)


def budget_value(trial: Trial, budget: BudgetInfo) -> float | None:
    """What a trial measured against a budget: milliseconds or the ratio, or what was computed exactly; None when it was never
    timed."""
    latency, known = trial.latency.get(budget.timing), trial.figures.get(budget.label)
    if latency is None:
        return known.limited if known is not None and known.source == "computed" else None
    return budget.limited(latency)


def budget_cells(trial: Trial, run: Run) -> list[str]:
    """What a trial measured against each budget, a time with its interval; a dash where it was not timed, but what was computed
    or predicted in its place."""
    cells = []
    for budget in run.budgets:
        latency, known = trial.latency.get(budget.timing), trial.figures.get(budget.label)
        if latency is not None:
            cells.append(measured_text(budget, latency))
        else:
            cells.append("–" if known is None else _known_text(budget, known))
    return cells


def _known_text(budget: BudgetInfo, figure: Figure) -> str:
    """A figure that was computed, or predicted and says so."""
    ratio = budget.relative_to is not None
    if figure.source == "computed":
        return f"{figure.limited:.3f}" if ratio else figure_text(budget, figure.value)
    value = f"{figure.limited:.3f}" if ratio else f"{figure.value:.3f} ms"
    if figure.least is None:
        return f"{value} predicted, never timed"
    return f"{value} ± {figure.limited - figure.least:.3f} predicted, never timed"


def score_cells(trial: Trial, run: Run) -> list[str]:
    """A trial's score at each task; a dash where it has none."""
    scores = (trial.scores.get(task.name) for task in run.tasks)
    return ["–" if score is None else score_text(score) for score in scores]


def rungs_text(trial: Trial) -> str:
    """Of a pruned trial, where it was left and what it had scored there; nothing of any other."""
    if trial.state != "pruned":
        return ""
    scores = ", ".join(f"{task} {score_text(score)}" for task, score in trial.rungs[-1].items())
    return f"left at rung {len(trial.rungs)}: {scores}"


def trial_cells(trial: Trial, run: Run) -> list[str]:
    """Scores, budgets, parameters, layers of a trial."""
    measured = [*score_cells(trial, run), *budget_cells(trial, run)]
    return [*measured, count_text(trial.parameters), short_layers(trial.layers)]


def params_text(trial: Trial) -> str:
    """What the search chose: name and value, mappings without the brackets."""
    return "; ".join(f"{name}: {_choice_text(value)}" for name, value in trial.params.items())


def _choice_text(value: object) -> str:
    if not isinstance(value, Mapping):
        return str(value)
    # What is itself open has a value of its own, further on.
    rest = [f"{key} {inner}" for key, inner in value.items() if key != "kind" and not _is_open(inner)]
    return ", ".join([str(value["kind"])] * ("kind" in value) + rest)


def _is_open(value: object) -> bool:
    return isinstance(value, Mapping) and not value.keys().isdisjoint(RESERVED)


def short_layers(layers: tuple[str, ...]) -> str:
    """Layer names with repeats counted: 3 × linear, full."""
    runs: list[tuple[str, int]] = []
    for layer in layers:
        if runs and runs[-1][0] == layer:
            runs[-1] = (layer, runs[-1][1] + 1)
        else:
            runs.append((layer, 1))
    return ", ".join(layer if count == 1 else f"{count} × {layer}" for layer, count in runs)


def measured_text(budget: BudgetInfo, latency: Latency) -> str:
    """What of a timing the budget limits; of a time with the 95 % interval, of a peak there is none."""
    if budget.peak_in is None:
        return latency_text(latency) if budget.relative_to is None else ratio_text(latency)
    value = budget.limited(latency)
    if value is None:
        return "–"
    return bytes_text(value) if budget.relative_to is None else f"{value:.3f}"


def peak_text(latency: Latency) -> str:
    """The most bytes at one time, and the ratio to the reference's; a dash in a row of before they were measured."""
    if latency.peak_bytes is None:
        return "–"
    ratio = "" if latency.peak_ratio is None else f" ({latency.peak_ratio:.3f})"
    return f"{bytes_text(latency.peak_bytes)}{ratio}"


def method_text(row: Latency) -> str:
    """How it was timed; with what tokens and weights, where that decides what is computed."""
    return (
        row.method if row.inputs == "random" else f"{row.method}, {row.inputs} tokens, {row.weights} weights"
    )


def latency_text(latency: Latency) -> str:
    """Milliseconds with the 95 % interval."""
    return f"{latency.median_ms:.3f} ms [{latency.low_ms:.3f}, {latency.high_ms:.3f}]"


def ratio_text(latency: Latency) -> str:
    """The ratio to the reference with the 95 % interval, or a dash when there is none."""
    return (
        "–" if latency.ratio is None else interval_text(latency.ratio, latency.ratio_low, latency.ratio_high)
    )


def interval_text(value: float, low: float | None, high: float | None) -> str:
    """A ratio with its interval, where that is known."""
    return f"{value:.3f}" if low is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def state_counts(run: Run) -> str:
    """How many trials ended how."""
    states = [state for state in run.states if state != "running"]
    return ", ".join(f"{run.count(state)} {STATE_WORDS[state]}" for state in states)


def headline(run: Run) -> str:
    """The outcome of a run in one or two sentences."""
    best = run.best_trial
    counts = f"{len(run.trials)} trials: {state_counts(run)}"
    if best is None:
        is_lost = run.status == "nothing-feasible" and not run.least_violating
        told = _NONE_MEASURED if is_lost else _NO_WINNER.get(run.status, "The search has no winner yet.")
        return f"{told} {counts}."
    scores = ", ".join(
        f"{name} {score_text(score)}{rate_text(best, name)}" for name, score in best.scores.items()
    )
    parts = [f"Trial {best.number} wins with {scores}"]
    for budget in run.budgets:
        latency = best.latency.get(budget.timing)
        if latency is not None:
            times = "" if budget.relative_to is None else f" × {budget.relative_to}"
            allowed = (
                f"{budget.at_most:g}"
                if budget.peak_in is None or times
                else figure_text(budget, budget.at_most)
            )
            parts.append(f"{_measured(budget)} {measured_text(budget, latency)}{times}, allowed {allowed}")
        elif (known := best.figures.get(budget.label)) is not None:
            parts.append(f"{budget_name(budget)} {_known_text(budget, known)}, allowed {budget.at_most:g}")
    chance = "".join(f" At {name} no spec is above chance, so it orders nothing." for name in at_chance(run))
    stopped = " The search was stopped before its end; --resume goes on." if run.status == "stopped" else ""
    return f"{'; '.join(parts)}.{chance} {counts}.{stopped}"


_NONE_MEASURED = "No trial was trained to its end; the reasons stand in the table of all trials."
_NO_WINNER = {
    "nothing-feasible": "No spec kept every budget; the least-violating ones are listed below.",
    "stopped": "The search was stopped before it had a winner; heddle search with --resume goes on.",
    "running": "The search is still under way, or was killed; then heddle search with --resume goes on.",
    "finished": "The search ended without a winner.",
}


def confirmation(run: Run) -> list[str]:
    """The winner against uniform placement, in plain sentences; also when it lost or nothing was shown."""
    confirm = run.confirm
    if confirm is None:
        return ["The winner was not retrained with fresh seeds: only the search's own scores are known."]
    if confirm.same:
        return [
            "The winner is itself the uniform placement of its layers: the search found nothing better than "
            "spreading them evenly, and there is no second model to compare with.",
            *_fresh_scores(run, confirm),
        ]
    lines = [f"One retraining failed: {failure}" for failure in confirm.failures]
    lines += [difference_text(difference) for difference in confirm.differences]
    return lines or ["No pair of retrainings finished, so the comparison says nothing."]


def _fresh_scores(run: Run, confirm: Confirm) -> list[str]:
    """What the winner scored where it was trained again, from the worst to the best seed."""
    ranges = []
    for task in run.tasks:
        scores = sorted(confirm.scores.get(task.name, ()), reverse=not task.higher_is_better)
        if scores:
            low, high = (value_text(task.metric, score) for score in (scores[0], scores[-1]))
            ranges.append(f"{task.name} {low} to {high}")
    return (
        [f"Trained again with {len(confirm.seeds)} fresh seeds it scores {', '.join(ranges)}."]
        if ranges
        else []
    )


def shared_rates_text(confirm: Confirm) -> str:
    """With which learning rates both were trained, where a task has several; a sentence to be put behind another."""
    told = ", ".join(f"{task} {rate:g}" for task, rate in confirm.learning_rates.items())
    return (
        f" Both at the learning rate that was best for the winner ({told}), which favours it." if told else ""
    )


def longer_texts(longer: Longer) -> list[str]:
    """Whether the order holds, what is ahead of the winner, what a reverse gives, and what failed."""
    times = f"{longer.times:g} times as long"
    ranked = longer.ranked()
    listed = ", ".join(str(row.number) for row in ranked)
    if longer.holds is None:
        lines = [f"Fewer than two trials came to a score when trained {times}: there is no order to compare."]
    elif longer.is_same_order:
        lines = [f"Trained {times}, the order of the {len(ranked)} best trials is that of the search."]
    else:
        what = "within two standard errors that of the search" if longer.holds else "not that of the search"
        order = f"now trials {listed}, from the best down"
        lines = [f"Trained {times}, the order of the {len(ranked)} best trials is {what}: {order}."]
    if ahead := longer.ahead:
        names = " and ".join(row.name for row in ahead)
        lines.append(
            f"Ahead of the winner, trial {longer.number}, by more than two standard errors: {names}. "
            "The winner stays the search's."
        )
    if len(longer.seeds) == 1:
        lines.append(
            "One new seed each: what another seed would change is not seen, so take close scores as ties."
        )
    return [*lines, *_reverse_texts(longer), *longer.failures, *longer.left_out]


def _reverse_texts(longer: Longer) -> list[str]:
    """How much better or worse each reverse is than its trial."""
    by_number = {row.number: row.quality for row in longer.rows if not row.is_reversed}
    return [
        f"{row.name}: {row.quality - forward:+.4f} in the mean normalised score."
        for row in longer.rows
        if row.is_reversed and row.quality is not None and (forward := by_number[row.number]) is not None
    ]


def difference_text(difference: Difference) -> str:
    """One paired difference as a sentence."""
    percent = difference.metric == "accuracy"
    factor, unit = (100.0, "percentage points") if percent else (1.0, difference.metric.replace("_", " "))
    digits = 2 if percent else 4
    mean, low, high = (
        f"{factor * number:+.{digits}f}" for number in (difference.mean, difference.low, difference.high)
    )
    better = "higher" if difference.higher_is_better else "lower"
    conclusion = {
        "better": "the found placement is better",
        "worse": "the found placement is worse than uniform",
        "no difference shown": "the interval holds zero, so no difference is shown",
    }[difference.verdict]
    return (
        f"{difference.task}: over {len(difference.winner)} fresh seeds, winner minus uniform is {mean} {unit} "
        f"(95 % interval {low} to {high}; {better} is better): {conclusion}."
    )
