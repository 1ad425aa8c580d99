"""The page of a spec file that the user named beside the runs."""

from __future__ import annotations

import shlex

from heddle.dashboards import words
from heddle.dashboards.frame import Page, copyable, empty, tiles, url
from heddle.dashboards.html import element
from heddle.dashboards.named_specs import NamedSpec, find_spec
from heddle.dashboards.sections import section
from heddle.dashboards.site import Site
from heddle.dashboards.trial_pages import add_costs, add_layers
from heddle.errors import HeddleError
from heddle.search.costs import layer_costs


def spec_page(site: Site, key: str) -> Page:
    """Its layers, what they cost, its text. Raises HeddleError "run-not-found"."""
    named = find_spec(site.specs, key)
    page = Page(f"{key} · spec", here="Compare")
    run = next(iter(site.runs())) if site.is_run else None
    link = element("a", "compare it", href=url(run, "compare", s=key))
    over = element("p", str(named.path), cls="over")
    page.add(element("header", over, element("h1", key), element("div", link, cls="pages")))
    try:
        _model(page, named)
    except HeddleError as error:
        page.add(empty("It cannot be read:", error, "Mend it, and this page follows."))
    return page


def _model(page: Page, named: NamedSpec) -> None:
    held = named.read()
    trial, context = held.trial, held.context
    facts = [("parameters", words.count_text(trial.parameters)), ("layers", len(trial.layers))]
    page.add(element("section", tiles([("what", trial.state), *facts])))
    add_layers(page, held.cells)
    layers = layer_costs(trial.spec, context=context, batch=1)
    add_costs(page, held.cells, layers, (context, 1), url(None, "spec", named.key, "graph.svg"))
    command = copyable("What each layer computes", f"heddle show {shlex.quote(str(named.path))}", "show")
    page.add(section("Take it along", command, copyable(f"The spec, hash {trial.hash}", trial.spec, "spec")))
