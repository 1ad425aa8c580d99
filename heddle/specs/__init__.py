"""WHAT: specs as pure data. Imports no torch, so that editors, drivers and dashboards start at once."""

from __future__ import annotations

from heddle.specs.canonical import canonical, spec_hash, to_yaml
from heddle.specs.diff import Difference, differences
from heddle.specs.layer import Repeat, Site
from heddle.specs.load import SpecFile, load, loads
from heddle.specs.model import CHANNELS, MIXERS, BlockSpec, ModelSpec
from heddle.specs.parameter import Parameter
from heddle.specs.pattern import expand_layers, uniform_layers
from heddle.specs.recipe import DataSpec, TrainSpec
from heddle.specs.schema import json_schema
from heddle.specs.search import Budget, PerDevice, SearchSpec
from heddle.specs.space import Placement, Space
from heddle.specs.spec import Spec
from heddle.specs.tasks import TASKS, MaskedBytesTask, MqarTask, TaskSchema, TaskSpec, TextTask

__all__ = [
    "CHANNELS",
    "MIXERS",
    "TASKS",
    "BlockSpec",
    "Budget",
    "DataSpec",
    "Difference",
    "MaskedBytesTask",
    "ModelSpec",
    "MqarTask",
    "Parameter",
    "PerDevice",
    "Placement",
    "Repeat",
    "SearchSpec",
    "Site",
    "Space",
    "Spec",
    "SpecFile",
    "TaskSchema",
    "TaskSpec",
    "TextTask",
    "TrainSpec",
    "canonical",
    "differences",
    "expand_layers",
    "json_schema",
    "load",
    "loads",
    "spec_hash",
    "to_yaml",
    "uniform_layers",
]
