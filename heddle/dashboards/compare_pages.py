"""The pages of a few trials and spec files side by side, of one run or of several, and of the fronts of all runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from heddle import specs
from heddle.dashboards import data, model_figures, sections, words
from heddle.dashboards.axes import all_axes
from heddle.dashboards.frame import Page, choose, empty, pick, url
from heddle.dashboards.html import Html, Row, element, join, table
from heddle.dashboards.named_specs import NamedSpec, find_spec
from heddle.dashboards.runs_figures import COSTS, Beside, compared, fronts
from heddle.dashboards.site import PATIENCE_S, Site, Watched
from heddle.dashboards.trial_pages import find
from heddle.errors import HeddleError
from heddle.search.costs import model_costs
from heddle.search.record import BudgetInfo, Run, Trial

MOST = 6
# Of a front with more members those with the best scores are offered; all others are found in their run.
OFFERED = 12
# A longer list of differences is folded.
OPEN = 24
# Where costs are counted if no budget says.
CONTEXT, BATCH = 4096, 1
Place = tuple[str, int]


@dataclass(frozen=True)
class Asked:
    """What is to be compared: trials by run and number, spec files by name, and the other choices of the page."""

    places: Sequence[Place]
    names: Sequence[str]
    query: Mapping[str, str]


def compare_page(site: Site, watched: Watched, asked: Asked) -> Page:
    """Two to six trials of one run, or spec files beside them: layers aligned, figures side by side, what differs."""
    run, key = watched.run(), watched.key
    page = Page(f"Compare · {run.name}", key, "Compare")
    page.add(element("header", element("h1", "Compare"), sections.note(run.name)))
    trials = [_beside(key, run, find(run, number)) for _, number in dict.fromkeys(asked.places)]
    chosen = _side_by_side(page, trials, [find_spec(site.specs, name) for name in dict.fromkeys(asked.names)])
    if not 2 <= len(chosen) <= MOST:
        where = element("a", "All trials", href=url(key) + "#trials")
        page.add(
            _too_few(site, chosen, join(["Tick the boxes in ", where, " and press the button below them."]))
        )
    if site.specs:
        kept = [("t", one.trial.number) for one in trials]
        page.add(_form(url(key, "compare"), kept, _spec_boxes(site, asked.names)))
    if not site.is_run:
        link = element("a", "Beside trials of other runs", href=url(None, "compare", **_kept(chosen)))
        page.add(element("p", link))
    return page


def compare_runs_page(site: Site, asked: Asked) -> Page:
    """Two to six trials of several runs, or spec files, and below them the fronts of all runs to choose from."""
    page = Page("Compare", here="Compare")
    page.add(element("header", element("h1", "Compare"), sections.note(str(site.root))))
    known = readable(site)
    trials = []
    for key, number in dict.fromkeys(asked.places):
        run = site.watched(key).run()
        trials.append(_beside(key, run, find(run, number), several=True))
    chosen = _side_by_side(page, trials, [find_spec(site.specs, name) for name in dict.fromkeys(asked.names)])
    if not 2 <= len(chosen) <= MOST:
        page.add(_too_few(site, chosen, "Tick the boxes below and press the button at their end."))
    add_fronts(page, site, known, asked.query, chosen)
    return page


def _too_few(site: Site, chosen: Sequence[Beside], how: object) -> Html:
    what = "trials or specs" if site.specs else "trials"
    return empty(f"Two to {MOST} {what} can be compared; {len(chosen)} were chosen.", how)


def _kept(chosen: Sequence[Beside]) -> dict[str, list[str]]:
    """What an address or a form names of them: trials, and spec files."""
    return {
        "t": [one.place for one in chosen if one.run is not None],
        "s": [one.place for one in chosen if one.run is None],
    }


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
    page: Page, site: Site, runs: Mapping[str, Run], query: Mapping[str, str], chosen: Sequence[Beside] = ()
) -> None:
    """The fronts of all runs in one picture, and tables of their members and of spec files with boxes to compare some."""
    members = {
        key: [_beside(key, run, t, several=True) for t in run.front_trials] for key, run in runs.items()
    }
    if any(members.values()):
        _fronts(page, members, query, chosen)
    names = _kept(chosen)["s"]
    tables = [_trial_boxes(members, chosen)] if any(members.values()) else []
    tables += [_spec_boxes(site, names)] if site.specs else []
    if tables:
        # A chosen trial is among the boxes where there are any, and is kept here where there are none.
        kept = [] if any(members.values()) else [("t", place) for place in _kept(chosen)["t"]]
        page.add(_form(url(None, "compare"), kept, *tables))


def _fronts(
    page: Page, members: Mapping[str, Sequence[Beside]], query: Mapping[str, str], chosen: Sequence[Beside]
) -> None:
    known = all_axes([held[0].run for held in members.values() if held and held[0].run is not None])
    budget = next((key for key in known if key.startswith("budget:")), "parameters")
    x = known.get(query.get("x", ""), known[budget])
    y = known.get(query.get("y", ""), next(iter(known.values())))
    names = {key: axis.plain for key, axis in known.items()}
    choices = choose("Across", "x", names, x.key), choose("Up", "y", names, y.key)
    picked = pick(*choices, hidden=_kept(chosen))
    told = "Scores and times compare where data, recipe, tasks and machine are the same. A click leads to the trial."
    page.plots("Fronts of all runs", [fronts(members, x, y)], picked, sections.note(told))


def _form(action: str, kept: Sequence[tuple[str, object]], *tables: Html) -> Html:
    """Tables of boxes, and the button that compares the ticked with what is kept."""
    hidden = (element("input", type="hidden", name=name, value=value) for name, value in kept)
    button = element("button", "Compare the chosen", type="submit")
    form = element("form", *hidden, *tables, button, method="get", action=action)
    return element("section", form)


def _trial_boxes(members: Mapping[str, Sequence[Beside]], chosen: Sequence[Beside]) -> Html:
    """A row for each member of a front, and for what is chosen already."""
    ticked = {one.place: one for one in chosen if one.run is not None}
    offered = {one.place: one for held in members.values() for one in _best(held)}
    shown = [(one, one.run) for one in {**ticked, **offered}.values() if one.run is not None]
    tasks = dict.fromkeys(task.name for _, run in shown for task in run.tasks)
    budgets = dict.fromkeys(_budget_head(budget) for _, run in shown for budget in run.budgets)
    rows = []
    for one, _ in shown:
        facts = _facts(one)
        measured = [facts.get(name, "–") for name in (*tasks, *budgets, "parameters")]
        mark = " ★ winner" if one.is_winner else ""
        box = _box("t", one.place, one.name, one.place in ticked)
        rows.append([box, join([_link(one), mark]), *measured, facts["layers"]])
    header = ["Compare", "Trial", *tasks, *budgets, "Parameters", "Layers"]
    told = "Any other trial: tick it in its run, compare it there, and follow the link to other runs."
    numbers = table(header, rows, numeric=range(2, len(header) - 1))
    return join([element("h2", "Members of the fronts", id="members"), sections.note(told), numbers])


def _spec_boxes(site: Site, chosen: Sequence[str]) -> Html:
    """A row for each spec file that the user named."""
    rows: list[Sequence[object]] = []
    for key, named in site.specs.items():
        name = element("a", key, href=url(None, "spec", key))
        try:
            trial = named.read().trial
        except HeddleError as error:
            rows.append(Row(["", name, "", "", f"cannot be read: {error.what}"], "failed"))
            continue
        layers = words.short_layers(trial.layers)
        box = _box("s", key, key, key in chosen)
        rows.append([box, name, words.count_text(trial.parameters), layers, str(named.path)])
    numbers = table(["Compare", "Spec", "Parameters", "Layers", "File"], rows, numeric=(2,))
    return join([element("h2", "Spec files", id="specs"), numbers])


def _box(name: str, value: str, what: str, is_ticked: bool) -> Html:
    return element(
        "input", type="checkbox", name=name, value=value, aria_label=f"Compare {what}", checked="" if is_ticked else None
    )  # fmt: skip


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
        cells=data.strip(trial),
    )


def _beside_spec(named: NamedSpec) -> Beside:
    """A spec file among trials. Raises HeddleErrors where it is no spec."""
    held = named.read()
    return Beside(named.key, None, held.trial, url(None, "spec", named.key), named.key, held.cells)


def _link(one: Beside) -> Html:
    return element("a", one.name, href=one.address)


def _side_by_side(page: Page, trials: Sequence[Beside], named: Sequence[NamedSpec]) -> list[Beside]:
    """What can be compared of these, which is given back, beside each other if they are two to six."""
    chosen = list(trials)
    for one in named:
        try:
            chosen.append(_beside_spec(one))
        except HeddleError as error:
            page.add(empty(f"{one.key} cannot be read:", error))
    if not 2 <= len(chosen) <= MOST:
        return chosen
    context, batch = _place(chosen)
    chosen = [replace(one, costs=_costs(one, context, batch)) for one in chosen]
    strips = [(_link(one), one.cells) for one in chosen]
    mixers = {cell.mixer for _, cells in strips for cell in cells}
    hint = sections.note("First layer on the left.")
    page.add(sections.section("Layers", hint, sections.legend(mixers), sections.strip_table(strips)))
    page.add(
        _table(chosen, f"FLOPs and bytes are computed from the spec, at context {context} and batch {batch}.")
    )
    curves = model_figures.curves([(one.name, one.trial) for one in chosen])
    page.plots("Plots", [compared(chosen), *curves])
    page.add(*(_difference(chosen[0], other) for other in chosen[1:]))
    return chosen


def _place(chosen: Sequence[Beside]) -> tuple[int, int]:
    """The context and batch at which costs are counted: those of the first budget that has some."""
    budgets = (budget for one in chosen if one.run is not None for budget in one.run.budgets)
    return next(((budget.context, budget.batch) for budget in budgets if budget.context), (CONTEXT, BATCH))


def _costs(one: Beside, context: int, batch: int) -> dict[str, float]:
    try:
        return model_costs(one.trial.spec, context=context, batch=batch)
    except HeddleError:
        # Written by another heddle, perhaps: there is enough else to compare.
        return {}


def _table(chosen: Sequence[Beside], told: str) -> Html:
    """A row for each quantity and each value the search chose; what differs stands out."""
    facts = [_facts(one) for one in chosen]
    if len({one.run.path for one in chosen if one.run is not None}) > 1:
        facts = [_origin(one.run) | each for one, each in zip(chosen, facts, strict=True)]
    rows: list[Row] = []
    for field in dict.fromkeys(field for each in facts for field in each):
        values = [each.get(field, "–") for each in facts]
        rows.append(Row([field, *values], "differs" if len(set(values)) > 1 else None))
    return sections.section("Side by side", sections.note(told), table(["", *map(_link, chosen)], rows))


def _origin(run: Run | None) -> dict[str, str]:
    """What decides whether trials of two runs can be compared at all."""
    if run is None:
        return {}
    environment = run.meta.get("environment", {})
    packages = environment.get("packages", {})
    told = {"machine": environment.get("device_name"), "torch": packages.get("torch")}
    return {name: str(value) for name, value in told.items() if value is not None}


def _facts(one: Beside) -> dict[str, str]:
    trial, run = one.trial, one.run
    facts = {"state": words.STATE_WORDS.get(trial.state, trial.state)}
    if run is not None:
        heads = [*(task.name for task in run.tasks), *map(_budget_head, run.budgets)]
        cells = [*words.score_cells(trial, run), *words.budget_cells(trial, run)]
        facts |= dict(zip(heads, cells, strict=True))
    facts |= {"parameters": words.count_text(trial.parameters)}
    facts |= {name: write(one.costs[key]) for key, (name, write) in COSTS.items() if key in one.costs}
    return {**facts, "layers": words.short_layers(trial.layers), **dict(sections.flat(trial.params))}


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
    if isinstance(value, Mapping):
        return "; ".join(f"{name} {text}" for name, text in sections.flat(value))
    return "–" if value is None else str(value)
