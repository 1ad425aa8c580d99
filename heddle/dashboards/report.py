"""A run as one HTML page: no network, readable with scripts off, every name of the run shown as text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from heddle.dashboards.every_figure import grouped
from heddle.dashboards.figures import Figure
from heddle.dashboards.html import Html, element
from heddle.dashboards.longer_section import longer
from heddle.dashboards.rates_section import learning_rates
from heddle.dashboards.sections import EVIDENCE, NO_SCRIPTS, OUTCOME, header, plot_places, section
from heddle.search.durable import write_whole
from heddle.search.record import Run

FILE = "report.html"
# plotly.js 4.1.1 with its Cartesian plots alone (npm: plotly.js-cartesian-dist-min): a browser reads all of plotly three
# times as long, and that was most of the time to a first view.
PLOTLY = "plotly/plotly-cartesian.min.js"


def write_report(run: Run, out: Path) -> Path:
    """Write `run` as one self-contained page to `out`, whole or not at all, and give the path.

    Raises:
        HeddleError: "disk-full".
    """
    write_whole(out, page(run).encode())
    return out


def page(run: Run) -> Html:
    """The whole page."""
    groups = grouped(run)
    drawn = [figure for _, figures in groups for figure in figures]
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", f"Heddle search: {run.name}"),
        element("style", Html(_resource("report.css"))),
    )
    parts = (
        [part(run) for part in OUTCOME],
        _plots(groups),
        [part(run) for part in (learning_rates, longer, *EVIDENCE)],
    )
    sections = [section for group in parts for section in group if section is not None]
    body = element("body", element("header", *header(run)), element("main", *sections), *_scripts(drawn))
    return Html(f"<!doctype html>\n{element('html', head, body, lang='en')}\n")


def _plots(groups: Sequence[tuple[str, list[Figure]]]) -> list[Html]:
    """The places of the plots; report.js fills them."""
    sections, first = [], 0
    for title, drawn in groups:
        told = [] if first else [NO_SCRIPTS]
        sections.append(section(title, *told, plot_places(drawn, first)))
        first += len(drawn)
    return sections


def _scripts(drawn: list[Figure]) -> list[Html]:
    if not drawn:
        return []
    # "<" cannot end the script element, nor open another, when it is written as an escape.
    figures_json = json.dumps([figure.plain() for figure in drawn], allow_nan=False).replace("<", "\\u003c")
    return [
        element("script", Html(figures_json), type="application/json", id="figures"),
        element("script", Html(_resource(PLOTLY))),
        element("script", Html(_resource("report.js"))),
    ]


def _resource(name: str) -> str:
    return resources.files("heddle.dashboards").joinpath(name).read_text(encoding="utf-8")
