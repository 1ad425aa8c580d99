"""The dashboard's web server: read-only pages of runs, on this machine alone unless a token is asked for.

Why Starlette and uvicorn: docs/decisions/0009-dashboard-server.md.
"""

from __future__ import annotations

import asyncio
import socket
import time
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from importlib import resources
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Mount, Route
from starlette.types import ASGIApp

from heddle.dashboards import bench_page, compare_pages, pages, trial_pages
from heddle.dashboards.doors import BOARD, Doors, tools_page
from heddle.dashboards.frame import Page, empty, url, whole
from heddle.dashboards.guard import Guard, is_local, new_token
from heddle.dashboards.html import element
from heddle.dashboards.named_specs import find_spec
from heddle.dashboards.report import PLOTLY
from heddle.dashboards.site import Site, Watched
from heddle.dashboards.spec_page import spec_page
from heddle.dashboards.training_page import training_page
from heddle.dashboards.wsgi import Behind
from heddle.errors import HeddleError
from heddle.search.costs import graph_picture

# Names the sections and figures that a page has, by their digests.
HAS = "heddle-has"
# How often the files of a run are looked at, and how often a quiet page is told that the server lives.
LOOK_S, QUIET_S = 0.5, 15.0
# How often a page is told while a large run is being read.
BEHIND_S = 2.0
NOT_THERE = ("run-not-found", "bad-argument", "package-missing")


def app(site: Site, *, token: str | None, is_closing: Callable[[], bool] = lambda: False) -> ASGIApp:
    """The pages of `site`; with a `token` every route asks for it, without one only local names are answered.

    `is_closing` ends the answers that follow a run.
    """
    views = Views(site, is_closing)
    routes: list[BaseRoute] = [
        Route("/", views.home),
        Route("/compare", views.compare),
        Route("/training/{key}", views.training),
        Route("/spec/{key}", views.spec),
        Route("/spec/{key}/graph.svg", views.spec_graph),
        Route("/kernels", views.kernels),
        Route("/events", views.events),
        Route("/assets/{name}", views.asset),
        Route("/run/{key}", views.page(pages.front)),
        Route("/run/{key}/placement", views.page(lambda held, _: pages.placement_page(held))),
        Route("/run/{key}/latency", views.page(lambda held, _: pages.latency_page(held))),
        Route("/run/{key}/tools", views.page(lambda held, _: tools_page(held))),
        Route("/run/{key}/open/{door}", views.open),
        Route(
            "/run/{key}/compare",
            views.page(lambda held, q: compare_pages.compare_page(site, held, _asked(q))),
        ),
        Route("/run/{key}/trial/{number}", views.trial),
        Route("/run/{key}/graph/{number}.svg", views.graph),
    ]
    routes += _doors(views.doors)
    handlers: dict[Any, Any] = {HeddleError: views.failed, 404: views.missing, Exception: views.failed}
    return Guard(Starlette(routes=routes, exception_handlers=handlers), token)


def _doors(doors: Doors) -> list[BaseRoute]:
    """The addresses of optuna-dashboard, which has them at the root, and of TensorBoard."""
    study = Behind(lambda: doors.optuna, ("GET", "HEAD"))
    # TensorBoard asks for its numbers with POST.
    board = Behind(lambda: doors.board, ("GET", "HEAD", "POST"))
    found = [(f"/{name}", study) for name in ("dashboard", "api", "static", "csv")] + [(BOARD, board)]
    return [Mount(path, app=app) for path, app in found]


def _asked(query: QueryParams) -> compare_pages.Asked:
    """What was chosen to be compared: trials, of one run by number, of several as `run:number`, and spec files by name.

    Raises:
        HeddleError: "bad-argument".
    """
    most = compare_pages.MOST + 1
    parted = [text.rpartition(":") for text in query.getlist("t")[:most]]
    places = [(key, _number(number)) for key, _, number in parted]
    return compare_pages.Asked(places, query.getlist("s")[:most], query)


def _number(text: str) -> int:
    if not text.removeprefix("-").isascii() or not text.removeprefix("-").isdigit() or len(text) > 9:
        raise HeddleError("bad-argument", f"{text[:40]!r} is no number of a trial")
    return int(text)


