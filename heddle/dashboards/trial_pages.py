"""The page about one trial."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from heddle.dashboards import block_times, data, model_figures, rates_section, sections, words
from heddle.dashboards.bars import bars
from heddle.dashboards.every_figure import place_of
from heddle.dashboards.frame import Page, copyable, empty, tiles, url
from heddle.dashboards.html import Html, element, table
from heddle.dashboards.site import Watched
from heddle.errors import HeddleError
from heddle.search.costs import layer_costs
from heddle.search.record import REFERENCE, Run, Trial

# A graph of more layers is a picture that nobody can read.
LAYERS_OF_GRAPH = 200


def find(run: Run, number: int) -> Trial:
    """A trial, or the reference. Raises HeddleError "bad-argument"."""
    if number == REFERENCE and run.reference is not None:
        return run.reference
    return run.trial(number)


def trial_page(watched: Watched, number: int) -> Page:
    """One trial: its layers, costs, timings, scores, curves, logs and spec."""
    run, key = watched.run(), watched.key
    try:
        trial = find(run, number)
    except HeddleError:
        if watched.follower.share_read >= 1:
            raise
        return _not_yet(watched, number)
    name = data.name_of(trial, run)
    # Where there are layers their bars stand above all plots.
    page = Page(f"{name} · {run.name}", key, "Front", is_plain_first=bool(trial.layers))
    page.add(_head(key, run, trial), _fate(run, trial))
    if trial.layers:
        _model(page, watched, run, trial)
    _predicted(page, watched, run, trial)
    _timed(page, trial)
    page.add(_scores(run, trial), rates_section.of_trial(trial), _shares(trial), _rungs(run, trial))
    page.plots("Training", model_figures.curves([(name, trial)]))
    page.add(_params(trial), _logs(watched, trial), _spec(run, trial))
    return page


def _not_yet(watched: Watched, number: int) -> Page:
    """What stands at a trial of a large run before the record was read that far; the page comes by itself."""
    page = Page(f"trial {number}", watched.key, "Front")
    share = 100 * watched.follower.share_read
    said = f"The record is being read: {share:.0f} %. This trial was not met yet."
    page.add(
        element("header", element("h1", f"trial {number}")), empty(said, "It is shown as soon as it is.")
    )
    return page


def _head(key: str, run: Run, trial: Trial) -> Html:
    known = [each.number for each in run.trials]
    near = [("← trial", trial.number - 1), ("→ trial", trial.number + 1)]
    links = [
        element("a", f"{arrow} {number}", href=url(key, "trial", number))
        for arrow, number in near
        if known and 0 <= number <= known[-1]
    ]
    other = run.best if run.best not in (None, trial.number) else None if run.reference is None else REFERENCE
    if other is not None and other != trial.number:
        what = "the winner" if other == run.best else "the reference"
        links.append(element("a", f"compare with {what}", href=url(key, "compare", t=[trial.number, other])))
    star = " ★ winner" if trial.number == run.best else ""
    title = f"{data.name_of(trial, run)}{star}"
    over = element("p", element("a", run.name, href=url(key)), cls="over")
    return element("header", over, element("h1", title), element("div", *links, cls="pages"))


def _fate(run: Run, trial: Trial) -> Html:
    facts: list[tuple[str, object]] = [("state", words.STATE_WORDS.get(trial.state, trial.state))]
    facts += [("parameters", words.count_text(trial.parameters)), ("layers", len(trial.layers))]
    facts += [("mean normalised score", f"{trial.quality:.4f}")] if trial.quality is not None else []
    facts += [("took", words.duration_text(trial.wall_s)), ("round", trial.round)]
    told = [empty(trial.reason)] if trial.reason else []
    if trial.state == "running" and run.status == "running":
        told.append(empty("Not finished: what is measured comes here by itself."))
    elif trial.state == "running":
        told.append(empty("The search ended before this trial did; heddle search with --resume takes it up."))
    return element("section", tiles(facts), *told)


def _model(page: Page, watched: Watched, run: Run, trial: Trial) -> None:
    """The strip, and what each layer costs where this heddle can plan the spec."""
    cells = data.strip(trial)
    context, batch = place_of(run)
    add_layers(page, cells)
    try:
        layers = watched.once(
            run, ("costs", trial.hash), lambda: layer_costs(trial.spec, context=context, batch=batch)
        )
    except HeddleError as error:
        page.add(empty("This heddle cannot plan the spec, so there are no costs by layer:", error))
        return
    add_costs(page, cells, layers, (context, batch), url(watched.key, "graph", f"{trial.number}.svg"))


def add_layers(page: Page, cells: Sequence[data.Cell]) -> None:
    """The strip of a model."""
    width = f"min-width:{max(100, len(cells)) * 0.28:.0f}rem" if len(cells) > 100 else None
    strip = element("div", sections.strip_table([("layers", cells)]), cls="long", style=width)
    legend = sections.legend({cell.mixer for cell in cells})
    hint = sections.note("First layer on the left; the pointer names a layer.")
    scroll = element("div", strip, cls="scroll", tabindex="0")
    page.add(sections.section("Layers", hint, legend, scroll))


def add_costs(
    page: Page,
    cells: Sequence[data.Cell],
    layers: Sequence[Mapping[str, Any]],
    place: tuple[int, int],
    graph: str,
) -> None:
    """What each layer costs at a context and a batch, and the graph behind an address."""
    named = {cell.index: cell.mixer for cell in cells}
    layers = [{**layer, "mixer": named.get(layer["index"], layer["mixer"])} for layer in layers]
    page.add(sections.section("What each layer costs", bars(model_figures.costs(layers, *place))))
    if len(layers) <= LAYERS_OF_GRAPH:
        picture = element(
            "img", src=graph, cls="graph", loading="lazy",
            alt=f"Graph of {len(layers)} layers with shared blocks and what layers take from each other",
        )  # fmt: skip
        page.add(sections.section("Graph", element("details", element("summary", "Show the graph"), picture)))
    else:
        told = f"Graphs of more than {LAYERS_OF_GRAPH} layers are not drawn here; heddle show SPEC --graph svg draws them."
        page.add(sections.section("Graph", sections.note(told)))


def _predicted(page: Page, watched: Watched, run: Run, trial: Trial) -> None:
    """The time of each block as the run's latency model has it; nothing in a run without one."""
    try:
        times = watched.once(
            run, ("blocks", trial.number), lambda: block_times.block_times(watched, run, trial)
        )
    except (HeddleError, ValueError, KeyError, TypeError) as error:
        page.add(
            empty("The latency model of this run cannot be read, so there are no times of blocks:", error)
        )
        return
    if times:
        told = sections.note(
            "By the latency model that the search went by, fitted to whole models: the times of blocks are its terms, and no "
            "block was timed alone. It was fitted beside the reference, maybe on another day; where all timings of the search "
            "are slower or faster by one factor, the machine was."
        )
        numbers = table(block_times.HEADER, block_times.rows(times), numeric=range(2, 5))
        details = element("details", element("summary", "The parts as a table"), numbers)
        page.plots("Predicted time of each block", block_times.stacked(times), told, details)


