"""Native folders are loaded by the oldest transformers that we take and by another between it and the installed one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from foreign import Compared
from native_specs import SPECS
from native_versions import Folders, install, told_of

from heddle.compose.targets.catalogue import BY_NAME


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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_logits_that_are_no_numbers_are_told(tmp_path: Path) -> None:
    target = next(iter(SPECS))
    made, key = Folders(tmp_path, 1, [target]), f"{target} 0"
    right = made.right[key]
    told = {"class": BY_NAME[target].model_class, "keys": [], "cache_agrees": True}
    found = {name: right[name] for name in ("begun", "tokens", "bfloat16")}
    for logits, wrong in (
        (right["as_class"], ()),
        (torch.full_like(right["logits"], torch.nan), ("logits nan apart,",)),
    ):
        tensors = {f"{key}.{name}": one for name, one in {**found, "logits": logits}.items()}
        figure = made._figure(key, told, tensors)
        assert tuple(one[: len("logits nan apart,")] for one in figure.wrong) == wrong
        assert told_of([figure])["over"] == len(wrong)


@pytest.mark.parametrize("name", ["begun", "float32", "float64"])
def test_a_difference_that_is_no_number_holds_nothing(name: str) -> None:
    usual = {"begun": 0.0, "float32": 0.0, "float64": 0.0, "bfloat16": 0.0}
    assert Compared("any", 0, **usual).holds
    assert not Compared("any", 0, **{**usual, name: float("nan")}).holds
