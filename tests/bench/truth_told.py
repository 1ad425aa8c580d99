"""What rows of `truth_set.py` tell: scores by the number of full layers, how hard a task is, and what it all took."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import mean, median, quantiles
from typing import Any

from heddle.search.rank_correlation import tau_b

Rows = dict[str, dict[str, Any]]
# Full layers of a placement at the quartiles of all, which stand for those of latency until it is measured.
QUARTILES = (3, 4, 5)
# What a training on text tells of recall: bits at bytes whose last four stood earlier in the window (arXiv 2312.04927).
RECALL, REPEATED = "text recall", "repeated_bits_per_byte"
# Tasks whose score is better lower.
LOWER = ("text", RECALL)
# Ends the label of what seeds beyond the first three gave.
MORE = ", more seeds"


def read_rows(path: Path) -> Rows:
    """Rows by placement; none where the file is not there yet."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {row["placement"]: row for row in map(json.loads, lines)}


def sign(task: str) -> float:
    """What a score is taken times to be better higher."""
    return -1.0 if task in LOWER else 1.0


def seed_scores(told: Mapping[str, Any]) -> list[float]:
    """The score of each seed in the mean over learning rates, of what a row tells of a task; a failed training is at chance.

    The best of three rates would be the luck of three: seeds differ more than twice as much by it, and placements hardly more.
    """
    chance = told["chance"]
    return [
        mean(chance if one is None else one for one in rates)
        for rates in zip(*told["scores"].values(), strict=True)
    ]


def with_more(row: Mapping[str, Any], label: str) -> dict[str, Any] | None:
    """What a row tells of a task's trainings, those of more seeds behind the first."""
    told, more = row.get(label), row.get(label + MORE)
    if told is None or more is None:
        return told

    counts = [len(next(iter(one["scores"].values()))) for one in (told, more)]

    def both(first: Mapping[str, Any], then: Mapping[str, Any]) -> dict[str, Any]:
        # Where all trainings of one failed it tells nothing beside its scores.
        sides = zip((first, then), counts, strict=True)
        parts = [{name: side.get(name, [None] * n) for name in {**first, **then}} for side, n in sides]
        return {name: [*seeds, *parts[1][name]] for name, seeds in parts[0].items()}

    others = more.get("extras", {})
    extras = {rate: both(first, others.get(rate, {})) for rate, first in told.get("extras", {}).items()}
    seconds = told["seconds"] + more["seconds"] * told.get("workers", 1) / more.get("workers", 1)
    return {**told, "scores": both(told["scores"], more["scores"]), "extras": extras, "seconds": seconds}


def told_of(row: Mapping[str, Any], task: str) -> dict[str, Any] | None:
    """What a row tells of a task, if it does; of recall on text, what its training on text tells beside its score."""
    if task != RECALL:
        return with_more(row, task)
    text = with_more(row, "text") or {}
    extras = text.get("extras", {})
    if not any(REPEATED in told for told in extras.values()):
        return None
    # A rate at which all trainings failed tells nothing.
    failed = {rate: [None] * len(seeds) for rate, seeds in text["scores"].items()}
    return {**text, "scores": {rate: extras[rate].get(REPEATED, none) for rate, none in failed.items()}}


def tasks_of(rows: Rows) -> list[str]:
    """The tasks that there are scores of."""
    found = {key for row in rows.values() for key, told in row.items() if isinstance(told, dict)} | {RECALL}
    return sorted(
        task
        for task in found
        if not task.endswith(MORE) and any("scores" in (told_of(row, task) or {}) for row in rows.values())
    )


def scores_of(rows: Rows, task: str) -> dict[str, list[float]]:
    """The scores of seeds at a task, by placement; of more seeds where all placements have them."""
    told = ((name, told_of(row, task)) for name, row in rows.items())
    scores = {name: seed_scores(one) for name, one in told if one is not None}
    fewest = min(map(len, scores.values()), default=0)
    return {name: seeds[:fewest] for name, seeds in scores.items()}


