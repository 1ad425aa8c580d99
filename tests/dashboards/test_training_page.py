"""The page of a training: of a real one, of one in a folder, and of what is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from seen import client, get

from heddle import specs
from heddle.search.training import TrainRun, train

pytestmark = pytest.mark.slow


@pytest.fixture
def trained(search_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainRun:
    """A training of the spec that the test run's search began with, on its corpus."""
    monkeypatch.chdir(search_run.parent)
    (tmp_path / "runs").mkdir()
    return train(specs.load("spec.yaml"), tmp_path / "runs/once", device="cpu")


def test_a_training_shows_its_score_its_layers_and_its_curve(trained: TrainRun) -> None:
    site = client(trained.path)
    page = get(site, "/")
    assert f"{trained.score.value:.4f} ±" in page.text
    assert "heddle export" in page.text
    figures = {figure["name"]: figure for figure in page.figures}
    assert "State, which does not grow, of each layer" in page.text
    curve = figures["curve-loss"]["data"][0]  # type: ignore[index]
    assert curve["y"] == list(trained.losses)
    # Beside searches it stands in a table of its own; its records are read, and nothing beside them.
    page = get(client(trained.path.parent), "/")
    assert ("href", "/training/once") in page.attributes
    (trained.path.parent / "link").symlink_to(trained.path.parents[1], target_is_directory=True)
    assert "There is no" not in page.text
    for key in ("link", "%2e%2e", "none"):
        get(client(trained.path.parent), f"/training/{key}", 404)
    # Names are text, and a record that is torn is told.
    name = "<img src=x>"
    record = json.loads((trained.path / "train.json").read_text()) | {"name": name}
    (trained.path / "train.json").write_text(json.dumps(record))
    page = get(site, "/training/once")
    assert name in page.text
    assert "img" not in page.tags
    (trained.path / "train.json").write_text("{")
    assert "is damaged" in get(site, "/training/once", 404).text
    assert "is damaged" in get(client(trained.path.parent), "/").text
