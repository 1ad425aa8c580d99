"""Spec files that are named at the command line: compared with trials and with each other, and nothing else is opened."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

from seen import client, get
from starlette.testclient import TestClient
from typer.testing import CliRunner

from heddle.cli import app
from heddle.dashboards import server
from heddle.dashboards.site import open_site

MakeRun = Callable[..., Path]
ROOT = Path(__file__).parents[2]
SLIDING = ROOT / "examples/specs/sliding.yaml"
HYBRID = ROOT / "examples/specs/hybrid.yaml"
HOSTILE = "<img src=x onerror=alert(1)>&\"'.yaml"


def test_a_spec_stands_beside_a_trial_of_a_run(make_run: MakeRun) -> None:
    asked = client(make_run(), specs=[SLIDING, HYBRID])
    seen = get(asked, "/run/run/compare?t=4&s=sliding.yaml")
    assert "sliding.yaml against trial 4" in seen.text
    assert "hidden_size" in seen.text
    compared = seen.figures[0]
    assert [line["name"] for line in compared["data"]] == ["trial 4", "sliding.yaml"]  # type: ignore[attr-defined]
    # No run has measured the spec: what both have is counted.
    assert compared["data"][0]["x"] == [  # type: ignore[index]
        "parameters",
        "prefill FLOPs per token",
        "decode FLOPs per token",
        "cache bytes",
        "state bytes",
    ]
    # The box of what is chosen is ticked, that of the other spec is not, and the trial is kept.
    assert ("value", "hybrid.yaml") in seen.attributes
    assert seen.attributes.count(("checked", "")) == 1
    assert seen.attributes[seen.attributes.index(("value", "4")) - 1] == ("name", "t")


def test_specs_alone_are_compared_and_each_has_a_page(tmp_path: Path) -> None:
    asked = client(tmp_path, specs=[SLIDING, HYBRID])
    assert "Spec files" in get(asked, "/compare").text
    seen = get(asked, "/compare?s=sliding.yaml&s=hybrid.yaml")
    assert "hybrid.yaml against sliding.yaml" in seen.text
    assert "Layers" in seen.text
    page = get(asked, "/spec/sliding.yaml")
    assert SLIDING.read_text().splitlines()[-1] in page.text
    assert "Parameters of each layer at context" in page.text
    assert asked.get("/spec/sliding.yaml/graph.svg").headers["content-type"] == "image/svg+xml"


def test_trials_of_several_runs_and_a_spec_keep_each_other(two_runs: Path) -> None:
    seen = get(client(two_runs, specs=[SLIDING]), "/compare?t=one:3&t=two:4&s=sliding.yaml")
    assert "sliding.yaml against one: trial 3" in seen.text
    assert seen.attributes.count(("checked", "")) == 3
    hidden = {value for name, value in seen.attributes if name == "value"}
    assert {"one:3", "two:4", "sliding.yaml"} <= hidden


def test_no_other_file_is_opened(make_run: MakeRun, tmp_path: Path) -> None:
    (tmp_path / "secret.yaml").write_text("the secret: [")
    spec = tmp_path / "asks.yaml"
    text = SLIDING.read_text().replace("window: 128", "window: {choice: [64, 128]}", 1)
    assert "choice" in text
    budget = "{decode_ms: {at_most: 0.5, relative_to: secret.yaml, context: 64}}"
    spec.write_text(f"{text}search:\n  trials: 2\n  tasks: [{{text: {{}}}}]\n  budgets: [{budget}]\n")
    asked = client(make_run(), specs=[spec])
    page = get(asked, "/spec/asks.yaml").text
    assert "open values at their defaults" in page
    assert "the secret" not in page
    for path in (
        "/spec/secret.yaml",
        "/spec/..%2Fsecret.yaml",
        f"/spec/{quote(str(spec), safe='')}",
        "/spec/%2e%2e",
    ):
        answer = asked.get(path)
        assert answer.status_code == 404, path
        assert "the secret" not in answer.text
    get(asked, "/run/run/compare?t=4&s=secret.yaml", 404)


def test_a_spec_that_is_changed_is_read_anew_and_one_that_breaks_is_told(
    make_run: MakeRun, tmp_path: Path
) -> None:
    spec = tmp_path / "mine.yaml"
    spec.write_text(SLIDING.read_text())
    site = open_site(make_run(), None, [spec])
    views = server.Views(site, lambda: False)
    before = views._look(None)
    spec.write_text(SLIDING.read_text().replace("name: sliding", "name: another"))
    os.utime(spec, ns=(1, 1))
    assert views._look(None) != before
    assert "name: another" in site.specs["mine.yaml"].read().trial.spec
    spec.write_text("model: [")
    asked = TestClient(server.app(site, token=None), base_url="http://localhost")
    assert "mine.yaml cannot be read" in get(asked, "/run/run/compare?t=4&t=3&s=mine.yaml").text
    assert "It cannot be read" in get(asked, "/spec/mine.yaml").text


def test_names_and_texts_of_specs_are_text(make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run()
    tame, hostile = tmp_path / "tame.yaml", tmp_path / HOSTILE
    tame.write_text(SLIDING.read_text())
    hostile.write_text(f"# {HOSTILE}\n{SLIDING.read_text()}")
    asked = client(folder, specs=[tame, hostile])
    for path in ("/spec/{}", "/run/run/compare?t=4&s={}", "/compare?t=run:4&s={}"):
        plain, seen = (get(asked, path.format(quote(one))) for one in ("tame.yaml", HOSTILE))
        assert seen.tags == plain.tags
        assert HOSTILE in seen.text
        assert "<img" not in str(seen.figures)


def test_two_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.yaml").write_text(SLIDING.read_text())
    named = open_site(
        tmp_path, None, [tmp_path / "a/x.yaml", tmp_path / "b/x.yaml", tmp_path / "a/x.yaml"]
    ).specs
    assert list(named) == ["x.yaml", "x.yaml (2)"]


def test_the_command_refuses_what_is_no_spec(make_run: MakeRun, tmp_path: Path) -> None:
    told = CliRunner().invoke(app, ["dashboard", str(make_run()), "--spec", str(tmp_path / "none.yaml")])
    assert told.exit_code != 0
    assert "none.yaml" in str(told.exception) + told.output
