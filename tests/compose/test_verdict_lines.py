"""What people read of verdicts: reasons, warnings, what was judged of a space, and lines that are whole in a pipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from native_specs import HYBRID
from typer.testing import CliRunner

from heddle import api
from heddle.cli import app
from heddle.compose.hf.export import ExportResult
from heddle.target_tables import show_exported


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("specs") / "hybrid.yaml"
    path.write_text(HYBRID)
    return path


def row(found: dict[str, Any], name: str) -> dict[str, Any]:
    return next(one for one in found["targets"] if one["target"] == name)


def test_a_verdict_warns_of_padding_on_the_right_where_a_layer_keeps_a_state_or_a_window_or_chooses_blocks(
    hybrid: Path, tmp_path: Path
) -> None:
    assert api.targets(hybrid)["warning"].startswith(
        "layers.0.mixer (gated_deltanet) keeps a state or a window, or chooses blocks: "
    )
    softmax = tmp_path / "softmax.yaml"
    softmax.write_text(HYBRID.replace("[linear, full, full]", "[full, full]"))
    assert api.targets(softmax)["warning"] == ""
    plain = softmax.read_text()
    for field in ("window: 7", "selection: {block: 8, count: 4}"):
        softmax.write_text(plain.replace("qk_norm: true", field))
        assert "layers.0.mixer (attention)" in api.targets(softmax)["warning"]


def test_a_refusal_tells_what_holds_where_nothing_is_written(tmp_path: Path) -> None:
    path = tmp_path / "plain.yaml"
    path.write_text(HYBRID.replace("rope: {fraction: 0.5}", "rope: null"))
    found = api.targets(path)
    told = {
        one["path"]: one["why"]
        for name in ("qwen3_5_text", "olmo_hybrid")
        for one in row(found, name)["refused"]
    }
    assert told["layers.1.norm_placement"].startswith("is pre; there it is post")
    assert told["layers.0.mixer.norm_eps"].startswith("is 1e-06; there it is 1e-05")
    assert "the heads of every softmax layer turn" in told["layers.1.mixer.rope"]


def test_verdicts_of_a_space_say_that_they_are_of_its_defaults(hybrid: Path, tmp_path: Path) -> None:
    space = tmp_path / "space.yaml"
    space.write_text(HYBRID.replace("heads: 2}, channel", "heads: {choice: [2, 4]}}, channel"))
    for path, said in ((hybrid, False), (space, True)):
        for command in (["check"], ["check", "--targets"], ["show", "--targets"]):
            told = CliRunner().invoke(app, [command[0], str(path), *command[1:]]).output
            assert (
                "of the defaults of the open values; search.export.must_fit looks at the whole space" in told
            ) == said


def test_a_line_of_a_verdict_is_whole_where_nobody_sees_its_width(hybrid: Path) -> None:
    told = CliRunner().invoke(app, ["show", str(hybrid), "--targets"]).output.splitlines()
    assert all(line == line.rstrip() for line in told)
    (line,) = (one for one in told if "vLLM: yes" in one and "tried" in one)
    assert line.endswith(
        "tried in 0.32, did not start: its file of this class imports its vision model, which asks for torchvision"
    )
    assert max(len(one) for one in told) > 160


def test_an_encoder_is_told_without_a_text(capsys: pytest.CaptureFixture[str]) -> None:
    show_exported(ExportResult(Path("out"), 0.0, "", "5", snippet="from text to its class"))
    told = " ".join(capsys.readouterr().out.split())
    assert "it writes" not in told
    assert "its README.md holds a snippet from text to its class" in told
