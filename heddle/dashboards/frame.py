"""The frame of every page of the dashboard: head, navigation, sections that follow the run, figures."""

from __future__ import annotations

import json
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import quote, urlencode

from heddle.dashboards.figures import Figure
from heddle.dashboards.html import Html, element, join
from heddle.dashboards.sections import NO_SCRIPTS, plot_places
from heddle.search.record import Run


@dataclass(slots=True)
class Page:
    """A page in the making: sections one after the other, figures numbered through."""

    title: str
    # What the page belongs to: a run's key, and which entry of the navigation it is.
    key: str | None = None
    here: str = ""
    sections: list[Html] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    # What is added to the address of the live events, so that only its own run wakes a page.
    follows: bool = True
    # Whether what is seen first has no figures for the script, so that what draws them can come later.
    is_plain_first: bool = False
    # What of the runs it was made of, so that nothing is missed between the page and its events.
    seen: str = ""

    def add(self, *parts: Html | None) -> None:
        """Sections; None is a section that has nothing to say."""
        self.sections += [part for part in parts if part is not None]

    def plots(self, title: str, drawn: Sequence[Figure], *before: object) -> None:
        """A section of figures; none where no figure has anything to show."""
        shown = [figure for figure in drawn if not figure.is_empty]
        if not shown and not before:
            return
        places = plot_places(shown, len(self.figures))
        self.add(element("section", element("h2", title), NO_SCRIPTS, *before, places))
        self.figures += shown


def url(key: str | None, *parts: object, **query: object) -> str:
    """The address of a page; every part is quoted, so that a name is one step and no more."""
    steps = ["run", key, *parts] if key is not None else list(parts)
    path = "/" + "/".join(quote(str(step), safe="") for step in steps)
    chosen = {name: value for name, value in query.items() if value not in (None, "")}
    return f"{path}?{urlencode(chosen, doseq=True)}" if chosen else path


def whole(page: Page, nav: Sequence[tuple[str, str]], has: Collection[str] = ()) -> Html:
    """The page as it is sent; sections and figures with digests in `has` without what is in them."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", f"{page.title} · Heddle"),
        *(element("link", rel="stylesheet", href=f"/assets/{name}") for name in ("report.css", "app.css")),
        element("link", rel="icon", href="data:,"),
    )
    # A full stop behind the last step: the number of the trial is put there by the script.
    trials = None if page.key is None else url(page.key, "trial", "")
    events = url(None, "events", run=page.key, seen=page.seen) if page.follows else None
    body = element(
        "body",
        element("a", "Skip to the page", href="#main", cls="skip"),
        _top(page, nav),
        element("main", *_live(page.sections, has), id="main", tabindex="-1"),
        *_scripts(page, has),
        data_trials=trials,
        data_events=events,
    )
    return Html(f"<!doctype html>\n{element('html', head, body, lang='en')}\n")


def _top(page: Page, nav: Sequence[tuple[str, str]]) -> Html:
    links = [
        element("a", name, href=address, aria_current="page" if name == page.here else None)
        for name, address in nav
    ]
    brand = element("a", "Heddle", href="/", cls="brand")
    return element(
        "nav", brand, *links, element("span", id="link", role="status"), cls="top", aria_label="Pages"
    )


def _live(sections: Sequence[Html], has: Collection[str]) -> list[Html]:
    """Each section with a name and a digest, by which the script sees what changed."""
    parts = []
    for index, part in enumerate(sections):
        digest = _digest(part)
        named = {"id": f"part-{index}", "data_live": digest}
        is_known = digest in has
        parts.append(element("div", "" if is_known else part, **named, data_same="" if is_known else None))
    return parts


def _digest(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def _scripts(page: Page, has: Collection[str]) -> list[Html]:
    told = [_told(figure, has) for figure in page.figures]
    # "<" cannot end the script element, nor open another, when it is written as an escape.
    data = f"[{','.join(told)}]".replace("<", "\\u003c")
    # report.js draws at once, or fetches plotly when it has to, and app.js says what then happens to each plot.
    plotly = [] if page.is_plain_first else ["plotly.js"]
    names = ["app.js", *plotly, "report.js"] if page.figures else ["app.js"]
    held = [element("script", Html(data), type="application/json", id="figures")] if page.figures else []
    return [*held, *(element("script", src=f"/assets/{name}", defer="") for name in names)]


def _told(figure: Figure, has: Collection[str]) -> str:
    """The figure as JSON with a digest of it; the digest alone where the page has it."""
    plain = json.dumps(figure.plain(), allow_nan=False)
    digest = _digest(plain)
    return json.dumps({"digest": digest}) if digest in has else f'{{"digest": "{digest}", {plain[1:]}'


def choose(label: str, name: str, options: Mapping[str, str], chosen: str | None) -> Html:
    """A labelled list to choose from, which submits its form."""
    items = (
        element("option", text, value=value, selected="" if value == chosen else None)
        for value, text in options.items()
    )
    return element("label", label, element("select", *items, name=name, data_submit=""))


def pick(*fields: Html, hidden: Mapping[str, object] | None = None) -> Html:
    """A form that asks for the same page with other choices; its button is for those without scripts."""
    kept = (
        element("input", type="hidden", name=name, value=one)
        for name, value in (hidden or {}).items()
        for one in (value if isinstance(value, list) else [value])
    )
    button = element("noscript", element("button", "Show", type="submit"))
    return element("form", *kept, *fields, button, method="get", cls="pick")


def tiles(facts: Sequence[tuple[str, object]]) -> Html:
    """A row of figures, each with what it counts."""
    return element(
        "ul",
        *(element("li", element("b", value), element("span", what)) for what, value in facts),
        cls="tiles",
    )


def empty(*told: object) -> Html:
    """What to do where there is nothing to see."""
    return element("div", *(element("p", one) for one in told), cls="empty")


def later(run: Run, key: str) -> Html:
    """What to do where a page of a run has nothing to show yet, or never will."""
    if run.status == "running":
        return Html("It is shown here as soon as it is there.")
    trials = element("a", "All trials", href=url(key) + "#trials")
    return join(["The search has ended. ", trials, ": how far each came, and why no further."])


def copyable(title: str, text: str, name: str) -> Html:
    """A text with a button that copies it."""
    button = element("button", "Copy", type="button", data_copy=name, aria_label=f"Copy: {title}")
    top = element("div", element("h3", title), button, cls="with-button")
    return join([top, element("pre", text, id=name, tabindex="0")])