def latencies(rows: Rows, phase: str = "decode") -> dict[str, float]:
    """Milliseconds of each placement that was timed: its ratio to the model of all `full`, timed in turns with it, times the
    median of that model over all timings, so that GPUs of one kind and their clocks do not tell placements apart."""
    labels = {key for row in rows.values() for key in row if key.startswith(f"{phase}_ms@")}
    assert len(labels) <= 1, f"timed at several places: {sorted(labels)}"
    timed = {name: row[label] for label in labels for name, row in rows.items() if label in row}
    if not timed:
        return {}
    reference = median(one["reference_ms"] for one in timed.values())
    return {name: one["ratio"] * reference for name, one in timed.items()}


def ratio_curve(rows: Rows) -> Iterator[str]:
    """A Markdown table by the number of full layers: placements, the median, worst and best of their scores and of their
    milliseconds."""
    told: dict[str, dict[str, float]] = {}
    for task in tasks_of(rows):
        told[task] = {name: mean(seeds) for name, seeds in scores_of(rows, task).items()}
    for phase in ("decode", "prefill"):
        if ms := latencies(rows, phase):
            told[f"{phase}, ms"] = ms
    if not told:
        return
    yield "| " + " | ".join(["full layers", "placements", *told]) + " |"
    yield "|---" * (2 + len(told)) + "|"
    for full in sorted({row["full"] for row in rows.values()}):
        names = [name for name, row in rows.items() if row["full"] == full]
        cells = [spread([values[name] for name in names if name in values]) for values in told.values()]
        yield f"| {full} | {len(names)} | " + " | ".join(cells) + " |"


def spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{median(values):.4f} ({min(values):.4f} – {max(values):.4f})"


def spent(rows: Rows) -> Iterator[str]:
    """GPU seconds of each task and place: what the jobs took, processes started and programs compiled, over the processes that
    shared a GPU."""
    total = 0.0
    for label in sorted(
        {key for row in rows.values() for key, told in row.items() if isinstance(told, dict)}
    ):
        done = [row[label] for row in rows.values() if label in row]
        known = [one for one in done if "job_seconds" in one]
        seconds = sum(one["job_seconds"] / one["workers"] for one in known)
        devices = ", ".join(sorted({one["device"] for one in known}))
        total += seconds
        if known:
            yield f"{label}: {seconds:,.0f} GPU seconds for {len(known)} of {len(done)} placements on {devices}"
    if total:
        yield f"in all {total:,.0f} GPU seconds, {total / 3600:.2f} hours"


def noise(scores: Mapping[str, Sequence[float]]) -> float:
    """How far from the best is within seed noise: twice the standard error of a difference of two means over seeds.

    The deviation is pooled over all placements, without what they share of a seed, which moves no difference.
    """
    seeds = list(zip(*scores.values(), strict=True))
    shared, whole = [mean(one) for one in seeds], mean(map(mean, seeds))
    left = (
        one - mean(mine) - shared[seed] + whole for mine in scores.values() for seed, one in enumerate(mine)
    )
    degrees = (len(scores) - 1) * (len(seeds) - 1)
    return 2.0 * math.sqrt(2.0 * sum(one * one for one in left) / degrees / len(seeds))


def near_best(scores: Mapping[str, Sequence[float]], *, higher: bool) -> float:
    """The share of the other placements within seed noise of the best; `scores`: of each seed, by placement."""
    means, reach = [mean(seeds) for seeds in scores.values()], noise(scores)
    best = (max if higher else min)(means)
    return (sum(abs(one - best) <= reach for one in means) - 1) / (len(means) - 1)


def hardness(rows: Rows) -> Iterator[str]:
    """How many placements a task cannot tell from the best, within budgets at the quartiles of latency and in all; and how the
    trainings fared."""
    for task in tasks_of(rows):
        higher = task not in LOWER
        told = scores_of(rows, task)
        for among, names in budgets(rows, list(told)):
            within = {name: told[name] for name in names}
            if len(within) > 1:
                share = near_best(within, higher=higher)
                means = [mean(seeds) for seeds in within.values()]
                best = (max if higher else min)(means)
                yield (
                    f"{task}: {share:.0%} of {len(within)} placements{among} are within noise of the best "
                    f"(best {best:.4f}, median {median(means):.4f}, noise {noise(within):.4f})"
                )
        yield from learned(rows, task)


