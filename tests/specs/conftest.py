"""What tests of specs share."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from heddle.specs import Space
from heddle.specs.reader import parse

ROOT = Path(__file__).parents[2]
SEEDS = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "examples").rglob("*.yaml"))]
SEEDS.append((ROOT / "heddle/starter.yaml").read_text(encoding="utf-8"))
SPACE = """\
version: 1
name: fuzz
model:
  vocab_size: {choice: [256, 512]}
  hidden_size: {int: [32, 64], step: 32}
  norm_eps: {float: [1.0e-6, 1.0e-5], log: true}
  blocks:
    a:
      mixer:
        choice:
          - {kind: attention, heads: {choice: [2, 4]}, window: {int: [4, 64]}, rope: {theta: 1e4, fraction: 0.5}}
          - {kind: gated_deltanet, heads: 2, value_heads: 4}
      channel: {kind: {choice: [swiglu, gelu]}}
    b: {mixer: {kind: decay_attention, heads: 2, form: {choice: [lightning, retnet]}}, channel: {kind: none}}
  layers: {placement: {length: 5, of: [a, b], count: {b: {int: [0, 3]}}}}
search: {tasks: [text, mqar: {pairs: 2}], budgets: [prefill_ms: {at_most: 1, context: {cpu: 1, cuda: 2}}]}
"""
SEEDS.append(SPACE)

PIECES = [
    *"{}[]:,-#&*!|>'\"%@`?~ \t\n",
    *(
        "null",
        "true",
        "1e999",
        "-1",
        "0",
        "0.5",
        "99999999999999999999",
        ".nan",
        "''",
        "a",
        "é",
        "\u202e",
        "\u200b",
        "\x00",
    ),
    *(
        "{choice: [",
        "]}",
        "{int: [1, 2]}",
        "{float: [0, 1]}",
        "choice:",
        "int:",
        "placement:",
        "repeat: 3",
        "pattern: [a]",
    ),
    *(
        "kind:",
        "attention",
        "mixer:",
        "version: 1",
        "version: 2",
        "<<: *a",
        "&a",
        "*a",
        "!!python/name:os.system",
        "---",
        "...",
    ),
    *(
        "{" * 70,
        "- " * 70,
        "1" * 400,
        "all-b",
        "all-",
        "bytes",
        "4096",
        "1048576",
        "10M",
        "5m",
        "\ud800",
        "\ufeff",
        "\r",
        "\x85",
    ),
]
VALUES: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2,
        3,
        7,
        10**6,
        10**18,
        0.0,
        0.5,
        1e308,
        "",
        "a",
        "b",
        "none",
        "attention",
        "é\u202e",
        "x" * 500,
    ),
    *(
        [],
        {},
        [[]],
        [None],
        {"": 1},
        {"kind": "attention"},
        {"kind": None},
        {"kind": []},
        {"choice": []},
        {"choice": [1, "a"]},
    ),
    *(
        {"choice": [{"choice": [2]}]},
        {"int": [1, 4]},
        {"int": [4, 1]},
        {"int": [0, 10**15]},
        {"int": 3},
        {"float": [0, 1]},
    ),
    *(
        {"float": [1, 2], "log": True},
        {"repeat": 2, "pattern": ["a", "b"]},
        {"repeat": 4096, "pattern": ["b"]},
    ),
    *(
        {"placement": {"length": 4, "of": ["a", "b"]}},
        {"placement": None},
        ["a", "b"],
        ["b"] * 50,
        {"mqar": None},
    ),
]


def slip(text: str, rng: random.Random) -> str:
    """A few characters or lines changed."""
    for _ in range(rng.choice([1, 1, 1, 2, 3, 6])):
        at, lines = rng.randrange(len(text) + 1), text.split("\n")
        row = rng.randrange(len(lines))
        kind = rng.randrange(7)
        if kind == 0:
            text = text[:at] + text[at + rng.choice([1, 1, 2, 5, 20, 100]) :]
        elif kind == 1:
            text = text[:at] + rng.choice(PIECES) + text[at:]
        elif kind == 2:
            lines[row] = " " * rng.randrange(9) + lines[row].lstrip()
        elif kind == 3:
            lines.insert(rng.randrange(len(lines)), lines[row])
        elif kind == 4:
            del lines[row]
        elif kind == 5:
            words = lines[row].split(" ")
            words[rng.randrange(len(words))] = rng.choice(PIECES)
            lines[row] = " ".join(words)
        else:
            text = text[:at]
        if kind in (2, 3, 4, 5):
            text = "\n".join(lines)
    return text


def parts(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path, *(found for key, value in items for found in parts(value, (*path, key)))]


@cache
def data_of(text: str) -> Any:
    return parse(text).data


def graft(text: str, rng: random.Random) -> str:
    """A few values replaced, moved, removed or renamed; written as JSON."""
    data = copy.deepcopy(data_of(text))
    for _ in range(rng.choice([1, 1, 2, 4])):
        path = rng.choice(parts(data)[1:] or [()])
        if not path:
            return json.dumps(rng.choice(VALUES))
        *steps, last = path
        owner = data
        for step in steps:
            owner = owner[step]
        kind = rng.randrange(5)
        if kind == 0:
            del owner[last]
        elif kind == 1 and isinstance(owner, dict):
            owner[rng.choice([last + "s", last[:-1], last.upper(), "kind", "choice", "int", "x"])] = (
                owner.pop(last)
            )
        elif kind == 2:
            other = data
            for step in rng.choice(parts(data)):
                other = other[step]
            owner[last] = json.loads(json.dumps(other))
        elif kind == 3:
            owner[last] = {"choice": [owner[last], copy.deepcopy(rng.choice(VALUES))]}
        else:
            owner[last] = copy.deepcopy(rng.choice(VALUES))
    return json.dumps(data)


MUTATIONS: list[Callable[[str, random.Random], str]] = [slip, graft]


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


@pytest.fixture(scope="session")
def broken_spec() -> Callable[[random.Random], str]:
    """A spec with a few slips in its text or its data, drawn from the examples and the page of the language."""
    return lambda rng: rng.choice(MUTATIONS)(rng.choice(SEEDS), rng)
