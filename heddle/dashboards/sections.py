"""The parts of a report's page, top to bottom; each gives None when the run has nothing to say there."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from heddle.dashboards import data, latency_section, rungs_section, timing_rows, words
from heddle.dashboards.figure_numbers import numbers
from heddle.dashboards.figures import Figure
from heddle.dashboards.html import Html, Row, element, join, table
from heddle.dashboards.placement_section import placements
from heddle.dashboards.timing_section import timings
from heddle.search.record import Confirm, Run, TaskInfo, Trial
from heddle.specs.palette import look_of

Name = Callable[[Trial, Run], object]
# Light stripes that are seen on every colour.
HATCH = "repeating-linear-gradient(45deg,#fff0 0 3px,#ffffffb3 3px 5px)"


def section(title: str, *children: object) -> Html:
    return element("section", element("h2", title), *children)


def note(*children: object) -> Html:
    return element("p", *children, cls="note")


NO_SCRIPTS = element("noscript", note("The plots need scripts; every number in them is also in the tables."))


def header(run: Run) -> list[Html]:
    """Where and how long, the name, and the verdict in a box."""
    environment = run.meta.get("environment", {})
    machine = environment.get("device_name", "unknown device")
    over = f"Heddle search · {machine} · {words.duration_text(run.wall_s)}"
    verdict = [element("p", words.headline(run))]
    verdict += [element("p", line) for line in words.confirmation(run)] if run.best is not None else []
    look = "verdict" if run.best is not None else "verdict bad"
    return [element("p", over, cls="over"), element("h1", run.name), element("div", *verdict, cls=look)]


def front(run: Run, name: Name = data.name_of) -> Html:
    """The reference and the front, a row each."""
    measured = [*(words.metric_text(task) for task in run.tasks), *budget_heads(run), "Parameters"]
    header = ["Spec", *measured, "Layers"]
    shown = ([run.reference] if run.reference is not None else []) + list(run.front_trials)
    rows = [Row(_summary_row(trial, run, name), look(trial, run)) for trial in shown]
    said = "No spec within the budget beats one of these in every task. Scores with their standard error."
    return section(
        "Pareto front",
        note(said if run.front else "Empty: no spec was trained within the budget."),
        element("ul", *(element("li", words.budget_text(budget)) for budget in run.budgets)),
        table(header, rows, numeric=range(1, 1 + len(measured))) if rows else "",
    )


def budget_heads(run: Run) -> list[str]:
    return [f"{words.budget_name(budget)} (allowed {budget.at_most:g})" for budget in run.budgets]


def _summary_row(trial: Trial, run: Run, name: Name) -> list[object]:
    mark = " ★ winner" if trial.number == run.best else ""
    return [join([name(trial, run), mark]), *words.trial_cells(trial, run)]


def look(trial: Trial, run: Run) -> str | None:
    if trial.number == run.best:
        return "winner"
    if run.reference is not None and trial.number == run.reference.number:
        return "reference"
    return trial.state if trial.state in ("failed", "infeasible", "pruned") else None


def least_violating(run: Run) -> Html | None:
    """Shown only when nothing was feasible: then these are the best news there is."""
    if run.best is not None or not run.least_violating:
        return None
    rows = [
        [
            data.name_of(trial, run),
            *words.budget_cells(trial, run),
            f"{100 * trial.violation:.1f} %",
            words.short_layers(trial.layers),
        ]
        for trial in map(run.trial, run.least_violating)
    ]
    header = ["Spec", *budget_heads(run), "Over by", "Layers"]
    return section("Closest to the budget", table(header, rows, numeric=range(1, len(header) - 1)))


def strips(run: Run, name: Name = data.name_of) -> Html | None:
    """The layers of the front as coloured strips, which need no script."""
    shown = ([run.reference] if run.reference is not None else []) + list(
        run.front_trials or map(run.trial, run.least_violating)
    )
    if not shown:
        return None
    names = {trial.number: name(trial, run) for trial in shown}
    strips = {trial.number: data.strip(trial) for trial in shown}
    return section(
        "Layers",
        note("First layer on the left. Mixers made of others, and those that choose tokens, are hatched."),
        legend({cell.mixer for cells in strips.values() for cell in cells}),
        strip_table([(names[key], cells) for key, cells in strips.items()]),
    )


def legend(mixers: Iterable[str]) -> Html:
    """The colours of some mixers, each with its name."""
    items = (
        element("li", element("i", style=paint(mixer)), mixer) for mixer in sorted(mixers, key=data.natural)
    )
    return element("ul", *items, cls="legend")


def strip_table(rows: Sequence[tuple[object, Sequence[data.Cell]]]) -> Html:
    """Names, each with its layers as a coloured strip; a layer stands below the same layer of a deeper model."""
    parts: list[Html] = []
    depth = max((len(cells) for _, cells in rows), default=0)
    for name, cells in rows:
        title = "layer {0.index}: {0.block}, {0.mixer}"
        blocks = [element("span", style=paint(cell.mixer), title=title.format(cell)) for cell in cells]
        blocks += [element("span", cls="none")] * (depth - len(cells))
        label = f"{len(cells)} layers: {words.short_layers(tuple(cell.mixer for cell in cells))}"
        parts += [element("div", name), element("div", *blocks, cls="strip", role="img", aria_label=label)]
    return element("div", *parts, cls="strips")


def paint(mixer: str) -> str:
    """The style of a box that stands for a mixer."""
    look = look_of(mixer)
    hatch = f";background-image:{HATCH}" if look.hatched else ""
    return f"background-color:{look.colour}{hatch}"


# Shown once report.js has drawn; it says which picture is meant.
SAVE = element(
    "span",
    *(element("button", form.upper(), type="button", data_save=form, aria_label=f"Save this plot as {form.upper()}")
      for form in ("svg", "png")),
    cls="save",
)  # fmt: skip


def plot_places(drawn: Sequence[Figure], first: int = 0) -> Html:
    """A place for each figure; the page's figures are numbered through from `first`."""
    places = []
    for index, figure in enumerate(drawn, first):
        plot = element("div", id=f"plot-{index}", cls="plot", role="img", aria_label=figure.caption)
        caption = element("figcaption", figure.caption, SAVE)
        places.append(element("figure", plot, caption, numbers(figure)))
    return element("div", *places, cls="plots")


