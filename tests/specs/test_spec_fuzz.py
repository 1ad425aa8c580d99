"""Broken specs, by the thousand: each is a legal model or a located error, and never takes long."""

from __future__ import annotations

import copy
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from heddle.compose.plan import plan
from heddle.errors import HeddleErrors
from heddle.specs import SpecFile, loads, spec_hash, to_yaml
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


def graft(text: str, rng: random.Random) -> str:
    """A few values replaced, moved, removed or renamed; written as JSON."""
    data = parse(text).data
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


def use(file: SpecFile, rng: random.Random) -> None:
    """What is done with a spec that was taken: it is planned, resolved, written and read again."""
    plan(file.spec.model, file.where)
    space = file.space
    space.size()
    values = {
        one.name: rng.choice(one.values()[:1000]) if one.kind != "float" else one.high
        for one in space.parameters
    }
    try:
        spec = file.resolve(values)
    except HeddleErrors as told:
        # A setting may be illegal; then it is told where.
        located(told)
        return
    plan(spec.model, lambda path: file.where(path, values))
    assert spec_hash(loads(to_yaml(spec)).spec.model) == spec_hash(spec.model)


def located(told: HeddleErrors) -> None:
    assert told.errors
    for error in told.errors:
        assert error.where.line is not None
        assert error.where.column is not None
        assert error.where.line >= 1
        assert error.where.column >= 1
        assert error.what
        assert "pydantic" not in str(error).lower()
        assert all(one.isprintable() or one == "\n" for one in str(error))


def test_broken_specs_are_legal_models_or_located_errors(random_seed: int, full_counts: bool) -> None:
    outcomes: Counter[str] = Counter()
    for number in range(20_000 if full_counts else 1_000):
        rng = random.Random(f"{random_seed}-{number}")
        text = rng.choice(MUTATIONS)(rng.choice(SEEDS), rng)
        started = time.process_time()
        try:
            file = loads(text)
        except HeddleErrors as told:
            located(told)
            outcomes[told.code] += 1
        except Exception as error:
            raise AssertionError(f"seed {random_seed}, case {number}: {error!r} for\n{text}") from error
        else:
            outcomes["legal"] += 1
            use(file, rng)
        took = time.process_time() - started
        assert took < 2, f"seed {random_seed}, case {number} took {took:.1f} s:\n{text}"
    # The mutations reach both sides, and much of the language.
    assert outcomes["legal"] > 20
    assert {"syntax", "unknown-field", "missing-field", "wrong-type", "out-of-range", "unknown-kind"} <= set(
        outcomes
    )
