"""`heddle eval`: an export under lm-evaluation-harness, and what is told where that cannot be."""

from __future__ import annotations

import json
import os
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from heddle import api, cli
from heddle.compose.build import build
from heddle.compose.hf import export as export_file
from heddle.compose.hf import harness
from heddle.compose.hf.card import Card, ScoreRow
from heddle.compose.hf.export import export
from heddle.errors import HeddleError
from heddle.specs import ModelSpec

ROOT = Path(__file__).parents[2]
BLOCKS = {
    "linear": {"mixer": {"kind": "gated_deltanet", "heads": 2}, "channel": {"kind": "swiglu"}},
    "full": {"mixer": {"kind": "attention", "heads": 2}, "channel": {"kind": "swiglu"}},
}
SPEC = {
    "vocab_size": 256,
    "hidden_size": 32,
    "context_length": 256,
    "blocks": BLOCKS,
    "layers": ["linear", "full"],
}
TASK = """\
task: heddle_sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{q}}}}"
{answers}
metric_list: [{{metric: {metric}, aggregation: mean, higher_is_better: true}}]
"""
CHOICES = {"kind": "multiple_choice", "answers": 'doc_to_choice: "{{c}}"\ndoc_to_target: l', "metric": "acc"}
TEXT = {
    "kind": "generate_until",
    "answers": 'doc_to_target: "{{q}}"\ngeneration_kwargs: {until: ["="], max_gen_toks: 4}',
    "metric": "exact_match",
}


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A folder that needs no code of its own; nothing gets as far as to load it."""
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    return tmp_path


def test_without_the_package_the_command_says_how_to_get_it(
    plain: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness, "PACKAGE", "lm_eval_that_is_not_there")
    with pytest.raises(SystemExit) as left:
        cli.main(["eval", str(plain), "--tasks", "sums"])
    assert left.value.code == 1
    told = capsys.readouterr().err
    assert "package-missing" in told
    assert "heddle-lm[eval]" in told


def test_a_folder_is_checked_before_the_harness_sees_it(plain: Path) -> None:
    (plain / "config.json").write_text('{"auto_map": {"AutoModelForCausalLM": "code.Model"}}')
    with pytest.raises(HeddleError, match="--trust-remote-code"):
        api.evaluate(plain, ["sums"])
    (plain / "model.safetensors").rename(plain / "pytorch_model.bin")
    with pytest.raises(HeddleError, match="pickles"):
        api.evaluate(plain, ["sums"], trust_remote_code=True)


def test_scores_are_read_with_their_errors_and_counts() -> None:
    told = {
        "results": {
            "sums": {"alias": "sums", "acc,none": 0.5, "acc_stderr,none": 0.1, "f1,strict": 1, "f1_stderr,strict": "N/A"}
        },
        "n-samples": {"sums": {"original": 16, "effective": 8}},
    }  # fmt: skip
    assert list(harness._rows(told)) == [
        ScoreRow("sums", "acc", 0.5, 0.1, 8),
        ScoreRow("sums", "f1", 1.0, None, 8, "strict"),
    ]


@pytest.fixture(scope="module")
def python_with_harness(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A Python that has the harness beside what is installed here, and its environment."""
    folder = tmp_path_factory.mktemp("harness")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    # pip counts what lies on this path as installed.
    settings = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), sysconfig.get_paths()["purelib"]))}
    command = [str(python), "-m", "pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt"), "lm-eval"]
    subprocess.run(command, check=True, env=settings, timeout=1200)
    return python, settings


@pytest.mark.long
@pytest.mark.parametrize("form", [CHOICES, TEXT], ids=["choices", "text"])
def test_an_export_runs_a_local_task_offline(
    python_with_harness: tuple[Path, dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    form: dict[str, str],
) -> None:
    python, settings = python_with_harness
    monkeypatch.setattr(export_file, "verify", lambda *_, **__: export_file.Verification(0.0, "", "5", "2"))
    export(
        build(ModelSpec.model_validate(SPEC)).eval(), tmp_path / "model", card=Card("tiny", "version: 1\n")
    )
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    rows = [{"q": f"{a}+{b}=", "c": ["even", "odd"], "l": (a + b) % 2} for a in range(4) for b in range(4)]
    (tasks / "sums.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tasks / "sums.yaml").write_text(TASK.format(data=tasks / "sums.jsonl", **form))
    offline = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hf"),
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [
        "eval",
        "model",
        "--tasks",
        "heddle_sums",
        "--include-path",
        "tasks",
        "--limit",
        "12",
        "--trust-remote-code",
        "--json",
    ]
    done = subprocess.run(
        [str(python), "-m", "heddle", *command],
        cwd=tmp_path, env={**settings, **offline}, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout[done.stdout.index("[\n") :])
    assert (row["task"], row["metric"], row["n"]) == ("heddle_sums", form["metric"], 12)
    assert 0 <= row["value"] <= 1
