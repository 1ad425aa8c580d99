"""The pages about a whole run: the front, its trials, placement, latency; and the runs side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import ceil

from heddle.dashboards import (
    busy_section,
    data,
    figures,
    latency_section,
    sections,
    spent,
    timing_section,
    words,
)
from heddle.dashboards.axes import axes
from heddle.dashboards.busy import Busy, busy
from heddle.dashboards.compare_pages import add_fronts
from heddle.dashboards.every_figure import best_placed, placements
from heddle.dashboards.frame import Page, choose, empty, later, pick, tiles, url
from heddle.dashboards.html import Html, Row, element, join, table
from heddle.dashboards.longer_section import longer
from heddle.dashboards.model_figures import terms
from heddle.dashboards.rates_section import learning_rates
from heddle.dashboards.site import PATIENCE_S, Site, Watched
from heddle.dashboards.training_page import trainings
from heddle.errors import HeddleError
from heddle.search.placement_terms import LEAST, Term, placement_terms
from heddle.search.record import Run, Trial

Query = Mapping[str, str]
PAGE_OF_TRIALS = 100
STATES = {"": "all", **words.STATE_WORDS}
SORTS = {
    "number": "number",
    "quality": "mean normalised score, best first",
    "violation": "closest to the budget",
}


def link_to(key: str) -> sections.Name:
    """Names of trials that lead to their pages."""

    def name(trial: Trial, run: Run) -> Html:
        return element("a", data.name_of(trial, run), href=url(key, "trial", trial.number))

    return name


def overview(site: Site, query: Query) -> Page:
    """All runs, side by side."""
    page = Page("Runs", here="Runs")
    page.add(element("header", element("h1", "Runs"), sections.note(str(site.root))))
    known, trained = site.runs(), trainings(site)
    if not known and trained is None:
        page.add(
            empty(
                f"There is no run in {site.root} yet.",
                join(["A search makes one: ", element("code", f"heddle search SPEC --out {site.root}/NAME")]),
                "This page shows it as soon as it begins.",
            )
        )
        return page
    rows, drawn = [], {}
    for key, watched in known.items():
        try:
            drawn[key] = watched.run(PATIENCE_S / len(known))
        except HeddleError as error:
            rows.append(Row([key, "cannot be read", "", "", "", error.what], "failed"))
            continue
        rows.append(_run_row(key, drawn[key]))
    header = ["Run", "Status", "Trials", "Winner", "Mean normalised score", "Took"]
    page.add(
        sections.section("Side by side", table(header, rows, numeric=(4,), cls="runs")) if rows else None
    )
    page.plots("Best so far", [figures.progress_of(list(drawn.items()))])
    add_fronts(page, site, drawn, query)
    page.add(trained)
    return page


def _run_row(key: str, run: Run) -> Row:
    best = run.best_trial
    winner = "–" if best is None else join([link_to(key)(best, run), f" {words.short_layers(best.layers)}"])
    quality = best.quality if best is not None else None
    told = f"{len(run.trials)}: {words.state_counts(run)}"
    name = element("a", run.name, href=url(key))
    score = "–" if quality is None else f"{quality:.4f}"
    return Row([name, run.status, told, winner, score, words.duration_text(run.wall_s)])


def front(watched: Watched, query: Query) -> Page:
    """What the search found and where it stands."""
    run, key = watched.run(), watched.key
    page = Page(run.name, key, "Front")
    head = watched.once(run, "header", lambda: element("header", *sections.header(run)))
    state = watched.once(run, ("state", watched.follower.share_read), lambda: _state(watched, run))
    page.add(_reading(watched), head, state, _nothing_yet(run))
    if run.trials:
        _plots(page, watched, run, query)
    page.add(*watched.once(run, "front", lambda: _found(run, key)))
    page.add(_workers(watched, run))
    _trials(page, watched, run, query)
    return page


def _found(run: Run, key: str) -> list[Html | None]:
    """What no choice on the page changes."""
    name = link_to(key)
    found = [sections.front(run, name), sections.least_violating(run), sections.strips(run, name)]
    found += [learning_rates(run), sections.rungs(run), sections.confirmation(run), longer(run)]
    return [*found, sections.remeasured(run), _failures(run), _messages(run)]


def _reading(watched: Watched) -> Html | None:
    share = watched.follower.share_read
    if share >= 1:
        return None
    return empty(
        f"The record is being read: {100 * share:.0f} %. What follows is of that part, and grows by itself."
    )


def _state(watched: Watched, run: Run) -> Html:
    pace, found = data.pace(run), _busy(watched, run)
    facts: list[tuple[str, object]] = [
        ("status", run.status),
        ("trials told", f"{pace.told} of {pace.total}"),
    ]
    facts += [(words.STATE_WORDS[state], run.count(state)) for state in run.states if state != "running"]
    if run.status == "running" and watched.follower.share_read >= 1:
        facts += busy_section.facts(found)
        facts.append(("phase", pace.phase or "starting"))
        left = pace.seconds_left
        facts.append(("left of the rounds, at this pace", "–" if left is None else words.duration_text(left)))
    cores = run.meta.get("environment", {}).get("cores")
    facts += [("cores of the machine", cores)] if cores else []
    return element("section", tiles(facts))


def _busy(watched: Watched, run: Run) -> Busy:
    held: Busy = watched.once(run, "busy", lambda: busy(run))
    return held


def _workers(watched: Watched, run: Run) -> Html | None:
    """Who is busy with what; of a part of a record nobody can say."""
    if watched.follower.share_read < 1:
        return None
    return busy_section.busy_section(run, watched.key, _busy(watched, run))


def _nothing_yet(run: Run) -> Html | None:
    if run.trials:
        return None
    return empty("No trial was begun yet.", "This page fills by itself; the first round asks for specs now.")


def _plots(page: Page, watched: Watched, run: Run, query: Query) -> None:
    known = {axis.key: axis for axis in axes(run)}
    first = next((key for key in known if key.startswith("budget:")), "parameters")
    x = known.get(query.get("x", ""), known[first])
    y = known.get(query.get("y", ""), next(iter(known.values())))
    overs = watched.once(run, "overs", lambda: spent.overs(run))
    over = query.get("over", "trial")
    over = over if over in overs else "trial"
    names = {key: axis.plain for key, axis in known.items()}
    picked = pick(
        choose("Across", "x", names, x.key),
        choose("Up", "y", names, y.key),
        choose("Best so far over", "over", overs, over),
    )
    drawn = [
        watched.once(run, ("pair", x.key, y.key), lambda: figures.pair(run, x, y)),
        watched.once(run, ("progress", over), lambda: figures.progress(run, over)),
    ]
    is_drawn = any(not figure.is_empty for figure in drawn)
    told = (
        sections.note("A click on a point leads to its trial.")
        if is_drawn
        else empty("Nothing of this was measured yet.", later(run, watched.key))
    )
    page.plots("Plots", drawn, picked, told)


def _failures(run: Run) -> Html | None:
    counted = data.failures(run)
    if not counted:
        return None
    return sections.section("Failures by class", table(["Class", "Trials"], counted.items(), numeric=(1,)))


def _messages(run: Run) -> Html | None:
    told = [event for event in run.events if event["event"] == "message"][-20:]
    if not told:
        return None
    rows = [[event["time"][:19].replace("T", " "), event["level"], event["text"]] for event in told]
    return sections.section("Messages", table(["Time (UTC)", "Level", "Message"], rows))


def _trials(page: Page, watched: Watched, run: Run, query: Query) -> None:
    """A hundred trials at a time, with boxes to compare some."""
    state, sort, key = query.get("state", ""), query.get("sort", "number"), watched.key
    chosen = watched.once(run, ("chosen", state, sort), lambda: _chosen(run, state, sort))
    count = max(1, ceil(len(chosen) / PAGE_OF_TRIALS))
    asked = query.get("page", "1")
    number = min(count, max(1, int(asked))) if asked.isdecimal() and len(asked) < 9 else 1
    other = {name: value for name, value in query.items() if name in ("x", "y", "over")}
    picked = pick(choose("State", "state", STATES, state), choose("Order", "sort", SORTS, sort), hidden=other)
    pages = [
        element("a", name, href=url(key, page=at, state=state, sort=sort, **other) + "#trials", data_stay="")
        for name, at in (("← earlier", number - 1), ("later →", number + 1))
        if 1 <= at <= count
    ]
    told = f"{len(chosen)} trials, page {number} of {count}"
    inner = (
        [picked, element("div", told, *pages, cls="pages")] if run.trials else [sections.note("None yet.")]
    )
    page.add(element("section", element("h2", "All trials", id="trials"), *inner))
    if run.trials:
        # Apart from what is above it, so that other axes leave it as it is.
        shown = chosen[(number - 1) * PAGE_OF_TRIALS : number * PAGE_OF_TRIALS]
        page.add(watched.once(run, ("trials", state, sort, number), lambda: _boxes(key, run, shown)))


def _chosen(run: Run, state: str, sort: str) -> list[Trial]:
    return sorted((trial for trial in run.trials if not state or trial.state == state), key=_sorted_by(sort))


def _boxes(key: str, run: Run, shown: Sequence[Trial]) -> Html:
    """Trials with boxes, and the button that compares the ticked."""
    measured = [*(task.name for task in run.tasks), *sections.budget_heads(run), "Parameters"]
    header = ["Compare", "Trial", "State", *measured, "Took", "Layers", "Values", "Reason"]
    rows = [Row([_box(trial), *_cells(trial, run, key)], sections.look(trial, run)) for trial in shown]
    numbers = table(header, rows, numeric=(1, *range(3, 4 + len(measured))))
    button = element("button", "Compare the chosen", type="submit")
    form = element("form", numbers, button, method="get", action=url(key, "compare"))
    return element("section", form, cls="trials")


def _sorted_by(sort: str) -> Callable[[Trial], tuple[float, int]]:
    if sort == "quality":
        return lambda trial: (-(trial.quality if trial.quality is not None else -9e9), trial.number)
    if sort == "violation":
        return lambda trial: (trial.violation if trial.constraints else 9e9, trial.number)
    return lambda trial: (0.0, trial.number)


def _box(trial: Trial) -> Html:
    return element(
        "input", type="checkbox", name="t", value=trial.number, aria_label=f"Compare trial {trial.number}"
    )


def _cells(trial: Trial, run: Run, key: str) -> list[object]:
    number, *rest = sections.trial_row(trial, run)
    return [element("a", number, href=url(key, "trial", trial.number)), *rest]


def placement_page(watched: Watched) -> Page:
    """Which mixer stands at which layer."""
    run = watched.run()
    page = Page(f"Placement · {run.name}", watched.key, "Placement")
    page.add(element("header", element("h1", "Placement"), sections.note(run.name)))
    drawn = placements(run)
    if not drawn:
        page.add(
            empty(
                "No trial was trained yet, so no placement is better than another.",
                later(run, watched.key),
            )
        )
        return page
    how = "Each cell is the share of trials with that mixer at that layer; 0 is the first layer."
    page.plots("Mixer at each layer", drawn, sections.note(how))
    _terms(page, watched, run)
    rows = [
        [link_to(watched.key)(t, run), f"{t.quality:.4f}", words.short_layers(t.layers)]
        for t in best_placed(run)[:20]
    ]
    page.add(
        sections.section("The best", table(["Trial", "Mean normalised score", "Layers"], rows, numeric=(1,)))
    )
    return page


def _terms(page: Page, watched: Watched, run: Run) -> None:
    """What the model that places blocks has learnt, once there are trials to learn from."""
    found = watched.once(run, "terms", lambda: placement_terms(run))
    if found is None:
        told = f"The placement model is shown from {LEAST} trained trials with different layers on."
        page.add(sections.section("What the placement model has learnt", sections.note(told)))
        return
    how = (
        f"From {found.trials} of {found.trained} trained trials: the linear model that proposes the first placements, fitted "
        "anew. Where the search fixes how many layers a block gets, only differences between its layers count."
    )
    page.plots("What the placement model has learnt", terms(found), sections.note(how))
    rows = [
        [kind, f"{layer}", _term(term)]
        for kind, row in found.singles.items()
        for layer, term in enumerate(row)
    ]
    rows += [["pair", f"{low} → {high}", _term(term)] for (low, high), term in found.pairs.items()]
    numbers = table(["Block", "Layer, or lower → upper", "Worth ± standard deviation"], rows, numeric=(2,))
    page.add(element("section", element("details", element("summary", "The terms as a table"), numbers)))


def _term(term: Term) -> str:
    return f"{term.mean:+.4f} ± {term.sd:.4f}"


def latency_page(watched: Watched) -> Page:
    """Every timing, and the front's first against its second."""
    run = watched.run()
    page = Page(f"Latency · {run.name}", watched.key, "Latency")
    page.add(element("header", element("h1", "Latency"), sections.note(run.name)))
    told = watched.once(run, "how good the timings are", lambda: timing_section.timings(run))
    if next(data.latencies(run), None) is None:
        page.add(empty("No spec was timed yet.", later(run, watched.key)))
    page.add(sections.predictions(run), told)
    page.plots("Measured against predicted", [*latency_section.unseen(run), *latency_section.scatter(run)])
    page.plots("The front timed twice", figures.twice(run))
    page.add(sections.remeasured(run), sections.latencies(run, LATENCIES), sections.environment(run))
    return page


# A table of ten thousand timings helps nobody; the trials' own pages have each of them.
LATENCIES = 200
