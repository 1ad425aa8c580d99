"""Broken specs, by the thousand: each is a legal model or a located error, and never takes long."""

from __future__ import annotations

import json
import random
import resource
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from heddle.compose.plan import plan
from heddle.errors import HeddleError, HeddleErrors
from heddle.specs import SpecFile, loads, spec_hash, to_yaml

SECONDS, KIBIBYTES = 2, 1 << 20
# So many parts, so that workers can share them.
PARTS = 8
Broken = Callable[[random.Random], str]


def use(file: SpecFile, rng: random.Random) -> None:
    """What is done with a spec that was taken: it is planned, resolved, written and read again."""
    planned(file, {})
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
    planned(file, values)
    assert spec_hash(loads(to_yaml(spec)).spec.model) == spec_hash(spec.model)


def planned(file: SpecFile, values: dict[str, object]) -> None:
    """A plan, or a located error."""
    try:
        plan(file.resolve(values).model, lambda path: file.where(path, values))
    except HeddleError as told:
        located(told)


def located(told: HeddleError) -> None:
    assert told.errors
    for error in told.errors:
        assert error.where.line is not None
        assert error.where.column is not None
        assert error.where.line >= 1
        assert error.where.column >= 1
        assert error.what
        assert "pydantic" not in str(error).lower()
        assert " object at 0x" not in str(error)
        assert all(one.isprintable() or one == "\n" for one in str(error))


def check(text: str, rng: random.Random) -> str:
    """What becomes of a text: "legal", or the code of its first error."""
    started, held = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        file = loads(text)
    except HeddleErrors as told:
        located(told)
        outcome = told.code
    else:
        outcome = "legal"
        use(file, rng)
    assert time.process_time() - started < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held < KIBIBYTES
    return outcome


@pytest.mark.parametrize("part", range(PARTS))
def test_broken_specs_are_legal_models_or_located_errors(
    part: int, broken_spec: Broken, random_seed: int, full_counts: bool
) -> None:
    outcomes: Counter[str] = Counter()
    for number in range(part, 20_000 if full_counts else 1_000, PARTS):
        rng = random.Random(f"{random_seed}-{number}")
        text = broken_spec(rng)
        try:
            outcomes[check(text, rng)] += 1
        except Exception as error:
            raise AssertionError(f"seed {random_seed}, case {number}: {error!r} for\n{text}") from error
    # The mutations reach both sides, and much of the language.
    assert outcomes["legal"] > 3
    assert {"syntax", "unknown-field", "missing-field", "wrong-type"} <= set(outcomes)


def model(**changes: Any) -> dict[str, Any]:
    full = {"mixer": {"kind": "attention", "heads": 4}, "channel": {"kind": "swiglu"}}
    inner = {"vocab_size": 256, "hidden_size": 64, "blocks": {"full": full}, "layers": ["full"], **changes}
    return {"version": 1, "name": "hostile", "model": inner}


def nested(depth: int, kind: str = "parallel") -> dict[str, Any]:
    mixer: dict[str, Any] = {"kind": "attention", "heads": 4}
    for _ in range(depth):
        mixer = {"kind": kind, "mixers": [{"kind": "attention", "heads": 4}, mixer]}
    return {"full": {"mixer": mixer, "channel": {"kind": "none"}}}


def choices(depth: int) -> Any:
    value: Any = 64
    for _ in range(depth):
        value = {"choice": [value]}
    return value


