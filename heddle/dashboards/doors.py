"""Doors to other programs: optuna-dashboard and TensorBoard at our own address, and a link to Ray's dashboard.

Both run inside of our server, behind its token, on copies: a study in memory, event files in a temporary folder.
"""

from __future__ import annotations

import importlib.util
import json
import threading
import urllib.request
import weakref
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any

from heddle.dashboards import data, sections
from heddle.dashboards.event_files import MISSING, write_events
from heddle.dashboards.frame import Page, empty, later, url
from heddle.dashboards.html import Html, element, join
from heddle.dashboards.site import Watched
from heddle.dashboards.wsgi import WsgiApp
from heddle.errors import HeddleError
from heddle.search.record import Run, Trial

BOARD = "/tensorboard"
# Where Ray's dashboard listens unless it was told otherwise, and how long it may take to say that it is there.
RAY, RAY_PATIENCE_S = "http://127.0.0.1:8265", 0.3
# A list of more curves is no help in TensorBoard.
CURVES = 200


def installed(package: str) -> bool:
    """Whether a package is there, without importing it."""
    return importlib.util.find_spec(package) is not None


class Doors:
    """What was opened. Each opening shows the run as it then stands."""

    def __init__(self) -> None:
        self.optuna: WsgiApp | None = None
        self.board: WsgiApp | None = None
        self._storage: Any = None
        self._folder: Path | None = None
        self._lock = threading.Lock()

    def open_study(self, watched: Watched) -> str:
        """Where optuna-dashboard shows the study of a run.

        Raises:
            HeddleError: "package-missing"; "run-not-found" where the folder holds no study.
        """
        if not installed("optuna_dashboard"):
            hint = "pip install 'heddle-lm[optuna-dashboard]'"
            raise HeddleError("package-missing", "optuna-dashboard is not installed", hint=hint)
        journal = watched.journal()
        if journal is None:
            raise HeddleError("run-not-found", f"{watched.folder} holds no journal of a study")
        from optuna_dashboard import wsgi

        from heddle.search.study_copy import copy_study, memory

        names = [task.name for task in watched.run().tasks]
        with self._lock:
            if self._storage is None:
                self._storage = memory()
            number = copy_study(journal, self._storage, watched.key, names)
            # Made anew, for it keeps trials of the study that was here before.
            self.optuna = wsgi(self._storage)
        return f"/dashboard/studies/{number}"

    def open_board(self, watched: Watched) -> str:
        """Where TensorBoard shows the curves of a run. Raises HeddleError "package-missing"."""
        if not installed("tensorboard"):
            raise MISSING
        run = watched.run()
        with self._lock:
            if self._folder is None:
                self._folder = Path(mkdtemp(prefix="heddle-curves-"))
                weakref.finalize(self, rmtree, self._folder, ignore_errors=True)
            write_events(run, self._folder / watched.key, curved(run))
            self.board = _board(self._folder)
        return f"{BOARD}/"


def curved(run: Run) -> list[Trial]:
    """The trials whose curves are shown: reference and front first, then those with the best scores."""
    held = [trial for trial in data.with_reference(run) if any(one.losses for one in trial.scores.values())]
    first = {*run.front, *([run.reference.number] if run.reference is not None else [])}
    held.sort(key=lambda trial: (trial.number not in first, -(trial.quality or 0.0)))
    return held[:CURVES]


def _board(folder: Path) -> WsgiApp:
    """TensorBoard with its pages of scalars alone, whose page of series asks for parameters too: others read files that a
    request names.
    """
    from tensorboard import assets, program
    from tensorboard.backend.application import TensorBoardWSGIApp
    from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.plugins.core.core_plugin import CorePluginLoader
    from tensorboard.plugins.hparams.hparams_plugin import HParamsPlugin
    from tensorboard.plugins.metrics.metrics_plugin import MetricsPlugin
    from tensorboard.plugins.scalar.scalars_plugin import ScalarsPlugin

    provider = assets.get_default_assets_zip_provider()
    board = program.TensorBoard([CorePluginLoader(), ScalarsPlugin, MetricsPlugin, HParamsPlugin], provider)
    board.configure(logdir=str(folder), path_prefix=BOARD)
    curves = EventMultiplexer()
    curves.AddRunsFromDirectory(str(folder))
    curves.Reload()
    held = MultiplexerDataProvider(curves, str(folder))
    app: WsgiApp = TensorBoardWSGIApp(board.flags, board.plugin_loaders, held, provider, curves)
    return app


def ray_version(address: str = RAY) -> str | None:
    """The version of the Ray whose dashboard answers at `address`; None where none does."""
    try:
        with urllib.request.urlopen(f"{address}/api/version", timeout=RAY_PATIENCE_S) as answer:
            told = json.loads(answer.read(10_000))
        return str(told["ray_version"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def tools_page(watched: Watched, ray: str = RAY) -> Page:
    """What else can look at a run, and what to install for it."""
    run = watched.run()
    page = Page(f"Tools · {run.name}", watched.key, "Tools")
    page.add(element("header", element("h1", "Tools"), sections.note(run.name)))
    page.add(_study(watched, run), _curves(watched, run), _ray(ray))
    return page


def _study(watched: Watched, run: Run) -> Html:
    title = "optuna-dashboard"
    told = sections.note("The Optuna study: importance of parameters, slices, hypervolume, feasibility.")
    if run.meta.get("storage") == "url":
        where = "This search keeps its study in a storage of its own: optuna-dashboard URL shows it."
        return sections.section(title, told, empty(where))
    if watched.journal() is None:
        return sections.section(
            title, told, empty("This folder holds no study.journal, which heddle search writes there.")
        )
    if not installed("optuna_dashboard"):
        return sections.section(title, told, _install("optuna-dashboard"))
    note = sections.note(
        "A copy as the study stands when the link is followed; nothing can be changed there."
    )
    return sections.section(title, told, _door("Open the study", watched, "study"), note)


def _curves(watched: Watched, run: Run) -> Html:
    told = sections.note("Training curves of many trials over one another.")
    held = curved(run)
    if not held:
        return sections.section(
            "TensorBoard", told, empty("No trial was trained yet.", later(run, watched.key))
        )
    if not installed("tensorboard"):
        return sections.section("TensorBoard", told, _install("tensorboard"))
    count = f"{len(held)} trials: reference, front and those with the best scores, at most {CURVES}."
    command = element("code", f"heddle report {run.path} --tensorboard DIR")
    note = element("p", count, " All of them as files: ", command, cls="note")
    return sections.section("TensorBoard", told, _door("Open the curves", watched, "curves"), note)


def _ray(address: str) -> Html:
    told = sections.note("Tasks, workers, processors and GPUs of a Ray cluster.")
    version = ray_version(address)
    if version is None:
        why = f"No dashboard of Ray answers at {address}."
        how = "Ray brings it with pip install 'ray[default]'; ray start --head starts it, and "
        joined = join([how, element("code", "heddle search SPEC --ray-address ADDRESS"), " joins it."])
        return sections.section("Ray", told, empty(why, joined))
    link = element("a", f"Open Ray {version}", href=address, rel="noreferrer")
    return sections.section("Ray", told, element("p", link))


def _install(extra: str) -> Html:
    return empty("Not installed.", element("code", f"pip install 'heddle-lm[{extra}]'"))


def _door(text: str, watched: Watched, name: str) -> Html:
    return element("p", element("a", text, href=url(watched.key, "open", name)))
