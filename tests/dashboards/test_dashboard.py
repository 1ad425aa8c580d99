"""The dashboard over HTTP: every page, what is live, what is refused, and names as text."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from seen import client, get
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from heddle.dashboards import bench_figures, guard, pages, server, site
from heddle.dashboards.site import Site, Watched, open_site
from heddle.errors import HeddleError
from heddle.search import record
from heddle.search.durable import read_lines
from heddle.search.follow import Follower
from heddle.search.record import read_run

MakeRun = Callable[..., Path]
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&\"'`{{7*7}}"
ROOT = Path(__file__).parents[2]
PAGES = ("", "/trial/4", "/trial/-1", "/trial/12", "/compare?t=3&t=4", "/placement", "/latency")


def test_every_page_of_a_run_answers_with_its_figures(make_run: MakeRun) -> None:
    asked = client(make_run())
    seen = {page: get(asked, f"/run/run{page}") for page in PAGES}
    assert "Trial 4 wins with" in seen[""].text
    names = [figure["name"] for figure in seen[""].figures]
    assert names == ["task-mqar-against-budget-decode-ms-1x4096", "best-so-far-by-trial"]
    drawn = [figure["name"] for figure in seen["/trial/4"].figures]
    assert {"latency-decode-ms-1x4096", "curve-mqar", "curve-text"} <= set(drawn)
    for what in ("Parameters", "Cache, which grows with the context,", "State, which does not grow,"):
        assert f"{what} of each layer at context 4096, batch 1" in seen["/trial/4"].text
    assert "loss-not-finite: the loss is nan" in seen["/trial/12"].text
    assert "heddle export" in seen["/trial/4"].text
    assert "trial 4 against trial 3" in seen["/compare?t=3&t=4"].text
    placed = [figure["name"] for figure in seen["/placement"].figures]
    assert placed == ["placement-best", "placement-all", "terms-layers", "terms-pairs"]
    assert "The front, timed again" in seen["/latency"].text
    for page in seen.values():
        assert all(f'"plot-{index}"' for index in range(len(page.figures)))
        assert not [value for name, value in page.attributes if name in ("src", "href") and "//" in value]


def test_the_numbers_of_the_placement_are_shares_of_trials(make_run: MakeRun) -> None:
    folder = make_run()
    heat = get(client(folder), "/run/run/placement").figures[1]["data"][0]  # type: ignore[index]
    trials = read_run(folder).trials
    full = [sum(trial.layers[layer] == "full" for trial in trials) / len(trials) for layer in range(8)]
    assert heat["z"][heat["y"].index("attention")] == pytest.approx(full)


@pytest.mark.parametrize("over", ["trial", "time", "device"])
def test_the_front_is_drawn_over_what_was_chosen(make_run: MakeRun, over: str) -> None:
    query = f"?x=task:mqar&y=task:text&over={over}"
    figures = get(client(make_run()), f"/run/run{query}").figures
    assert figures[0]["name"] == "task-text-against-task-mqar"
    assert figures[1]["name"] == f"best-so-far-by-{over}"


def test_a_point_knows_its_trial_and_its_interval(make_run: MakeRun) -> None:
    traces = {trace["name"]: trace for trace in get(client(make_run()), "/run/run").figures[0]["data"]}  # type: ignore[attr-defined]
    assert traces["winner"]["customdata"] == [4]
    assert traces["winner"]["error_x"]["array"] == [pytest.approx(0.8 * 0.01)]
    assert traces["winner"]["error_y"]["array"] == [pytest.approx(1.96 * 0.01)]
    assert sorted(traces["timed again"]["customdata"]) == [2, 3, 4]


def test_trials_are_filtered_ordered_and_paged(make_run: MakeRun) -> None:
    asked = client(make_run())
    failed = get(asked, "/run/run?state=failed").text
    assert "1 trials, page 1 of 1" in failed
    best_first = asked.get("/run/run?sort=quality").text
    assert best_first.index("Compare trial 11") < best_first.index("Compare trial 0")
    assert "page 1 of 1" in get(asked, "/run/run?page=99999999999999999999&sort=nonsense").text


def test_hostile_names_are_shown_as_text(make_run: MakeRun, tmp_path: Path) -> None:
    asked = client(make_run(name="tame"))
    tame = {page: get(asked, f"/run/run{page}") for page in PAGES}
    (tmp_path / "run").rename(tmp_path / "tame")
    asked = client(make_run(name=HOSTILE))
    for page in PAGES:
        seen = get(asked, f"/run/run{page}")
        assert seen.tags == tame[page].tags
        assert not [name for name, _ in seen.attributes if name.startswith("on")]
        assert "<script" not in json.dumps(seen.figures)
    for path in (f"/run/{quote(HOSTILE, safe='')}", f"/run/run/trial/{quote(HOSTILE, safe='')}"):
        assert "script" not in set(get(asked, path, 404).tags) - {"script"}
        assert HOSTILE not in asked.get(path).text
    query = "&".join(f"{name}={quote(HOSTILE)}" for name in ("x", "y", "over", "state", "sort", "page"))
    assert HOSTILE not in asked.get(f"/run/run?{query}").text


def test_a_hostile_folder_name_is_one_step_of_an_address(make_run: MakeRun, tmp_path: Path) -> None:
    name = 'a b"<img src=x>?#..;&'
    (tmp_path / "runs").mkdir()
    make_run().rename(tmp_path / "runs" / name)
    make_run()
    (tmp_path / "run").rename(tmp_path / "runs" / "other")
    asked = client(tmp_path / "runs")
    seen = get(asked, "/")
    link = next(value for key, value in seen.attributes if key == "href" and "img" in value)
    assert "img" not in seen.tags
    assert "Trial 4 wins" in get(asked, link).text


@pytest.mark.parametrize(
    "path",
    [
        "/run/run/trial/../../../../secret.log",
        "/run/..%2F..%2Fsecret/",
        "/run/%2e%2e/trial/0",
        "/assets/..%2Fserver.py",
        "/assets/%2e%2e%2f%2e%2e%2fsecret.log",
        "/assets//etc/passwd",
        "/run/run/graph/..%2F..%2Fsecret.log.svg",
        "/run/run/trial/0%00",
        "/run/run/compare?t=..%2Fsecret.log",
    ],
)
def test_nothing_outside_of_the_run_is_served(make_run: MakeRun, tmp_path: Path, path: str) -> None:
    folder = make_run()
    (tmp_path / "secret.log").write_text("the secret")
    answer = client(folder).get(path)
    assert answer.status_code == 404
    assert "the secret" not in answer.text


def test_links_and_records_lead_nowhere_outside(make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run()
    logs = folder / "logs"
    logs.mkdir()
    (tmp_path / "secret.log").write_text("the secret")
    (logs / "0004-mqar-k0.log").write_text("what the training printed <b>")
    (logs / "0004-text-k0.log").symlink_to(tmp_path / "secret.log")
    entry = {"result": read_lines(folder / "events.jsonl")[0] | {"task": "the secret"}}
    (tmp_path / "mqar").mkdir()
    (tmp_path / "mqar" / "k0.json").write_text(json.dumps(entry))
    with open(folder / "events.jsonl", "a") as file:
        asked = read_lines(folder / "events.jsonl")[1] | {"number": 13, "hash": "../.."}
        told = {"state": "complete", "scores": {"mqar": "k0"}, "latency": {}, "constraints": {}}
        for event in (asked, asked | told | {"event": "trial_finished"}):
            file.write(json.dumps(event) + "\n")
    site = client(folder)
    page = get(site, "/run/run/trial/4").text
    assert "what the training printed <b>" in page
    assert "the secret" not in page
    assert "the secret" not in get(site, "/run/run/trial/13").text
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "link").symlink_to(folder, target_is_directory=True)
    assert not Site(tmp_path / "runs").runs()


@pytest.mark.parametrize("name", ["run.json", "events.jsonl", "confirm.json", "ledger"])
def test_a_record_that_is_a_link_to_elsewhere_is_not_read(
    make_run: MakeRun, tmp_path: Path, name: str
) -> None:
    folder = make_run()
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    assert "is a link that leads out of it" in get(client(folder), "/run/run", 404).text


def test_a_number_that_is_none_breaks_one_page_and_not_the_server(make_run: MakeRun) -> None:
    folder = make_run()
    for entry in (folder / "ledger").glob("*/mqar/*.json"):
        entry.write_text(entry.read_text().replace('"value": 0.9,', '"value": NaN,'))
    site = server.app(open_site(folder), token=None)
    asked = TestClient(site, base_url="http://localhost", raise_server_exceptions=False)
    assert "That cannot be shown" in get(asked, "/run/run", 500).text
    assert get(asked, "/run/run/placement").figures


def test_without_a_token_only_local_names_are_answered(make_run: MakeRun) -> None:
    site = server.app(open_site(make_run()), token=None)
    for host in ("localhost:8642", "127.0.0.1:8642", "127.0.0.2:8642", "[::1]:8642", "localhost"):
        assert TestClient(site, base_url=f"http://{host}").get("/run/run").status_code == 200
    for host in (
        "evil.example:8642",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "10.0.0.1:8642",
        "",
    ):
        assert TestClient(site, base_url=f"http://{host}").get("/run/run").status_code == 403


def test_every_route_asks_for_the_token(make_run: MakeRun, tmp_path: Path) -> None:
    token = guard.new_token()
    asked = client(make_run(), tmp_path, token)
    # As they are written: whoever lacks the token is refused before a name is looked at.
    routes = [route.path or "/" for route in asked.app.inner.routes]  # type: ignore[attr-defined]
    assert {"/", "/events", "/run/{key}", "/api", "/tensorboard"} <= set(routes)
    routes += ["/assets/app.js", *(f"/run/run{page}" for page in PAGES), "/nothing"]
    for wrong in ({}, {"cookie": f"{guard.TOKEN}=guess"}, {"authorization": "Bearer guess"}):
        for route in routes:
            assert asked.get(route, headers=wrong).status_code == 403, route
    assert asked.get("/run/run?token=guess").status_code == 403
    # No socket is opened, with a token neither.
    with pytest.raises(WebSocketDisconnect), asked.websocket_connect(f"/events?token={token}"):
        pass
    assert asked.get("/run/run", headers={"authorization": f"Bearer {token}"}).status_code == 200
    admitted = asked.get(f"http://localhost:8642//run/run?x=parameters&token={token}", follow_redirects=False)
    assert admitted.headers["location"] == "/run/run?x=parameters"
    assert {"HttpOnly", "SameSite=lax"} <= set(admitted.headers["set-cookie"].split("; "))
    assert asked.get("/run/run").status_code == 200


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "::1"])
def test_these_addresses_are_local(host: str) -> None:
    assert guard.is_local(host)
    assert not any(map(guard.is_local, ("0.0.0.0", "::", "192.168.0.4", "example.org")))


def test_answers_forbid_foreign_scripts_and_frames(make_run: MakeRun) -> None:
    asked = client(make_run())
    for path in ("/run/run", "/assets/plotly.js", "/nothing", "/run/run/graph/4.svg"):
        headers = asked.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe-eval" not in policy
        assert re.search(r"script-src ([^;]*)", policy)[1] == "'self'"  # type: ignore[index]
        assert headers["x-content-type-options"] == "nosniff"


def test_several_runs_stand_side_by_side_and_new_ones_appear(make_run: MakeRun, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    asked = client(runs)
    assert "There is no run in" in get(asked, "/").text
    for name in ("one", "two"):
        make_run(name=f"search {name}").rename(runs / name)
    broken = runs / "broken"
    broken.mkdir()
    (broken / "run.json").write_text("{")
    seen = get(asked, "/")
    assert "search one" in seen.text
    assert "search two" in seen.text
    assert "is damaged" in seen.text
    assert [trace["name"] for trace in seen.figures[0]["data"]] == ["one", "two"]  # type: ignore[attr-defined]
    assert "is damaged" in get(asked, "/run/broken", 404).text


def test_a_damaged_record_is_told_and_not_a_crash(make_run: MakeRun) -> None:
    folder = make_run()
    with open(folder / "events.jsonl", "a") as file:
        file.write("{broken\n")
    assert "cannot be read" in get(client(folder), "/run/run", 404).text


def test_a_run_without_a_trial_says_what_happens_next(make_run: MakeRun) -> None:
    folder = make_run()
    (folder / "events.jsonl").write_text("")
    (folder / "confirm.json").unlink()
    asked = client(folder)
    assert "No trial was begun yet" in get(asked, "/run/run").text
    assert "No trial was trained yet" in get(asked, "/run/run/placement").text
    assert "Two to 6 trials can be compared" in get(asked, "/run/run/compare").text


def test_benchmark_rows_are_shown_beside_peers_the_floor_and_other_devices(make_run: MakeRun) -> None:
    asked = client(make_run(), ROOT / "tests/bench/results")
    seen = get(asked, "/kernels?device=NVIDIA+H100+80GB+HBM3&op=decay_attention")
    assert "fla" in seen.text
    assert "× heddle, same run" in seen.text
    phases = ("fwd", "fwdbwd", "decode", "decode_graph")
    kinds = ("beside", "kernels", "devices")
    figures: dict[str, Any] = {str(figure["name"]): figure for figure in seen.figures}
    # Our steps in a graph were timed on one device alone.
    assert list(figures) == [f"{kind}-{phase}" for kind in kinds for phase in phases][:-1]
    for kind in ("beside", "kernels"):
        assert {"heddle", "fla", "floor"} <= {trace["name"] for trace in figures[f"{kind}-fwd"]["data"]}
    names = [trace["name"] for trace in figures["devices-fwd"]["data"]]
    devices = ("NVIDIA H100 80GB HBM3", "NVIDIA H200")
    assert sorted(names) == [name + rest for name in devices for rest in ("", ": floor")]
    without = client(Path(__file__).parent)
    assert "There is no such page" in get(without, "/kernels", 404).text


def test_an_older_row_of_the_same_case_and_launches_that_were_tried_are_in_no_plot(make_run: MakeRun) -> None:
    asked = client(make_run(), ROOT / "tests/bench/results")
    seen = get(asked, "/kernels?device=NVIDIA+H200&op=local_linear_attention")
    (beside,) = (figure for figure in seen.figures if figure["name"] == "beside-fwd")
    traces: Any = beside["data"]  # type: ignore[index]
    assert not [trace["name"] for trace in traces if "Launch" in trace["name"]]
    (slope,) = (trace for trace in traces if trace["name"] == "heddle, slope")
    assert len(slope["y"]) == 2
    assert "torch.bfloat16" not in seen.text


def test_the_floor_is_the_time_of_the_bytes_or_operations_at_the_ceiling_of_the_device() -> None:
    shared = {"device": "d", "commit": "c", "shape": {"T": 1}, "dtype": "float32"}
    ceilings = [
        {"op": "copy", "phase": "ceiling", "gbps": 4000.0},
        {"op": "matmul", "phase": "ceiling", "tflops": 800.0},
    ]
    ours = {"op": "gla", "impl": "heddle", "phase": "fwd", "ms": 2.0, "gbps": 1000.0, "tflops": 600.0}
    tops = bench_figures.ceiling(shared | row for row in ceilings)
    (floor,) = bench_figures.floors([shared | ours, shared | ours | {"impl": "fla"}], tops)
    assert (floor["impl"], floor["ms"]) == ("floor", 1.5)


def test_following_reads_only_what_is_new_and_gives_what_reading_anew_gives(make_run: MakeRun) -> None:
    folder = make_run()
    whole = (folder / "events.jsonl").read_bytes()
    follower = Follower(folder)
    for end in range(0, len(whole) + 1, 997):
        # Cut anywhere, as a reader finds a file that is being written.
        (folder / "events.jsonl").write_bytes(whole[:end])
        assert follower.read() == read_run(folder)
    (folder / "events.jsonl").write_bytes(whole)
    assert follower.read() == read_run(folder)
    assert follower.read() is follower.read()
    (folder / "events.jsonl").write_bytes(whole[: len(whole) // 3])
    assert follower.read() == read_run(folder)


def test_a_large_run_is_read_in_parts(make_run: MakeRun) -> None:
    folder = make_run()
    follower = Follower(folder)
    parts = [len(follower.read(0.0).events)]
    while follower.share_read < 1:
        parts.append(len(follower.read(0.0).events))
    assert parts == list(range(1, len(read_lines(folder / "events.jsonl")) + 1))


def _repeated(folder: Path, times: int) -> int:
    """The made-up run told again and again, so that its trials are many; gives the lines of its record."""
    whole = (folder / "events.jsonl").read_bytes()
    (folder / "events.jsonl").write_bytes(whole * times)
    return whole.count(b"\n") * times


class _Opened:
    """`open`, counting the entries of the ledger that are read."""

    def __init__(self) -> None:
        self.entries = 0

    def __call__(self, path: object, *given: Any, **named: Any) -> Any:
        self.entries += str(path).endswith(".json")
        return open(path, *given, **named)


def test_the_first_view_of_a_large_run_reads_little_and_no_page_reads_twice(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Time alone shall not cut the reading short here.
    monkeypatch.setattr(site, "PATIENCE_S", 1e9)
    monkeypatch.setattr(Watched.run, "__defaults__", (1e9,))
    monkeypatch.setattr(site, "RECENT_S", 1e9)
    opened = _Opened()
    monkeypatch.setattr(record, "open", opened, raising=False)
    folder = make_run()
    lines = _repeated(folder, 100)
    views = server.Views(open_site(folder), lambda: False)
    watched = views.site.watched("run")
    page = views._follow(watched, lambda: pages.front(watched, {}))
    assert b"The record is being read" in page.body
    first = len(watched.run().events)
    assert first == site.PATIENCE_LINES < lines
    # A trial is put together at its start and at its end, and has up to four entries.
    assert 0 < opened.entries <= 4 * first
    entries = opened.entries
    views._follow(watched, lambda: pages.placement_page(watched))
    assert (opened.entries, len(watched.run().events)) == (entries, first)
    while watched.follower.share_read < 1:
        watched.read_on()
    entries = opened.entries
    assert b"The record is being read" not in views._follow(watched, lambda: pages.front(watched, {})).body
    assert opened.entries == entries
    assert len(watched.run().events) == lines


def test_what_a_page_has_is_not_sent_again(make_run: MakeRun) -> None:
    asked = client(make_run())
    whole = asked.get("/run/run").text
    digests = re.findall(r'data-live="([0-9a-f]{8})"', whole)
    figures = json.loads(re.search(r'id="figures">(.*?)</script>', whole)[1])  # type: ignore[index]
    held = ",".join([*digests, *(figure["digest"] for figure in figures)])
    again = asked.get("/run/run", headers={server.HAS: held}).text
    assert re.findall(r'data-live="([0-9a-f]{8})" data-same=""></div>', again) == digests
    assert len(again) < len(whole) / 5
    # Other axes: one figure and the choice above it, and not the table of trials below.
    other = asked.get("/run/run?x=parameters", headers={server.HAS: held}).text
    sent = json.loads(re.search(r'id="figures">(.*?)</script>', other)[1])  # type: ignore[index]
    assert ["data" in figure for figure in sent] == [True, False]
    assert 'action="/run/run/compare"' in whole
    assert 'action="/run/run/compare"' not in other


def test_a_trial_that_was_not_read_yet_is_waited_for(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(site, "PATIENCE_LINES", 5)
    asked = client(make_run())
    early = asked.get("/run/run/trial/12")
    assert early.status_code == 200
    assert "was not met yet" in early.text
    assert "data-events" in early.text
    monkeypatch.setattr(site, "PATIENCE_LINES", 10_000)
    monkeypatch.setattr(site, "RECENT_S", 0.0)
    assert "loss-not-finite" in asked.get("/run/run/trial/12").text
    assert asked.get("/run/run/trial/99").status_code == 404


@pytest.fixture
def served(make_run: MakeRun) -> Iterator[tuple[Path, str]]:
    """A run and the address of a real server, in a process as a user starts it."""
    folder = make_run()
    command = [sys.executable, "-m", "heddle", "dashboard", str(folder), "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield folder, process.stdout.readline().strip()
        process.terminate()


def test_the_command_serves_and_tells_of_what_is_new(served: tuple[Path, str]) -> None:
    folder, address = served
    assert re.fullmatch(r"http://localhost:\d+/", address)
    with urllib.request.urlopen(address, timeout=20) as page:
        assert b"Trial 4 wins" in page.read()
    with urllib.request.urlopen(f"{address}events?run=run", timeout=20) as events:
        assert events.readline() == b"retry: 1000\n"
        add = {"event": "message", "level": "warning", "text": "new <b>", "session": "b", "clock_s": 1.0}
        line = json.dumps(add | {"time": "2026-11-24T03:00:00+00:00"}) + "\n"
        with open(folder / "events.jsonl", "a") as file:
            file.write(line)
        assert events.readline() == b"\n"
        assert events.readline() == b"data: changed\n"
    with urllib.request.urlopen(f"{address}run/run", timeout=20) as page:
        assert b"new &lt;b&gt;" in page.read()


def test_no_page_needs_torch(make_run: MakeRun) -> None:
    # The placement model is one of numpy.
    light = [page for page in PAGES if page != "/placement"]
    code = (
        "import sys; from pathlib import Path; from starlette.testclient import TestClient\n"
        "from heddle.dashboards import server; from heddle.dashboards.site import open_site\n"
        f"asked = TestClient(server.app(open_site(Path({str(make_run())!r})), token=None), base_url='http://localhost')\n"
        f"assert all(asked.get('/run/run' + page).status_code == 200 for page in {light!r})\n"
        "print(*(name for name in ('torch', 'ray', 'transformers', 'optuna', 'numpy') if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout.split(), done.returncode) == ([], 0), done.stderr


def test_what_cannot_be_served_is_told(tmp_path: Path) -> None:
    with pytest.raises(HeddleError, match="is not a folder"):
        open_site(tmp_path / "none")
    with pytest.raises(HeddleError, match="benchmark rows"):
        open_site(tmp_path, tmp_path / "none")
    with pytest.raises(HeddleError, match="cannot be listened on"):
        server.serve(open_site(tmp_path), host="192.0.2.1", port=0, ready=print)