class Views:
    """The answers; each reads what it shows in a thread, so that one large run keeps no other page waiting."""

    def __init__(self, site: Site, is_closing: Callable[[], bool]) -> None:
        self.site, self.is_closing, self.doors = site, is_closing, Doors()
        self._assets: dict[str, tuple[bytes, str]] = {}

    def home(self, request: Request) -> Response:
        """The run, or all of a folder side by side."""
        if self.site.is_run:
            return RedirectResponse(url(next(iter(self.site.runs()))), 303)
        if self.site.is_training:
            return RedirectResponse(url(None, "training", self.site.trainings()[0]), 303)
        return self._follow_all(lambda: pages.overview(self.site, request.query_params), request)

    def training(self, request: Request) -> Response:
        return self._send(training_page(self.site, request.path_params["key"]))

    def compare(self, request: Request) -> Response:
        """Trials of several runs."""
        asked = _asked(request.query_params)
        return self._follow_all(lambda: compare_pages.compare_runs_page(self.site, asked), request)

    def spec(self, request: Request) -> Response:
        return self._follow_all(lambda: spec_page(self.site, request.path_params["key"]), request)

    def spec_graph(self, request: Request) -> Response:
        named = find_spec(self.site.specs, request.path_params["key"])
        return Response(graph_picture(named.read().trial.spec), media_type="image/svg+xml")

    def _follow_all(self, make: Callable[[], Page], request: Request) -> Response:
        """A page of all runs, with the versions that it is newer than."""
        seen = self._digest([one.key + one.seen() for one in self.site.runs().values()])
        page = make()
        page.seen = seen
        return self._send(page, request=request)

    def kernels(self, request: Request) -> Response:
        if self.site.bench is None:
            return self.missing(request, None)
        return self._send(bench_page.kernels(self.site.bench, request.query_params))

    def page(self, make: Callable[[Watched, QueryParams], Page]) -> Callable[[Request], Response]:
        """A page of one run."""

        def view(request: Request) -> Response:
            watched = self.site.watched(request.path_params["key"])
            return self._follow(watched, lambda: make(watched, request.query_params), request)

        return view

    def _follow(self, watched: Watched, make: Callable[[], Page], request: Request | None = None) -> Response:
        """A page with the version that it shows or is newer than."""
        watched.run()
        seen = self._digest([watched.key + watched.seen()])
        page = make()
        page.seen = seen
        return self._send(page, request=request)

    def trial(self, request: Request) -> Response:
        watched = self.site.watched(request.path_params["key"])
        number = _number(request.path_params["number"])
        return self._follow(watched, lambda: trial_pages.trial_page(watched, number), request)

    def open(self, request: Request) -> Response:
        """To another program's page, which shows the run as it stands now."""
        watched = self.site.watched(request.path_params["key"])
        doors = {"study": self.doors.open_study, "curves": self.doors.open_board}
        door = doors.get(request.path_params["door"])
        return self.missing(request, None) if door is None else RedirectResponse(door(watched), 303)

    def graph(self, request: Request) -> Response:
        watched = self.site.watched(request.path_params["key"])
        trial = trial_pages.find(watched.run(), _number(request.path_params["number"]))
        return Response(graph_picture(trial.spec), media_type="image/svg+xml")

    def asset(self, request: Request) -> Response:
        """One of the few files that pages are made of; nothing else is looked for."""
        held = self._asset(request.path_params["name"])
        if held is None:
            return self.missing(request, None)
        body, kind = held
        # Plotly is large and changes with heddle's version alone.
        keep = {"cache-control": "max-age=3600"} if kind == "text/javascript" and len(body) > 1e6 else {}
        return Response(body, media_type=kind, headers=keep)

    def _asset(self, name: str) -> tuple[bytes, str] | None:
        kinds = {"report.css": "text/css", "app.css": "text/css"}
        kinds |= dict.fromkeys(("report.js", "app.js", "plotly.js"), "text/javascript")
        if name not in kinds:
            return None
        if name not in self._assets:
            file = resources.files("heddle.dashboards").joinpath(PLOTLY if name == "plotly.js" else name)
            self._assets[name] = (file.read_bytes(), kinds[name])
        return self._assets[name]

    async def events(self, request: Request) -> Response:
        """Server-sent events: one whenever the files of a run, or the list of runs, have changed."""
        key = request.query_params.get("run")
        watched = [await run_in_threadpool(self.site.watched, key)] if key else None
        return StreamingResponse(
            self._changes(watched, request.query_params.get("seen")), media_type="text/event-stream"
        )

    async def _changes(self, watched: list[Watched] | None, last: str | None) -> AsyncIterator[str]:
        """Events from the version `last` on; from now on if that is None."""
        if last is None:
            last, _ = await run_in_threadpool(self._look, watched)
        told = time.monotonic()
        yield "retry: 1000\n\n"
        behind = False
        while not self.is_closing():
            await asyncio.sleep(0 if behind else LOOK_S)
            seen, behind = await run_in_threadpool(self._look, watched)
            quiet = time.monotonic() - told
            # While a large run is being read its pages change without end, and drawing them takes time from reading.
            if seen != last and (not behind or quiet > BEHIND_S):
                last, told = seen, time.monotonic()
                yield "data: changed\n\n"
            elif quiet >= QUIET_S:
                told = time.monotonic()
                yield ": here\n\n"

    def _look(self, watched: list[Watched] | None) -> tuple[str, bool]:
        """The version of the runs, and whether one is not read to its end yet; that one is read on."""
        known = list(self.site.runs().values()) if watched is None else watched
        for one in known:
            if one.follower.share_read < 1:
                # A run that cannot be read is told by its pages.
                with suppress(HeddleError):
                    one.read_on()
        behind = any(0 < one.follower.share_read < 1 for one in known)
        return self._digest([one.key + one.version() for one in known]), behind

    def _digest(self, versions: list[str]) -> str:
        """One text for the versions of some runs, and of the spec files that stand beside them."""
        versions = [*versions, *(one.version() for one in self.site.specs.values())]
        return f"{zlib.crc32(repr(versions).encode()):08x}"

    def failed(self, request: Request, error: Exception) -> Response:  # noqa: ARG002
        """A user's mistake, or a run that cannot be read, told as every command tells it."""
        status = 404 if isinstance(error, HeddleError) and error.code in NOT_THERE else 500
        text = str(error) if isinstance(error, HeddleError) else f"{type(error).__name__}: {error}"
        return self._send(_told("That cannot be shown", text), status)

    def missing(self, request: Request, error: Exception | None) -> Response:  # noqa: ARG002
        return self._send(_told("There is no such page", "The pages are named above."), 404)

    def _send(self, page: Page, status: int = 200, request: Request | None = None) -> HTMLResponse:
        # What the script that asks has already need not be sent again.
        has = set(request.headers.get(HAS, "").split(",")) if request is not None else set()
        return HTMLResponse(whole(page, self._nav(page), has), status)

    def _nav(self, page: Page) -> list[tuple[str, str]]:
        """Pages with something to show."""
        found = [] if self.site.is_run else [("Runs", "/")]
        key = next(iter(self.site.runs())) if self.site.is_run else page.key
        if key is None and (len(self.site.runs()) > 1 or self.site.specs):
            found.append(("Compare", url(None, "compare")))
        if key is not None:
            found.append(("Front", url(key)))
            found += [(name, url(key, name.lower())) for name in ("Compare", "Placement", "Latency", "Tools")]
        return [*found, ("Kernels", "/kernels")] if self.site.bench is not None else found