def confirmation(run: Run) -> Html | None:
    """The winner against uniform placement: in words, by seed, and what the two models are."""
    confirm = run.confirm
    if confirm is None:
        return None
    how = "Trained again with seeds new to the search; paired t interval over the seeds."
    how += words.shared_rates_text(confirm)
    layers = [
        ["winner", words.short_layers(confirm.layers), confirm.hash],
        ["uniform", words.short_layers(confirm.uniform_layers), confirm.uniform_hash],
    ]
    rows = [row for task in run.tasks for row in _seed_rows(confirm, task)]
    return section(
        "Winner against uniform placement",
        *(element("p", line) for line in words.confirmation(run)),
        note(how),
        table(["Task", "Seed", "Winner", "Uniform", "Winner − uniform"], rows, numeric=range(1, 5)),
        table(["Model", "Layers", "Hash"], layers),
    )


def _seed_rows(confirm: Confirm, task: TaskInfo) -> list[list[object]]:
    """The scores of a task by seed; where there is no pair, those of the winner alone."""
    found = [difference for difference in confirm.differences if difference.task == task.name]
    winner = found[0].winner if found else confirm.scores.get(task.name, ())
    uniform = found[0].uniform if found else (None,) * len(winner)
    # After a failed training it is not known here which seed is missing.
    seeds: Sequence[object] = confirm.seeds if len(confirm.seeds) == len(winner) else ("–",) * len(winner)
    rows: list[list[object]] = []
    for seed, mine, other in zip(seeds, winner, uniform, strict=True):
        pair = [None, None] if other is None else [other, mine - other]
        values = ["–" if value is None else words.value_text(task.metric, value) for value in [mine, *pair]]
        rows.append([task.name, seed, *values])
    return rows


def remeasured(run: Run) -> Html | None:
    """The timings of the front taken again at the end."""
    rows = timing_rows.again_rows(run)
    if not rows:
        return None
    return section(
        "The front, timed again",
        note("Taken anew after the search, so that a lucky first timing shows. Medians with 95 % intervals."),
        table(timing_rows.AGAIN_HEADER, rows, numeric=range(2, 7)),
    )


def predictions(run: Run) -> Html | None:
    """What a latency model predicted, how good it was, and what came of it."""
    fits = latency_section.rows_of_fits(run)
    if not fits:
        return _expected(run)
    said = (
        "Errors on stacks that were held out, beside those of one number for all and of a line in FLOPs. Bias is the mean of "
        "predicted over measured less 1, near the budget over the stacks measured within a fifth of it, of three at least."
    )
    rows = latency_section.front_rows(run)
    header = latency_section.FRONT_HEADER
    return section(
        "Predicted latencies",
        note(said),
        table(latency_section.FIT_HEADER, fits, numeric=range(2, 11)),
        *latency_section.paragraphs(run),
        *([table(header, rows, numeric=range(2, 5))] if rows else []),
    )


def _expected(run: Run) -> Html | None:
    """The same where the search went by no latency model but its own."""
    rows = latency_section.expected_rows(run)
    if not rows:
        return None
    said = (
        "Predicted from the timings of all other specs of this run by the linear model that placements are proposed by: "
        "counts, boundaries between kinds, and what else was open. As the budget counts; nobody knows its margin."
    )
    return section(
        "Predicted latencies", note(said), table(latency_section.FRONT_HEADER, rows, numeric=range(2, 5))
    )


