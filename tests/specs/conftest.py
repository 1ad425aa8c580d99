"""What tests of specs share."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product

import pytest

from heddle.specs import Space


def _every_setting(space: Space) -> list[dict[str, object]]:
    found: dict[str, dict[str, object]] = {}
    for values in product(*(one.values() for one in space.parameters)):
        setting = dict(zip((one.name for one in space.parameters), values, strict=True))
        active = {one.name: setting[one.name] for one in space.active(setting)}
        found[json.dumps(active, sort_keys=True)] = active
    return list(found.values())


@pytest.fixture
def every_setting() -> Callable[[Space], list[dict[str, object]]]:
    """All settings of a space without floats, listed, each with what is open there alone: the slow way to count them."""
    return _every_setting
