"""Native folders are loaded by the oldest transformers that we take and by another between it and the installed one."""

from __future__ import annotations

from pathlib import Path

import pytest
from native_specs import SPECS
from native_versions import Folders, install


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Two random specs for each class, written once."""
    return Folders(tmp_path_factory.mktemp("native"), 2)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("version", ["5.17", "5.19"])
def test_an_older_transformers_computes_the_same_of_every_class(
    folders: Folders, version: str, tmp_path: Path
) -> None:
    asked, figures = folders.ask([install(version, tmp_path / "packages")])
    assert asked.startswith(f"{version}.")
    assert {figure.target for figure in figures} == {*SPECS}
    assert {f"{figure.target} {figure.seed}": figure.wrong for figure in figures if figure.wrong} == {}
    # Where the class rounds no otherwise than ours does, no more of bfloat16 is lost.
    assert all(figure.bfloat16 < 1 for figure in figures)