def rungs(run: Run) -> Html | None:
    """What each rung let through, and how far the rungs agree."""
    rows = rungs_section.rows(run)
    if not rows:
        return None
    said = f"Of what was told at a rung, the best 1 / {run.meta['rungs']['eta']:g} go on. Its scores never enter the front."
    ranks = rungs_section.rank_rows(run)
    restricted = "Of the specs that went on alone: their range is restricted. Of those that were left nothing is known."
    return section(
        "Rungs",
        note(said),
        table(rungs_section.HEADER, rows, numeric=(0, 2, 3)),
        *([table(rungs_section.RANKS_HEADER, ranks, numeric=(2, 3, 4)), note(restricted)] if ranks else []),
    )


def latencies(run: Run, most: int | None = None) -> Html | None:
    """Every timing with its interval, or the first `most`, and the path of each mixer."""
    timed = [(trial, seen) for trial in data.with_reference(run) for seen in trial.latency.values()]
    if not timed:
        return None
    cut = most is not None and len(timed) > most
    title = f"The first {most} of {len(timed)} timings" if cut else "All timings"
    taken = [
        [kind, ", ".join(words.PATH_WORDS.get(path, path) for path in sorted(paths))]
        for kind, paths in data.kernel_paths(run).items()
    ]
    foreign = sum(bool(seen.foreign) for seen in data.latencies(run))
    warning = f"{foreign} timings shared the device with processes of others; do not trust them."
    rows = [Row(timing_rows.row(trial, seen, run), look(trial, run)) for trial, seen in timed[:most]]
    return section(
        "Latency",
        note("Model and reference took turns, so that clocks and heat hit both; nothing trained meanwhile."),
        note(warning) if foreign else "",
        element("h3", "Path of each mixer"),
        table(["Mixer", "Path"], taken),
        element("h3", title),
        table(timing_rows.HEADER, rows, numeric=(2, 3, 4, 5)),
    )


def trials(run: Run) -> Html:
    """Every trial with its state and the reason."""
    measured = [*(task.name for task in run.tasks), *budget_heads(run), "Parameters"]
    header = ["Trial", "State", *measured, "Took", "Layers", "Values", "Reason"]
    rows = [Row(trial_row(trial, run), look(trial, run)) for trial in run.trials]
    return section("All trials", table(header, rows, numeric=(0, *range(2, 3 + len(measured)))))


def trial_row(trial: Trial, run: Run) -> list[object]:
    *measured, layers = words.trial_cells(trial, run)
    twin = "" if trial.duplicate_of is None else f"same spec as trial {trial.duplicate_of}"
    took = words.duration_text(trial.wall_s)
    state = words.STATE_WORDS.get(trial.state, trial.state)
    why = trial.reason or twin or words.rungs_text(trial)
    return [trial.number, state, *measured, took, layers, words.params_text(trial), why]


def best_spec(run: Run) -> Html | None:
    """The winner as a spec file."""
    best = run.best_trial
    if best is None:
        return None
    return section(
        "The best spec",
        note(f"Hash {best.hash}; a whole file for heddle train or heddle show."),
        element("pre", best.spec),
    )


def environment(run: Run) -> Html:
    """What the run was made with."""
    known = ("environment", "created", "sampler", "round", "lock", "id")
    rows = flat({key: run.meta[key] for key in known if key in run.meta})
    return section("Environment", table(["What", "Value"], rows))


def flat(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested plain data as (dotted name, text) pairs."""
    pairs: list[tuple[str, str]] = []
    for key, inner in value.items():
        name = f"{prefix}{key}"
        if isinstance(inner, Mapping):
            pairs += flat(inner, f"{name}.")
        else:
            pairs.append((name, "–" if inner is None else str(inner)))
    return pairs


def reproduce(run: Run) -> Html:
    """The commands and the spec file that give this run again."""
    folder = shlex.quote(str(run.path))
    commands = [
        f"heddle search spec.yaml --out {folder}   # the spec file is below",
        f"heddle report {folder} --out report.html",
    ]
    if run.best is not None:
        commands.append(f"heddle export {folder} --trial best --out my-model")
    source = run.meta.get("spec")
    spec = (
        element("details", element("summary", "The spec file of this search"), element("pre", source))
        if source
        else ""
    )
    return section("Reproduce", element("pre", join(commands, "\n")), spec)


Section = Callable[[Run], Html | None]
# What stands above the plots of a report, and what below.
OUTCOME: tuple[Section, ...] = (front, least_violating, strips)
EVIDENCE: tuple[Section, ...] = (
    rungs,
    confirmation,
    placements,
    remeasured,
    predictions,
    timings,
    latencies,
    trials,
    best_spec,
    environment,
    reproduce,
)
