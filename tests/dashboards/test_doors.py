"""The doors to optuna-dashboard, TensorBoard and Ray: what they show of a real search, and what keeps them shut."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import optuna
import pytest
from seen import Seen, client, get

from heddle import api
from heddle.dashboards import doors, guard
from heddle.dashboards.site import Watched
from heddle.search.record import read_run
from heddle.search.study import Study
from heddle.search.study_copy import copy_study, memory

pytestmark = pytest.mark.slow
STUDIES = "/api/studies"


def _stamps(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_optuna_dashboard_shows_the_study_and_changes_nothing(search_run: Path) -> None:
    before = _stamps(search_run)
    asked = client(search_run)
    assert "not opened" in asked.get(STUDIES).text
    landed = asked.get("/run/run/open/study")
    assert landed.url.path.startswith("/dashboard/studies/")
    assert "Optuna Dashboard" in landed.text
    # Its own rules for scripts stand, and none from elsewhere runs.
    assert "default-src 'self'" in landed.headers["content-security-policy"]
    assert asked.get("/static/bundle.js").status_code == 200
    number = landed.url.path.rpartition("/")[2]
    told = asked.get(f"{STUDIES}/{number}?after=0").json()
    run = read_run(search_run)
    assert [trial["number"] for trial in told["trials"]] == [trial.number for trial in run.trials]
    shown = [trial["constraints"] for trial in told["trials"]]
    assert shown == [list(trial.constraints.values()) for trial in run.trials]
    assert told["objective_names"] == [task.name for task in run.tasks] or told["metric_names"]
    assert asked.delete(f"{STUDIES}/{number}").status_code == 405
    assert asked.post(STUDIES, json={"study_name": "x", "directions": ["minimize"]}).status_code == 405
    # Opened again it is the one study, as it then stands.
    asked.get("/run/run/open/study")
    assert len(asked.get(STUDIES).json()["study_summaries"]) == 1
    assert _stamps(search_run) == before


def test_a_trial_over_budget_is_infeasible_in_the_copy(tmp_path: Path) -> None:
    from heddle.search.study import open_storage

    study = Study(open_storage(tmp_path), "s", ["maximize"], sampler="tpe", seed=0, startup=1)
    for over in (0.5, -0.5):
        number = study.ask()
        study.suggest(number, "x", lambda trial: trial.suggest_float("x", 0.0, 1.0))
        limits = {"b": over, "a": -1.0}
        study.tell_complete(number, [1.0], limits) if over < 0 else study.tell_infeasible(
            number, limits, [0.0]
        )
    journal = tmp_path / "study.journal"
    with open(journal, "ab") as file:
        file.write(b'{"op_code": 4, "torn')
    into = memory()
    copy_study(journal, into, "copy", ["quality"])
    held = optuna.load_study(study_name="copy", storage=into)
    assert [trial.system_attrs["constraints"] for trial in held.trials] == [[-1.0, 0.5], [-1.0, -0.5]]
    assert [trial.number for trial in held.best_trials] == [1]
    assert journal.read_bytes().endswith(b"torn")


# What tensorboard brings along of bleach says so at its import.
@pytest.mark.filterwarnings("ignore:html5lib's sanitizer is deprecated:DeprecationWarning")
def test_tensorboard_draws_the_curves_of_the_search(search_run: Path) -> None:
    asked = client(search_run)
    assert "not opened" in asked.get("/tensorboard/data/runs").text
    landed = asked.get("/run/run/open/curves")
    assert landed.url.path == "/tensorboard/"
    assert "<title>TensorBoard</title>" in landed.text
    run = read_run(search_run)
    trained = [trial for trial in run.trials if trial.scores]
    names = {f"run/trial-{trial.number:04d}" for trial in trained}
    assert names <= set(asked.get("/tensorboard/data/runs").json())
    trial, task = trained[0], run.tasks[0].name
    query = f"run=run/trial-{trial.number:04d}&tag=loss/{task}"
    rows = asked.get(f"/tensorboard/data/plugin/scalars/scalars?{query}").json()
    assert [(row[1], pytest.approx(row[2])) for row in rows] == list(trial.scores[task].losses)
    # Nothing that reads a file which a request names is loaded.
    assert set(asked.get("/tensorboard/data/plugins_listing").json()) == {"scalars", "timeseries", "hparams"}


def test_curves_are_written_as_event_files(search_run: Path, tmp_path: Path) -> None:
    written = api.event_files(search_run, tmp_path)
    run = read_run(search_run)
    assert [path.parent.name for path in written if path.parent.name != "reference"] == [
        f"trial-{trial.number:04d}" for trial in run.trials if trial.scores
    ]
    again = api.event_files(search_run, tmp_path / "again")
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in written]


def test_the_page_says_what_to_open_and_what_to_install(
    search_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = get(client(search_run), "/run/run/tools")
    links = [value for name, value in page.attributes if name == "href"]
    assert {"/run/run/open/study", "/run/run/open/curves"} <= set(links)
    # As on a machine that lacks both.
    monkeypatch.setattr(doors, "installed", lambda _: False)
    page = get(client(search_run), "/run/run/tools")
    assert "pip install 'heddle-lm[optuna-dashboard]'" in page.text
    assert "pip install 'heddle-lm[tensorboard]'" in page.text
    assert "is not installed" in get(client(search_run), "/run/run/open/study", 404).text
    assert "need tensorboard" in get(client(search_run), "/run/run/open/curves", 404).text
    assert "There is no such page" in get(client(search_run), "/run/run/open/else", 404).text


def test_doors_ask_for_the_token_and_hide_it(search_run: Path) -> None:
    token = guard.new_token()
    asked = client(search_run, token=token)
    for path in (
        "/run/run/open/study",
        STUDIES,
        "/dashboard",
        "/static/bundle.js",
        "/csv/0",
        "/tensorboard/",
    ):
        assert asked.get(path).status_code == 403, path


def test_a_journal_that_leads_out_of_the_run_is_not_read(search_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("run.json", "events.jsonl"):
        (folder / name).write_bytes((search_run / name).read_bytes())
    (folder / "study.journal").symlink_to(search_run / "study.journal")
    assert "holds no study.journal" in get(client(folder), "/run/run/tools").text
    assert "holds no journal" in get(client(folder), "/run/run/open/study", 404).text


class _Ray(BaseHTTPRequestHandler):
    """The one answer of Ray's dashboard that is asked for."""

    def do_GET(self) -> None:
        body = json.dumps(
            {"version": "4", "ray_version": "2.60.0"} if self.path == "/api/version" else {}
        ).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def ray_address() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Ray) as held:
        threading.Thread(target=held.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{held.server_address[1]}"
        held.shutdown()


def test_ray_is_linked_where_its_dashboard_answers(search_run: Path, ray_address: str) -> None:
    found = Seen("".join(doors.tools_page(Watched("run", search_run), ray_address).sections))
    assert ("href", ray_address) in found.attributes
    assert "Open Ray 2.60.0" in found.text
    for nobody in ("http://127.0.0.1:9", f"{ray_address}/elsewhere"):
        found = Seen("".join(doors.tools_page(Watched("run", search_run), nobody).sections))
        assert "No dashboard of Ray answers" in found.text
