"""Whole files: examples load, a long model is checked in time, and the catalogue is whole."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from heddle.compose.plan import plan
from heddle.specs import CHANNELS, MIXERS, load, loads, spec_hash, to_yaml
from heddle.specs.dims import DIMS
from heddle.specs.model import BlockSpec, ModelSpec
from heddle.specs.recipe import DataSpec, TrainSpec
from heddle.specs.search import Budget, PerDevice, SearchSpec
from heddle.specs.spec import Spec
from heddle.specs.tasks import TASKS

ROOT = Path(__file__).parents[2]
# The example of a plugin needs the plugin: tests/test_plugin.py.
EXAMPLES = [
    *sorted((ROOT / "examples").glob("*.yaml")),
    *sorted((ROOT / "examples/specs").glob("*.yaml")),
    ROOT / "heddle/starter.yaml",
]
every_example = pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
SCHEMAS = [Spec, ModelSpec, BlockSpec, DataSpec, TrainSpec, SearchSpec, Budget, PerDevice, *TASKS.values()]


@every_example
def test_an_example_loads_plans_and_survives_being_written(path: Path) -> None:
    file = load(path)
    assert file.warnings == ()
    assert file.file == str(path)
    assert file.text == path.read_text(encoding="utf-8")
    made = plan(file.spec.model, file.where)
    assert made.parameters > 0
    assert spec_hash(loads(to_yaml(file.spec)).spec.model) == spec_hash(file.spec.model)


def test_the_examples_of_the_language_are_there() -> None:
    assert {"quickstart", "softmax", "hybrid", "sliding", "retnet", "starter"} <= {
        path.stem for path in EXAMPLES
    }


def test_a_thousand_layers_are_checked_within_a_second() -> None:
    names = ", ".join(["local", "global"] * 500)
    text = re.sub(
        r"  layers:\n(    .*\n)+",
        f"  layers: [{names}]\n",
        (ROOT / "examples/specs/sliding.yaml").read_text(),
    )
    started = time.process_time()
    file = loads(text)
    assert time.process_time() - started < 1
    assert len(plan(file.spec.model).layers) == 1000


def test_a_file_of_the_catalogue_is_in_the_catalogue() -> None:
    for folder, catalogue in (("mixers", MIXERS), ("channel", CHANNELS)):
        files = {path.stem for path in (ROOT / "heddle/specs" / folder).glob("*.py")} - {"__init__"}
        assert files == set(catalogue)
        for kind, one in catalogue.items():
            assert one.__module__ == f"heddle.specs.{folder}.{kind}"


def test_the_legend_of_letters_is_one_line_each() -> None:
    assert {"B", "T", "D", "N", "H", "HV", "K", "V"} <= set(DIMS)
    assert all("\n" not in meaning and meaning for meaning in DIMS.values())