def _told(title: str, text: str) -> Page:
    page = Page(title, follows=False)
    page.add(element("header", element("h1", title)), empty(text))
    return page


def serve(site: Site, *, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Serve a site until Ctrl-C; `ready` gets the address to open.

    Raises:
        HeddleError: "bad-argument" where nobody can listen there.
    """
    token = None if is_local(host) else new_token()
    held = _listen(host, port)
    closing: list[uvicorn.Server] = []
    pages_of = app(site, token=token, is_closing=lambda: any(one.should_exit for one in closing))
    config = uvicorn.Config(
        pages_of,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=2,
        ws="none",
        lifespan="off",
        proxy_headers=False,
    )
    closing.append(uvicorn.Server(config))
    shown = f"[{host}]" if ":" in host else host
    ready(f"http://{shown}:{held.getsockname()[1]}/" + (f"?token={token}" if token else ""))
    with suppress(KeyboardInterrupt):
        closing[0].run(sockets=[held])


def _listen(host: str, port: int) -> socket.socket:
    """A socket at the address. Raises HeddleError "bad-argument"."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server((address[0], port), family=family)
    except OSError as error:
        hint = "--port 0 takes any free port"
        raise HeddleError(
            "bad-argument", f"{host}:{port} cannot be listened on: {error}", hint=hint
        ) from None
