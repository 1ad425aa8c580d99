"""A mixer from another package: installed, it is a kind as any other; broken, it harms nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "plugin"
SPEC = EXAMPLE / "token_shift.yaml"


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder into which the example is installed, away from the environment of the other tests."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "plugin"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
            subprocess.run([*command, "--target", str(folder), str(EXAMPLE)], check=True)
    return folder


def run(where: Path, *command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(where)])
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def heddle(where: Path, *command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return run(where, "-m", "heddle", *command, cwd=cwd)


def test_without_the_package_the_kind_is_unknown(tmp_path: Path) -> None:
    done = heddle(tmp_path, "check", str(SPEC))
    assert done.returncode == 2
    assert "there is no mixer kind 'token_shift'   [unknown-kind]" in done.stderr


def test_check_schema_and_show_know_the_kind(installed: Path) -> None:
    checked = heddle(installed, "check", str(SPEC))
    assert checked.returncode == 0, checked.stderr
    schema = json.loads(heddle(installed, "schema").stdout)
    fields = schema["$defs"]["TokenShift"]["properties"]
    assert set(fields) == {"kind", "heads", "head_dim"}
    shown = json.loads(heddle(installed, "show", str(SPEC), "--json", "--context", "8").stdout)
    layer = next(one for one in shown["layers"] if one["mixer"] == "token_shift")
    # v and o, a mu for each of 64 features, the two norms, and the channel block.
    assert layer["parameters"] == 2 * 64 * 64 + 64 + 2 * 64 + 3 * 64 * 176
    assert layer["state_bytes"] == 64 * 2


def test_mistakes_in_its_fields_are_located(installed: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(SPEC.read_text().replace("kind: token_shift, heads: 4", "kind: token_shift, headz: 4"))
    done = heddle(installed, "check", str(wrong))
    assert done.returncode == 2
    assert "blocks.shift.mixer.headz: there is no field 'headz' here   [unknown-field]" in done.stderr
    assert "hint: did you mean heads?" in done.stderr


@pytest.mark.slow
def test_it_keeps_the_contracts_of_every_mixer(installed: Path) -> None:
    done = run(
        installed, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/contracts/test_mixers.py",
        "-k", "token_shift",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


@pytest.mark.slow
def test_a_search_chooses_it_and_its_code_is_exported(installed: Path, tmp_path: Path) -> None:
    done = heddle(installed, "search", str(SPEC), "--out", str(tmp_path / "run"), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    export = tmp_path / "run" / "best" / "export"
    assert (export / "heddle_example_module.py").is_file()
    kinds = {layer["mixer"]["kind"] for layer in json.loads((export / "config.json").read_text())["layers"]}
    assert kinds == {"token_shift", "attention"}


def _offer(folder: Path, kind: str, value: str) -> None:
    """What an installed package leaves behind that offers `kind` at `value`."""
    info = folder / "broken-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[heddle.mixers]\n{kind} = {value}\n")


@pytest.mark.parametrize(
    ("kind", "value", "why"),
    [
        (
            "token_shift",
            "nowhere.spec:TokenShift",
            "nowhere.spec:TokenShift does not import: ModuleNotFoundError",
        ),
        ("token_shift", "json:JSONDecoder", "json:JSONDecoder is no MixerSpec"),
        ("token_shift", "heddle.specs.mixers:Attention", "its kind is 'attention'"),
        ("attention", "json:JSONDecoder", "there is a mixer of that kind already"),
    ],
)
def test_a_broken_package_harms_nothing_and_is_told(tmp_path: Path, kind: str, value: str, why: str) -> None:
    _offer(tmp_path, kind, value)
    plain = heddle(tmp_path, "check", "examples/specs/hybrid.yaml")
    assert plain.returncode == 0, plain.stderr
    code = "from heddle.specs.mixers import BROKEN; print(BROKEN[0].kind, BROKEN[0].package, BROKEN[0].why)"
    assert f"{kind} broken {why}" in run(tmp_path, "-c", code).stdout
    if kind == "token_shift":
        told = heddle(tmp_path, "check", str(SPEC)).stderr
        assert f"hint: the package broken offers it, but {why}" in told
