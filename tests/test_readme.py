"""Every command and every Python block of the README does what it says.

`make search` takes minutes: what it runs is read from the Makefile here, and the same command runs on a
smaller spec in the `search_run` fixture. `make test` is what runs this file.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from heddle import api, specs

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str, text: str = README) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(search_run: Path, tmp_path: Path) -> Path:
    """A folder as `make search` leaves it, with the small run in the place of the quickstart's."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(search_run, target_is_directory=True)
    return tmp_path


def _shell(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # The README's `heddle` is the one under test, wherever this Python has it.
    heddle = f'heddle() {{ "{sys.executable}" -m heddle "$@"; }}\n'
    return subprocess.run(
        ["bash", "-euc", heddle + script],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_the_first_command_is_near_the_top() -> None:
    first = next(
        number for number, line in enumerate(README.splitlines(), 1) if line.startswith("    make search")
    )
    assert first <= 10


def test_make_search_searches_the_quickstart() -> None:
    done = subprocess.run(["make", "-n", "search"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "heddle search examples/quickstart.yaml" in done.stdout
    assert api.check(ROOT / "examples/quickstart.yaml").spec.search is not None


def test_every_make_target_named_in_the_docs_exists() -> None:
    texts = README + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for target in set(re.findall(r"^ {4}make ([a-z-]+)", texts, re.MULTILINE)):
        subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, check=True)


@pytest.mark.slow
def test_every_command_and_python_block_runs(folder: Path) -> None:
    (commands,) = blocks("sh")
    done = _shell(folder, commands)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("my-spec.yaml", "report.html", "my-model/config.json"):
        assert (folder / name).exists()
    export_doc = (ROOT / "docs/export.md").read_text(encoding="utf-8")
    for block in blocks("python") + blocks("python", export_doc):
        python = subprocess.run(
            [sys.executable, "-c", block],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert python.returncode == 0, python.stderr


def test_the_spec_of_the_readme_checks() -> None:
    (text,) = blocks("yaml")
    file = specs.loads(text)
    assert file.space.placement is not None


def test_the_error_of_the_readme_is_the_one_a_user_gets(tmp_path: Path) -> None:
    (text,) = blocks("yaml")
    path = tmp_path / "a.yaml"
    path.write_text(text.replace("kind: attention, heads: 2", "kind: attention, heads: 6"))
    done = _shell(tmp_path, "heddle check a.yaml")
    assert done.returncode == 2
    assert "[dims-not-divisible]" in done.stderr
    assert "6 does not divide" in done.stderr


def test_the_schema_in_docs_is_the_one_heddle_prints() -> None:
    path = ROOT / "docs/heddle.schema.json"
    again = "run: heddle schema --out docs/heddle.schema.json"
    assert json.loads(path.read_text(encoding="utf-8")) == api.schema(), again


def test_every_relative_link_leads_somewhere() -> None:
    for path in (ROOT / "README.md", *ROOT.glob("docs/**/*.md"), ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name} links {target}"


def test_the_five_parts_are_the_five_folders() -> None:
    named = set(re.findall(r"^\| `heddle/([a-z]+)/` \|", README, re.MULTILINE))
    there = {path.name for path in (ROOT / "heddle").iterdir() if path.is_dir() and path.name[0] not in "_."}
    assert named == there