NAMES = [
    "a\u200b",
    "\u202eab",
    "a\u0301",
    "\u0430bc",
    "ａ",
    "a b",
    "",
    "a" * 65,
    "1a",
    "a.b",
    "a\nb",
    "\ud83d\ude00",
]
HOSTILE: dict[str, tuple[Any, str]] = {
    "10,000 layers by name": (model(layers=["full"] * 10_000), "out-of-range"),
    "10,000 layers by repeats": (model(layers=[{"repeat": 2000, "pattern": ["full"] * 5}]), "out-of-range"),
    "10,000 layers of their own": (model(layers=[{"block": "full"}] * 10_000), "file-too-large"),
    "a repeat of a huge integer": (model(layers=[{"repeat": 10**18, "pattern": ["full"]}]), "out-of-range"),
    "a huge placement": (model(layers={"placement": {"length": 10**18, "of": ["full"]}}), "bad-placement"),
    "a huge width": (model(hidden_size=10**18), "out-of-range"),
    "a huge range": (model(hidden_size={"int": [1, 10**18]}), "bad-space"),
    "a huge range of a count": (
        model(
            blocks={name: nested(0)["full"] for name in "ab"},
            layers={"placement": {"length": 4, "of": ["a", "b"], "count": {"a": {"int": [0, 10**15]}}}},
        ),
        "bad-placement",
    ),
    "open overrides of blocks that are not there": (
        model(blocks={}, layers=[{"block": "a", "override": {"choice": [{"norm": "rmsnorm"}, {"norm": 1}]}}]),
        "wrong-type",
    ),
    "a kind that is a mapping with an impossible number": (
        model(blocks={"full": {"mixer": {"kind": {"a": {"float": 3}}}, "channel": {"kind": "none"}}}),
        "wrong-type",
    ),
    "a width that is open inside an option": (
        model(hidden_size={"choice": [{"int": [32, 64], "step": 32}, 0]}),
        "out-of-range",
    ),
    "mixers nested 20 deep": (model(blocks=nested(20)), "too-deep"),
    "mixers nested 20 deep, in a row": (model(blocks=nested(20, "sequential")), "too-deep"),
    "choices nested 15 deep": (model(hidden_size=choices(15)), "legal"),
    "choices nested 40 deep": (model(hidden_size=choices(40)), "too-deep"),
    "three hundred blocks": (model(blocks={f"b{n}": nested(0)["full"] for n in range(300)}), "out-of-range"),
    "five hundred open values": (
        model(layers=[{"choice": ["full"]} for _ in range(500)]),
        "bad-space",
    ),
    **{
        f"block named {name!a}": (model(blocks={name: nested(0)["full"]}, layers=[name]), "out-of-range")
        for name in NAMES
    },
    **{
        f"layer named {name!a}": (model(layers=[{"block": "full", "name": name}]), "out-of-range")
        for name in NAMES
    },
    **{
        f"spec named {name!a}": ({**model(), "name": name}, "out-of-range")
        for name in NAMES
        if name not in ("1a", "a.b")
    },
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_spec_is_refused_at_its_place_and_at_once(case: str) -> None:
    data, code = HOSTILE[case]
    assert check(json.dumps(data), random.Random(0)) == code


HOSTILE_TEXTS = {
    "an alias bomb": ("a: &a [x, x]\nb: [*a, *a]\n", "tag-not-allowed"),
    "a merge of an alias": ("version: 1\nmodel: {<<: *a}\n", "tag-not-allowed"),
    "10 MB": ("version: 1\n" + "# x\n" * 2_500_000, "file-too-large"),
    "a list of 25,000 numbers": ("version: 1\nmodel: [" + "1, " * 25_000 + "]\n", "file-too-large"),
    "a list of 23,000 numbers": ("version: 1\nmodel: [" + "1, " * 23_000 + "]\n", "missing-field"),
    "lists in lists, 60 deep": (
        "version: 1\nmodel: [" + ("[" * 60 + "]" * 60 + ",") * 190 + "]\n",
        "missing-field",
    ),
    "not a number": ("version: 1\nname: a\nmodel: {hidden_size: .nan}\n", "missing-field"),
    "a huge integer": ("version: 1\nname: a\nmodel: {hidden_size: " + "9" * 4000 + "}\n", "missing-field"),
    "brackets": ("version: 1\nmodel: " + "[" * 10_000, "too-deep"),
}


def test_a_thousand_layers_with_an_override_each_are_taken() -> None:
    layers = [
        {"block": "full", "name": f"l{n}", "override": {"mixer": {"window": n + 2}, "norm": "layernorm"}}
        for n in range(1000)
    ]
    started, held = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    planned(loads(json.dumps(model(layers=layers))), {})
    assert time.process_time() - started < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held < KIBIBYTES


@pytest.mark.parametrize("case", HOSTILE_TEXTS)
def test_a_hostile_text_is_refused_at_its_place_and_at_once(case: str) -> None:
    text, code = HOSTILE_TEXTS[case]
    assert check(text, random.Random(0)) == code
