"""What is installed, pinned and shipped."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import heddle

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def _pins() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    return {canonicalize_name(pin.name): pin for pin in found}


def _needed() -> dict[str, list[Requirement]]:
    """Every distribution that heddle-lm[dev] pulls in on this machine, with what asks for it."""
    extras = PROJECT["optional-dependencies"]
    waiting = [Requirement(text) for text in (*PROJECT["dependencies"], *extras["dev"], *extras["parquet"])]
    needed: dict[str, list[Requirement]] = {}
    while waiting:
        asked = waiting.pop()
        environments = [{"extra": extra} for extra in (*asked.extras, "")]
        if asked.marker is not None and not asked.marker.evaluate({"extra": ""}):
            continue
        name = canonicalize_name(asked.name)
        seen = name in needed
        needed.setdefault(name, []).append(asked)
        if seen:
            continue
        for text in importlib.metadata.requires(name) or []:
            inner = Requirement(text)
            marker = inner.marker
            if marker is None or any(marker.evaluate(environment) for environment in environments):
                inner.marker = None
                waiting.append(inner)
    return needed


def test_every_dependency_is_pinned_to_what_is_installed() -> None:
    pins = _pins()
    for name, askers in _needed().items():
        assert name in pins, f"{name} is not in constraints.txt"
        installed = importlib.metadata.version(name).split("+")[0]
        assert pins[name].specifier.contains(installed), (
            f"{name} {installed} is not what constraints.txt says"
        )
        assert all(asker.specifier.contains(installed, prereleases=True) for asker in askers)


def test_every_pin_is_exact() -> None:
    for pin in _pins().values():
        assert [specifier.operator for specifier in pin.specifier] == ["=="], pin


def test_torch_and_triton_are_pinned_as_a_pair() -> None:
    # The stock wheel of torch 2.13.0 asks for exactly this Triton; any other pair does not resolve.
    pins = _pins()
    assert str(pins["torch"].specifier) == "==2.13.0"
    assert str(pins["triton"].specifier) == "==3.7.1"


def test_the_version_is_told_in_one_voice() -> None:
    assert heddle.__version__ == PROJECT["version"]
    assert re.search(r"^## \[Unreleased\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_files_that_are_no_python_lie_in_the_package() -> None:
    # hatchling ships what lies in heddle/ and git does not ignore.
    pages = [f"heddle/dashboards/{name}" for name in ("report.css", "report.js", "app.css", "app.js")]
    plotly = [f"heddle/dashboards/plotly/{name}" for name in ("plotly-cartesian.min.js", "LICENSE")]
    shipped = ["heddle/starter.yaml", *pages, *plotly]
    for name in shipped:
        assert (ROOT / name).is_file()
        ignored = subprocess.run(["git", "check-ignore", "-q", name], cwd=ROOT, check=False).returncode
        assert ignored != 0, f"{name} is ignored by git"


def test_the_licence_is_whole() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