def _timed(page: Page, trial: Trial) -> None:
    rows = model_figures.latency_rows(trial)
    if not rows:
        return
    header = ["Measurement", "In the search", "Ratio", "At the end", "Ratio at the end", "Peak memory"]
    over = [
        element("p", f"{label}: {100 * abs(value):.1f} % {'over' if value > 0 else 'under'} the budget")
        for label, value in trial.constraints.items()
    ]
    told = sections.note("Medians with 95 % intervals.")
    numbers = table(header, rows, numeric=range(1, 6))
    page.plots("Latency", model_figures.timings(trial), told, numbers, *over)


def _scores(run: Run, trial: Trial) -> Html | None:
    if not trial.scores:
        return None
    texts = {task.name: words.metric_text(task) for task in run.tasks}
    rows = [
        [texts.get(name, name), words.score_text(score), f"{score.normalised:.4f}", score.seed, score.steps,
         words.count_text(score.tokens), words.duration_text(score.wall_s)]
        for name, score in trial.scores.items()
    ]  # fmt: skip
    header = ["Task", "Score ± standard error", "Normalised", "Seed", "Steps", "Tokens", "Took"]
    return sections.section("Scores", table(header, rows, numeric=range(1, 7)))


def _shares(trial: Trial) -> Html | None:
    """What the routers of each layer learned, by task."""
    rows = [
        [layer, trial.layers[layer] if layer < len(trial.layers) else "", task, f"{100 * share:.1f} %"]
        for task, score in trial.scores.items()
        for layer, share in score.learned_share
    ]
    if not rows:
        return None
    said = (
        "Of the first of a router's mixers, and of layer_router's second, over what the score was taken on."
    )
    shown = table(["Layer", "Block", "Task", "Learned share"], rows, numeric=(0, 3))
    return sections.section("Learned shares", sections.note(said), shown)


def _rungs(run: Run, trial: Trial) -> Html | None:
    """What shorter trainings gave."""
    rows = [
        [f"{at + 1} of {len(run.meta['rungs']['before']) + 1}", task, words.score_text(score),
         f"{score.normalised:.4f}", words.count_text(score.tokens), words.duration_text(score.wall_s)]
        for at, rung in enumerate(trial.rungs)
        for task, score in rung.items()
    ]  # fmt: skip
    header = ["Rung", "Task", "Score ± standard error", "Normalised", "Tokens", "Took"]
    return (
        sections.section("Rungs before the last", table(header, rows, numeric=range(2, 6))) if rows else None
    )


def _params(trial: Trial) -> Html | None:
    rows = sections.flat(trial.params)
    return sections.section("What the search chose", table(["Field", "Value"], rows)) if rows else None


def _logs(watched: Watched, trial: Trial) -> Html | None:
    names = watched.logs(trial.number)
    if not names:
        return None
    parts = [
        element(
            "details",
            element("summary", name),
            element("pre", watched.log(name) or "", cls="log", tabindex="0"),
        )
        for name in names
    ]
    return sections.section("Logs", *parts)


def _spec(run: Run, trial: Trial) -> Html | None:
    if not trial.spec:
        return None
    which = "best" if trial.number == run.best else str(trial.number)
    command = f"heddle export {shlex.quote(str(run.path))} --trial {which} --out my-model"
    parts = [copyable("Export this trial", command, "export")] if trial.number >= 0 else []
    return sections.section(
        "Take it along", *parts, copyable(f"Its spec, hash {trial.hash}", trial.spec, "spec")
    )
