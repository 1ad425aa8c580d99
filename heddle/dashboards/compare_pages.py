"""The pages of a few trials side by side, of one run or of several, and of the fronts of all runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from heddle import specs
from heddle.dashboards import data, model_figures, sections, words
from heddle.dashboards.axes import all_axes
from heddle.dashboards.frame import Page, choose, empty, pick, url
from heddle.dashboards.html import Html, Row, element, join, table
from heddle.dashboards.runs_figures import Beside, compared, fronts
from heddle.dashboards.site import PATIENCE_S, Site, Watched
from heddle.dashboards.trial_pages import find
from heddle.errors import HeddleError
from heddle.search.record import BudgetInfo, Run, Trial

MOST = 6
# Of a front with more members those with the best scores are offered; all others are found in their run.
OFFERED = 12
# A longer list of differences is folded.
OPEN = 24
Place = tuple[str, int]


def compare_page(site: Site, watched: Watched, numbers: Sequence[int]) -> Page:
    """Two to six trials of one run: layers aligned, figures side by side, what differs."""
    run, key = watched.run(), watched.key
    page = Page(f"Compare · {run.name}", key, "Compare")
    page.add(element("header", element("h1", "Compare"), sections.note(run.name)))
    chosen = [_beside(key, run, find(run, number)) for number in dict.fromkeys(numbers)]
    if 2 <= len(chosen) <= MOST:
        _side_by_side(page, chosen)
    else:
        said = f"Two to {MOST} trials can be compared; {len(chosen)} were chosen."
        where = element("a", "All trials", href=url(key) + "#trials")
        page.add(empty(said, join(["Tick the boxes in ", where, " and press the button below them."])))
    if not site.is_run:
        places = [f"{key}:{one.trial.number}" for one in chosen]
        link = element("a", "Beside trials of other runs", href=url(None, "compare", t=places))
        page.add(element("p", link))
    return page


def compare_runs_page(site: Site, places: Sequence[Place], query: Mapping[str, str]) -> Page:
    """Two to six trials of several runs, and below them the fronts of all runs to choose from."""
    page = Page("Compare", here="Compare")
    page.add(element("header", element("h1", "Compare"), sections.note(str(site.root))))
    known = readable(site)
    chosen = []
    for key, number in dict.fromkeys(places):
        run = site.watched(key).run()
        chosen.append(_beside(key, run, find(run, number), several=True))
    if 2 <= len(chosen) <= MOST:
        _side_by_side(page, chosen)
    else:
        said = f"Two to {MOST} trials can be compared; {len(chosen)} were chosen."
        page.add(empty(said, "Tick the boxes below and press the button at their end."))
    add_fronts(page, known, query, chosen)
    return page


def readable(site: Site) -> dict[str, Run]:
    """The runs of a folder that can be read, by their keys."""
    known, found = site.runs(), {}
    for key, watched in known.items():
        try:
            found[key] = watched.run(PATIENCE_S / len(known))
        except HeddleError:
            continue
    return found


def add_fronts(
    page: Page, runs: Mapping[str, Run], query: Mapping[str, str], chosen: Sequence[Beside] = ()
) -> None:
    """The fronts of all runs in one picture, and a table of their members with boxes to compare some."""
    if not any(run.front for run in runs.values()):
        return
    known = all_axes(list(runs.values()))
    budget = next((key for key in known if key.startswith("budget:")), "parameters")
    x = known.get(query.get("x", ""), known[budget])
    y = known.get(query.get("y", ""), next(iter(known.values())))
    members = {
        key: [_beside(key, run, t, several=True) for t in run.front_trials] for key, run in runs.items()
    }
    names = {key: axis.plain for key, axis in known.items()}
    kept = {"t": [one.place for one in chosen]}
    picked = pick(choose("Across", "x", names, x.key), choose("Up", "y", names, y.key), hidden=kept)
    told = "Scores and times compare where data, recipe, tasks and machine are the same. A click leads to the trial."
    page.plots("Fronts of all runs", [fronts(members, x, y)], picked, sections.note(told))
    page.add(_boxes(members, chosen))


def _boxes(members: Mapping[str, Sequence[Beside]], chosen: Sequence[Beside]) -> Html:
    """A row for each member of a front, and for what is chosen already."""
    ticked = {one.place: one for one in chosen}
    offered = {one.place: one for held in members.values() for one in _best(held)}
    shown = list({**ticked, **offered}.values())
    tasks = dict.fromkeys(task.name for one in shown for task in one.run.tasks)
    budgets = dict.fromkeys(_budget_head(budget) for one in shown for budget in one.run.budgets)
    rows = []
    for one in shown:
        box = element(
            "input", type="checkbox", name="t", value=one.place, aria_label=f"Compare {one.name}",
            checked="" if one.place in ticked else None,
        )  # fmt: skip
        facts = _facts(one)
        measured = [facts.get(name, "–") for name in (*tasks, *budgets, "parameters")]
        mark = " ★ winner" if one.trial.number == one.run.best else ""
        rows.append([box, join([_link(one), mark]), *measured, facts["layers"]])
    header = ["Compare", "Trial", *tasks, *budgets, "Parameters", "Layers"]
    button = element("button", "Compare the chosen", type="submit")
    inner = table(header, rows, numeric=range(2, len(header) - 1))
    form = element("form", inner, button, method="get", action=url(None, "compare"))
    told = "Any other trial: tick it in its run, compare it there, and follow the link to other runs."
    return element("section", element("h2", "Members of the fronts", id="members"), sections.note(told), form)


def _best(held: Sequence[Beside]) -> list[Beside]:
    return sorted(held, key=lambda one: -(one.trial.quality or 0.0))[:OFFERED]


def _beside(key: str, run: Run, trial: Trial, *, several: bool = False) -> Beside:
    name = data.name_of(trial, run)
    return Beside(
        f"{key}: {name}" if several else name,
        run,
        trial,
        address=url(key, "trial", trial.number),
        place=f"{key}:{trial.number}",
    )


def _link(one: Beside) -> Html:
    return element("a", one.name, href=one.address)


def _side_by_side(page: Page, chosen: Sequence[Beside]) -> None:
    strips = [(_link(one), data.strip(one.trial)) for one in chosen]
    mixers = {cell.mixer for _, cells in strips for cell in cells}
    hint = sections.note("First layer on the left.")
    page.add(sections.section("Layers", hint, sections.legend(mixers), sections.strip_table(strips)))
    page.add(_table(chosen))
    curves = model_figures.curves([(one.name, one.trial) for one in chosen])
    page.plots("Plots", [compared(chosen), *curves])
    page.add(*(_difference(chosen[0], other) for other in chosen[1:]))


def _table(chosen: Sequence[Beside]) -> Html:
    """A row for each quantity and each value the search chose; what differs stands out."""
    facts = [_facts(one) for one in chosen]
    if len({one.run.path for one in chosen}) > 1:
        facts = [_origin(one.run) | each for one, each in zip(chosen, facts, strict=True)]
    rows: list[Row] = []
    for field in dict.fromkeys(field for each in facts for field in each):
        values = [each.get(field, "–") for each in facts]
        rows.append(Row([field, *values], "differs" if len(set(values)) > 1 else None))
    return sections.section("Side by side", table(["", *map(_link, chosen)], rows))


def _origin(run: Run) -> dict[str, str]:
    """What decides whether trials of two runs can be compared at all."""
    environment = run.meta.get("environment", {})
    packages = environment.get("packages", {})
    told = {"machine": environment.get("device_name"), "torch": packages.get("torch")}
    return {name: str(value) for name, value in told.items() if value is not None}


def _facts(one: Beside) -> dict[str, str]:
    trial, run = one.trial, one.run
    heads = [*(task.name for task in run.tasks), *map(_budget_head, run.budgets)]
    cells = [*words.score_cells(trial, run), *words.budget_cells(trial, run)]
    facts = {"state": words.STATE_WORDS.get(trial.state, trial.state), **dict(zip(heads, cells, strict=True))}
    facts |= {"parameters": words.count_text(trial.parameters), "layers": words.short_layers(trial.layers)}
    return facts | dict(sections.flat(trial.params))


def _budget_head(budget: BudgetInfo) -> str:
    """With the place of the measurement, which may differ between runs."""
    return f"{words.budget_name(budget)}, {budget.batch} × {budget.context}"


def _difference(left: Beside, right: Beside) -> Html:
    """What `heddle diff` tells of two specs."""
    title = f"{right.name} against {left.name}"
    try:
        found = specs.differences(specs.loads(left.trial.spec).spec, specs.loads(right.trial.spec).spec)
    except HeddleError as error:
        return sections.section(title, empty("A spec cannot be read by this heddle:", error))
    rows = [[each.path, _text(each.left), _text(each.right)] for each in found]
    if not rows:
        return sections.section(
            title, sections.note("The two specs are the same model, trained in the same way.")
        )
    found_all = table(["Field", left.name, right.name], rows)
    if len(rows) <= OPEN:
        return sections.section(title, found_all)
    summary = element("summary", f"{len(rows)} fields differ")
    return sections.section(title, element("details", summary, found_all))


def _text(value: object) -> str:
    return "–" if value is None else str(value)
