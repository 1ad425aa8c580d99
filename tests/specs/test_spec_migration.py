"""Older versions of the language: two that never were, registered here, lead to today's and keep every place."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from heddle.errors import HeddleErrors
from heddle.specs import SpecFile, loads, spec_hash
from heddle.specs.migrate import MIGRATIONS, Rewrite
from heddle.specs.spec import VERSION

TODAY = """\
version: 1
name: old
model:
  vocab_size: 256
  hidden_size: {choice: [64, 128]}
  blocks:
    full:
      mixer: {kind: attention, heads: {choice: [2, 4]}, rope: {theta: 500.0}}
      channel: {kind: swiglu}
  layers: [{repeat: 2, pattern: [full]}]
"""
# In version 0 the width was called `width`, the base of RoPE stood alone, and models had a field that meant nothing; in
# version -1 blocks were called `parts`.
ZERO = """\
version: 0
name: old
model:
  vocab_size: 256
  width: {choice: [64, 128]}
  style: plain
  blocks:
    full:
      mixer: {kind: attention, heads: {choice: [2, 4]}, rope: 500.0}
      channel: {kind: swiglu}
  layers: [{repeat: 2, pattern: [full]}]
"""
OLDEST = ZERO.replace("version: 0", "version: -1").replace("blocks:", "parts:")


def from_zero(rewrite: Rewrite) -> None:
    rewrite.rename(("model", "width"), "hidden_size")
    rewrite.remove(("model", "style"))
    for path in rewrite.paths():
        if path[-1:] == ("rope",) and isinstance(rewrite.at(path), float):
            rewrite.wrap(path, "theta")
        if path[-1:] == ("kind",) and rewrite.at(path) == "softmax":
            rewrite.put(path, "attention")


def from_oldest(rewrite: Rewrite) -> None:
    rewrite.rename(("model", "parts"), "blocks")


@pytest.fixture(autouse=True)
def _older_versions(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(MIGRATIONS, 0, from_zero)
    monkeypatch.setitem(MIGRATIONS, -1, from_oldest)
    return


def test_no_version_was_released_before_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert VERSION == 1
    assert MIGRATIONS == {}


@pytest.mark.parametrize("text", [ZERO, OLDEST], ids=["one version", "two versions"])
def test_an_older_file_is_the_same_model_with_the_same_space(text: str) -> None:
    today, old = loads(TODAY), loads(text)
    assert old.spec == today.spec
    assert old.space == today.space
    assert spec_hash(old.spec.model) == spec_hash(today.spec.model)
    values = {"hidden_size": 128, "blocks.full.mixer.heads": 4}
    assert old.resolve(values) == today.resolve(values)


def place(file: SpecFile, path: str) -> tuple[int | None, int | None]:
    where = file.where(path)
    return where.line, where.column


@pytest.mark.parametrize("text", [ZERO, OLDEST], ids=["one version", "two versions"])
def test_every_place_is_that_in_the_older_file(text: str) -> None:
    file = loads(text)
    assert place(file, "hidden_size") == (5, 20)
    assert place(file, "layers.1.mixer.heads") == (9, 49)
    assert place(file, "layers.1.mixer.rope.theta") == (9, 63)
    assert place(file, "blocks.full.channel.kind") == (10, 23)
    assert file.where("layers.0").text == "  layers: [{repeat: 2, pattern: [full]}]"


# A mistake in the older file, and where it is told.
MISTAKES = [
    (
        "width: {choice: [64, 128]}",
        "width: 63",
        "a.yaml:9:49: blocks.full.mixer.heads.choice.0: 2 does not divide hidden_size 63",
    ),
    (
        "width: {choice: [64, 128]}",
        "width: '64'",
        "a.yaml:5:10: hidden_size: expected a whole number, got '64'",
    ),
    (
        "width: {choice: [64, 128]}",
        "width: {choice: [64, 64]}",
        "a.yaml:5:24: hidden_size.choice.1: option 2 repeats option 1",
    ),
    ("rope: 500.0", "rope: -1.0", "a.yaml:9:63: blocks.full.mixer.rope.theta: -1.0 is not above 1"),
    ("rope: 500.0", "ropes: 500.0", "a.yaml:9:57: blocks.full.mixer.ropes: there is no field 'ropes' here"),
    (
        "kind: swiglu",
        "kind: swigl",
        "a.yaml:10:23: blocks.full.channel.kind: there is no channel kind 'swigl'",
    ),
    ("[full]", "[ful]", "a.yaml:11:34: layers.0.pattern.0: there is no block 'ful'"),
    ("name: old", "name: old\nname: older", "a.yaml:3:1: name: 'name' stands here twice, first in line 2"),
]


@pytest.mark.parametrize(("old", "new", "expected"), MISTAKES, ids=[new for _, new, _ in MISTAKES])
def test_a_mistake_of_an_older_file_is_told_where_it_stands_in_it(old: str, new: str, expected: str) -> None:
    for text in (ZERO, OLDEST):
        assert old in text
        with pytest.raises(HeddleErrors) as errors:
            loads(text.replace(old, new), file="a.yaml")
        told = [str(error).partition("   [")[0] for error in errors.value.errors]
        assert expected in told
        assert all(error.where.line is not None for error in errors.value.errors)


def test_a_value_that_a_migration_puts_in_is_told_at_the_one_it_replaced() -> None:
    file = loads(ZERO.replace("kind: attention", "kind: softmax"), file="a.yaml")
    assert file.spec == loads(TODAY).spec
    assert place(file, "blocks.full.mixer.kind") == (9, 21)


def test_a_version_that_no_chain_leads_from_is_refused_with_those_that_are_read() -> None:
    for version in (-2, 2, 7):
        with pytest.raises(HeddleErrors) as errors:
            loads(TODAY.replace("version: 1", f"version: {version}"))
        (error,) = errors.value.errors
        assert error.code == "version-not-supported"
        assert error.what.endswith("this heddle reads version -1, 0, 1")
        assert ("newer" in error.what) == (version > 1)


def test_a_migration_leaves_what_it_does_not_find() -> None:
    rewrite = Rewrite({"a": [{"b": 1}], "c": 2}, {(): (), ("a",): ("a",), ("a", 0): ("a", 0), ("c",): ("c",)})
    rewrite.rename(("x",), "y")
    rewrite.rename(("a",), "c")
    rewrite.wrap(("a", 0, "x"), "y")
    rewrite.remove(("a", 5))
    rewrite.put(("a", 0), 3)
    assert rewrite.data == {"a": [{"b": 1}], "c": 2}
    assert rewrite.at(("a", 0, "b")) == 1
    assert rewrite.at(("a", 1, "b")) is None