def by_rate(rows: Rows) -> Iterator[str]:
    """Of each task with several learning rates how often each was a placement's best, how far two of them order placements alike,
    and within each budget what is best at the last."""
    for task in tasks_of(rows):
        values = at_rates(rows, task)
        whole = {name: sign(task) * mean(seeds) for name, seeds in scores_of(rows, task).items()}
        if len(values) < 2 or len(whole) < 2:
            continue
        best = Counter(max(values, key=lambda rate: values[rate][name]) for name in whole)
        often = (
            f"{rate} of {best[rate]} (mean {sign(task) * mean(one.values()):.4f})"
            for rate, one in values.items()
        )
        pairs = combinations([[one[name] for name in whole] for one in values.values()], 2)
        taus = [tau_b(*pair) or 0.0 for pair in pairs]
        yield (
            f"{task}: the best rate of {len(whole)} placements is {', '.join(often)}; tau-b between two rates "
            f"{min(taus):.2f} to {max(taus):.2f}"
        )
        rate, last = list(values.items())[-1]
        for among, names in budgets(rows, list(whole)):
            first, usual = (max(names, key=side.__getitem__) for side in (last, whole))
            off = (last[first] - last[usual]) / (last[first] - median(last[name] for name in names) or 1.0)
            yield f"{task}{among}: at {rate} alone the best is {first}, and the best of all rates, {usual}, {off:.0%} off"


def at_rates(rows: Rows, task: str) -> dict[str, dict[str, float]]:
    """By learning rate and placement the mean score over the seeds that `scores_of` counts, higher is better."""
    counted = {name: len(seeds) for name, seeds in scores_of(rows, task).items()}
    told = {name: one for name in counted if (one := told_of(rows[name], task)) is not None}
    return {
        rate: {
            name: sign(task)
            * mean(seed_scores({**one, "scores": {rate: one["scores"][rate]}})[: counted[name]])
            for name, one in told.items()
        }
        for rate in next((one["scores"] for one in told.values()), ())
    }


def budgets(rows: Rows, names: Sequence[str]) -> Iterator[tuple[str, Sequence[str]]]:
    """Placements within each quartile of latency, and all; quartiles of full layers where not all were timed."""
    ms = latencies(rows)
    if len(names) > 1 and ms.keys() >= set(names):
        for part, limit in enumerate(quantiles([ms[name] for name in names], n=4, method="inclusive"), 1):
            yield f" within the {25 * part} % quantile of latency", [n for n in names if ms[n] <= limit]
    else:
        for most in QUARTILES:
            yield f" with at most {most} full layers", [n for n in names if n.count("F") <= most]
    yield "", names


def learned(rows: Rows, task: str) -> Iterator[str]:
    """The share of trainings that end nearer to the best score of all than to chance; and of placements whose seeds all do or
    all do not."""
    found = [told for row in rows.values() if (told := told_of(row, task)) is not None]
    every = [one for told in found for seeds in told["scores"].values() for one in seeds if one is not None]
    if not every or task in LOWER:
        return
    half = max(found[0]["chance"], (max(every) + found[0]["chance"]) / 2)
    agree = mean(len({one > half for one in seed_scores(told)}) == 1 for told in found)
    rates = {
        rate: mean(one is not None and one > half for told in found for one in told["scores"].get(rate, ()))
        for rate in found[0]["scores"]
    }
    by_rate = ", ".join(f"{share:.0%} at {rate}" for rate, share in rates.items())
    yield (
        f"{task}: {mean(one > half for one in every):.0%} of the trainings end above {half:.3f} ({by_rate}); "
        f"the seeds of {agree:.0%} of the placements agree"
    )
