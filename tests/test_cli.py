"""The command line: what each command prints, how it exits, no traceback for a user's mistake."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from ruamel.yaml import YAML

import heddle
from heddle import cli
from heddle.kernels import OPS, bench
from heddle.search.record import read_run

ROOT = Path(__file__).parents[1]
COMMANDS = (
    "init", "doctor", "check", "show", "diff", "schema", "train", "bench", "search", "export", "import", "report",
    "verify", "eval", "dashboard",
)  # fmt: skip
PLAIN = """\
version: 1
name: plain
model:
  vocab_size: 256
  hidden_size: 32
  blocks:
    linear: {mixer: {kind: gated_deltanet, heads: 2}, channel: {kind: swiglu}}
    full: {mixer: {kind: attention, heads: 2, window: 16}, channel: {kind: gelu}}
  layers: [{repeat: 2, pattern: [linear, full]}]
tokenizer: bytes
data: {source: corpus.txt, sequence_length: 64}
train: {tokens: 4k, batch_tokens: 1024, learning_rate: 3.0e-3}
"""

Heddle = Callable[..., tuple[int, str, str]]


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A plain spec in the current folder, beside a text that is too short to learn from."""
    monkeypatch.chdir(tmp_path)
    Path("corpus.txt").write_text("words")
    path = Path("spec.yaml")
    path.write_text(PLAIN)
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Heddle:
    """Runs the command line in this process; gives exit status, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            cli.main([str(argument) for argument in arguments])
        seen = capsys.readouterr()
        return int(left.value.code or 0), seen.out, seen.err

    return call


def test_the_installed_command_and_the_module_tell_the_version() -> None:
    script = Path(sys.executable).parent / "heddle"
    ways = [[sys.executable, "-m", "heddle"], *([[str(script)]] if script.exists() else [])]
    for way in ways:
        done = subprocess.run([*way, "--version"], cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout == f"heddle {heddle.__version__}\n"


@pytest.mark.alone
def test_help_starts_fast() -> None:
    took = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "heddle", "--help"], cwd=ROOT, capture_output=True, check=True)
        took.append(time.perf_counter() - started)
    # 0.6 s on an idle machine; beside other work the best of three may take twice that.
    assert min(took) < 1.2


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_shows_an_example(run: Heddle, command: str) -> None:
    status, out, _ = run(command, "--help")
    assert status == 0
    assert f"Example: heddle {command}" in " ".join(out.split())


def test_every_command_is_tested_here() -> None:
    assert {command.name or command.callback.__name__ for command in cli.app.registered_commands} == set(
        COMMANDS
    )  # type: ignore[union-attr]


def test_show_tells_targets_to_a_person_and_to_a_program(run: Heddle, spec: Path) -> None:
    status, out, err = run("show", spec, "--targets")
    assert status == 0, err
    assert "layers.0.mixer.kind: is gated_deltanet" in " ".join(out.split())
    assert "read in their source" in out
    status, out, err = run("show", spec, "--targets", "--json")
    assert status == 0, err
    told = {row["target"]: row["fits"] for row in json.loads(out)["targets"]}
    assert told["qwen3_5_text"] is False
    assert told["remote"] is True


@pytest.mark.usefixtures("spec")
def test_init_writes_a_spec_that_checks_and_does_not_overwrite(run: Heddle) -> None:
    assert run("init", "new.yaml")[0] == 0
    assert run("check", "new.yaml")[0] == 0
    status, _, err = run("init", "new.yaml")
    assert status == 2
    assert "[file-exists]" in err
    assert run("init", "new.yaml", "--force")[0] == 0


def test_check_prints_the_form_of_house_for_a_good_file(run: Heddle, spec: Path) -> None:
    status, out, _ = run("check", spec, "--json")
    assert (status, json.loads(out)) == (0, {"ok": True, "errors": [], "fits": ["remote"]})


def test_check_tells_what_is_legal_and_seldom_meant(run: Heddle, spec: Path) -> None:
    spec.write_text(
        PLAIN.replace(
            "  blocks:\n",
            "  blocks:\n    spare: {mixer: {kind: attention, heads: 4}, channel: {kind: gelu}}\n",
        )
    )
    status, out, err = run("check", spec)
    assert status == 0
    assert ": ok" in out
    assert err.startswith("warning: ")
    assert "blocks.spare" in err
    assert "[unused-block]" in err
    status, out, err = run("check", spec, "--json")
    assert (status, err) == (0, "")
    told = json.loads(out)
    assert told["ok"]
    assert [(one["code"], one["path"]) for one in told["warnings"]] == [("unused-block", "blocks.spare")]


def test_check_tells_all_errors_with_their_places(run: Heddle, spec: Path) -> None:
    spec.write_text(PLAIN.replace("hidden_size: 32", "hiden_size: 32").replace("kind: gelu", "kind: gelo"))
    status, out, err = run("check", spec, "--json")
    told = json.loads(out)
    assert status == 2
    assert err == ""
    assert told["ok"] is False
    assert len(told["errors"]) >= 2
    for error in told["errors"]:
        assert set(error) == {"code", "file", "line", "column", "path", "message", "hint"}
        assert error["file"] == "spec.yaml"
        assert error["line"] >= 1
        assert error["column"] >= 1
    assert any("hidden_size" in f"{error['message']} {error['hint']}" for error in told["errors"])


def test_check_shows_the_line_with_a_caret_to_a_person(run: Heddle, spec: Path) -> None:
    spec.write_text(PLAIN.replace("kind: gelu", "kind: gelo"))
    status, out, err = run("check", spec)
    assert status == 2
    assert out == ""
    assert "spec.yaml:8:" in err
    assert "^" in err
    assert "Traceback" not in err


def test_show_prints_the_form_of_house(run: Heddle, spec: Path) -> None:
    status, out, _ = run("show", spec, "--json", "--context", 1000, "--batch", 3)
    shown = json.loads(out)
    assert status == 0
    assert (shown["name"], shown["context"], shown["batch"], len(shown["layers"])) == ("plain", 1000, 3, 4)
    assert len(shown["hash"]) == 16
    for index, layer in enumerate(shown["layers"]):
        assert layer["index"] == index
        assert isinstance(layer["mixer"], str)
        assert isinstance(layer["channel"], str)
    cost = (
        "prefill_flops_per_token",
        "decode_flops_per_token",
        "cache_bytes",
        "cache_bytes_per_token",
        "state_bytes",
        "train_flops_per_token",
        "decode_bytes",
        "prefill_bytes",
    )
    assert set(cost) <= set(shown["cost"])
    assert shown["parameters"] > sum(layer["parameters"] for layer in shown["layers"]) > 0
    for key in ("cache_bytes", "state_bytes"):
        assert shown["cost"][key] == sum(layer[key] for layer in shown["layers"])


def test_show_prints_a_table_to_a_person(run: Heddle, spec: Path) -> None:
    status, out, _ = run("show", spec)
    assert status == 0
    assert "total" in out
    assert "a decode step" in out
    assert "gated_deltanet" in out


@pytest.mark.usefixtures("spec")
def test_a_search_without_its_corpus_leaves_no_folder(run: Heddle) -> None:
    assert run("init", "new.yaml")[0] == 0
    new = Path("new.yaml")
    new.write_text(new.read_text().replace("source: python-stdlib", "source: nowhere.txt"))
    status, _, err = run("search", "new.yaml", "--out", "run")
    assert status == 2
    assert "[corpus-missing]" in err
    assert not Path("run").exists()


def test_show_draws_the_graph_as_text_and_as_a_flowchart(run: Heddle, spec: Path) -> None:
    status, text, _ = run("show", spec, "--graph", "text")
    assert status == 0
    assert "layers.0.mixer" in text
    status, chart, _ = run("show", spec, "--graph", "mermaid")
    assert status == 0
    assert chart.startswith("flowchart TD")
    assert json.loads(run("show", spec, "--graph", "mermaid", "--json")[1]) == {"graph": chart}


def test_show_draws_the_graph_as_a_picture_into_a_file(run: Heddle, spec: Path, tmp_path: Path) -> None:
    status, drawn, _ = run("show", spec, "--graph", "svg")
    assert status == 0
    assert drawn.startswith("<svg ")
    assert drawn.endswith("</svg>\n")
    file = tmp_path / "drawn" / "model.svg"
    status, out, _ = run("show", spec, "--graph", "svg", "--out", file)
    assert status == 0
    assert "wrote" in out
    assert file.read_text() == drawn
    status, _, err = run("show", spec, "--out", file)
    assert status == 2
    assert "--out takes a graph" in err


def test_diff_tells_what_differs_and_that_nothing_does(run: Heddle, spec: Path) -> None:
    Path("other.yaml").write_text(PLAIN.replace("window: 16", "window: 8"))
    status, out, _ = run("diff", spec, "other.yaml", "--json")
    told = json.loads(out)
    assert (status, told["same"]) == (0, False)
    assert {one["path"].rpartition(".")[2] for one in told["differences"]} == {"window"}
    assert "mixer.window" in run("diff", spec, "other.yaml")[1]
    assert "the same" in run("diff", spec, spec)[1]


@pytest.mark.usefixtures("spec")
def test_schema_is_a_json_schema_that_takes_the_starter(run: Heddle) -> None:
    status, out, _ = run("schema")
    assert status == 0
    schema = json.loads(out)
    jsonschema.Draft202012Validator.check_schema(schema)
    starter = YAML(typ="safe").load((ROOT / "heddle/starter.yaml").read_text())
    jsonschema.validate(starter, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**starter, "sarch": {}}, schema)
    assert run("schema", "--out", "heddle.schema.json")[0] == 0
    assert json.loads(Path("heddle.schema.json").read_text()) == schema


def test_doctor_finds_this_machine_well(run: Heddle) -> None:
    status, out, _ = run("doctor", "--json")
    told = json.loads(out)
    assert status == 0, [check for check in told["checks"] if not check["ok"]]
    assert told["versions"]["heddle"] == heddle.__version__
    assert any(device["kind"] == "cpu" for device in told["devices"])
    assert any(check["name"].startswith("kernel ") for check in told["checks"])
    # What timings on a GPU are checked with; its absence is told and is no fault.
    assert [check["ok"] for check in told["checks"] if check["name"] == "NVML"] == [True]


def test_bench_times_a_spec(run: Heddle, spec: Path) -> None:
    status, out, _ = run("bench", spec, "--context", 64, "--phase", "decode", "--json")
    (row,) = json.loads(out)
    assert status == 0
    assert row["phase"] == "decode"
    assert row["context"] == 64
    assert 0 < row["low_ms"] <= row["median_ms"] <= row["high_ms"]
    assert row["paths"].keys() == {"attention", "gated_deltanet"}


def test_bench_wants_a_spec_or_ops(run: Heddle, spec: Path) -> None:
    assert run("bench")[0] == 2
    assert run("bench", spec, "--ops")[0] == 2
    assert run("bench", spec, "--precision", 0.01)[0] == 2


@pytest.mark.slow
def test_bench_times_the_ops(run: Heddle, monkeypatch: pytest.MonkeyPatch) -> None:
    # What is told of them does not depend on how long they are or are timed, and an op that is slow takes seconds.
    monkeypatch.setattr(bench, "CPU_LIMIT", bench.CPU_LIMIT | {"T": 128, "S": 128, "C": 128})
    monkeypatch.setattr(bench, "REPEAT", 10)
    status, out, err = run("bench", "--ops", "--json")
    assert status == 0, err
    rows = json.loads(out)
    assert {op.name for op in OPS} <= {row["op"] for row in rows}
    assert all(0 < row["ms_p10"] <= row["ms"] <= row["ms_p90"] for row in rows)
    assert {"fwd", "fwdbwd", "decode"} <= {row["phase"] for row in rows}


def test_train_and_export_make_a_folder(run: Heddle, spec: Path) -> None:
    sources = "\n".join(path.read_text() for path in sorted(Path(json.__file__).parent.glob("*.py")))
    Path("corpus.txt").write_text(sources * 4)
    status, out, err = run("train", spec, "--out", "trained")
    assert status == 0, err
    assert "bits" in out or "text" in out
    assert run("train", spec, "--out", "trained")[0] == 2
    status, out, err = run("export", "trained", "--out", "hf", "--battery", "short")
    assert status == 0, err
    assert "one-token steps" in out
    assert "parity battery: short" in out
    assert Path("hf/config.json").exists()


MISTAKES: tuple[tuple[str, ...], ...] = (
    ("check", "missing.yaml"),
    ("show", "."),
    ("report", "missing"),
    ("dashboard", "missing"),
    ("dashboard", ".", "--bench", "missing"),
    ("export", "missing", "--out", "x"),
    ("export", "spec.yaml", "--target", "lama", "--out", "x"),
    ("export", "spec.yaml", "--target", "llama", "--out", "x"),
    ("import", "missing", "--out", "x"),
    ("search", "spec.yaml", "--resume"),
    ("search", "spec.yaml", "--time", "soon"),
    ("search", "spec.yaml", "--trials", "0"),
    ("train", "spec.yaml", "--seed", "one"),
    ("show", "spec.yaml", "--context", "-1"),
    ("weave",),
    ("show",),
)


@pytest.mark.parametrize("words", MISTAKES, ids=" ".join)
@pytest.mark.usefixtures("spec")
def test_a_mistake_exits_with_2_and_no_traceback(run: Heddle, words: tuple[str, ...]) -> None:
    status, out, err = run(*words)
    assert status == 2
    assert "Traceback" not in out + err
    assert err.strip()


def test_a_bug_of_ours_is_one_line_and_exits_with_1(
    run: Heddle, spec: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("wires\ncrossed")

    monkeypatch.delenv("HEDDLE_TRACEBACK", raising=False)
    monkeypatch.setattr("heddle.api.check_with_targets", broken)
    status, _, err = run("check", spec)
    assert status == 1
    assert err.splitlines()[0] == "heddle failed: RuntimeError: wires crossed"
    assert "HEDDLE_TRACEBACK=1" in err


@pytest.mark.slow
def test_search_prints_plain_lines_the_front_the_spec_and_what_next(search_run: Path) -> None:
    out = (search_run.parent / "stdout.txt").read_text()
    run = read_run(search_run)
    assert run.status == "finished"
    for trial in run.trials:
        assert f"trial {trial.number} " in out
    best = run.best_trial
    assert best is not None
    assert best.spec.strip() in out
    assert f"trial {run.best} ★" in out
    assert "heddle export" in out
    assert str(Path("run") / "report.html") in out
    assert (search_run / "report.html").stat().st_size < 6_000_000
    assert "\x1b[" not in out


@pytest.mark.slow
def test_search_does_not_write_over_a_run(run: Heddle, search_run: Path) -> None:
    status, _, err = run("search", search_run.parent / "spec.yaml", "--out", search_run)
    assert status == 2
    assert "[run-exists]" in err


@pytest.mark.slow
def test_report_and_export_read_a_run(run: Heddle, search_run: Path, tmp_path: Path) -> None:
    assert run("report", search_run, "--out", tmp_path / "report.html")[0] == 0
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    status, out, err = run(
        "export", search_run, "--trial", read_run(search_run).best, "--out", tmp_path / "hf", "--json",
        "--battery", "none",
    )  # fmt: skip
    assert status == 0, err
    found = json.loads(out)
    assert found["max_difference"] <= 1e-5
    assert (found["battery"], [row["check"] for row in found["parity"]]) == (
        "none",
        ["loads in a clean process"],
    )
    status, _, err = run("export", search_run, "--trial", "first", "--out", tmp_path / "other")
    assert status == 2
    assert "[bad-argument]" in err


def test_what_the_system_refuses_is_told_as_json_to_a_program(spec: Path, run: Heddle) -> None:
    (spec.parent / "corpus.txt").write_text("words of a corpus " * 500)
    status, out, err = run("train", spec, "--out", "/proc/no/such/folder", "--json")
    assert (status, err) == (1, "")
    (error,) = json.loads(out)["errors"]
    assert json.loads(out)["ok"] is False
    assert error["code"] == "system-error"
    assert error["file"].startswith("/proc/no")
    status, out, err = run("schema", "--out", "/proc/no/such/file")
    assert (status, out) == (1, "")
    assert err == "/proc/no/such/file: No such file or directory   [system-error]\n"


def test_show_tells_how_much_is_open(spec: Path, run: Heddle) -> None:
    assert json.loads(run("show", spec, "--json")[1])["space"] == {"open": 0, "size": 1}
    assert "open values" not in run("show", spec)[1]
    spec.write_text(PLAIN.replace("window: 16", "window: {int: [8, 16]}"))
    assert json.loads(run("show", spec, "--json")[1])["space"] == {"open": 1, "size": 9}
    assert "open values: 1, a space of 9 specs" in run("show", spec)[1]
    spec.write_text(
        PLAIN.replace("hidden_size: 32", "hidden_size: 32\n  norm_eps: {float: [1.0e-6, 1.0e-5]}")
    )
    assert json.loads(run("show", spec, "--json")[1])["space"] == {"open": 1, "size": None}
    assert "a space of countless specs" in run("show", spec)[1]
    assert "a space of countless specs" in run("check", spec)[1]
