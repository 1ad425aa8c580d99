"""YAML and JSON are read alike, safely, and every value keeps its place."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from heddle.errors import HeddleError, HeddleErrors
from heddle.specs.reader import MAX_BYTES, MAX_DEPTH, MAX_NODES, parse, read
from heddle.specs.yaml_events import events


def refused(text: str) -> HeddleError:
    try:
        errors = parse(text, file="a.yaml").errors
    except HeddleErrors as told:
        return told
    assert errors
    return HeddleErrors(errors)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1.5E4", 15000.0),
        (".5", 0.5),
        ("7.", 7.0),
        ("-3", -3),
        ("+3", 3),
        ("0o17", 15),
        ("0xff", 255),
        ("010", 10),
        ("1_000_000", 1_000_000),
        ("true", True),
        ("yes", "yes"),
        ("null", None),
        ("~", None),
        ("", None),
        ("'1'", "1"),
        ('"true"', "true"),
        ("400k", "400k"),
        ("2001-01-01", "2001-01-01"),
        ("1:30", "1:30"),
        ("a b", "a b"),
        (r'"\ud83d\ude00"', "😀"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    read_value = parse(f"a: {text}").data["a"]
    assert read_value == value
    assert type(read_value) is type(value)


def test_json_is_read_with_tabs_and_without() -> None:
    data = {"a": [1, 2.5, None, True, "x\ty"], "b": {"c": 'é"/\\'}}
    for text in (
        json.dumps(data),
        json.dumps(data, indent="\t"),
        json.dumps(data, indent=2, ensure_ascii=False),
    ):
        assert parse(text).data == data


def test_every_key_and_value_keeps_its_place() -> None:
    document = parse("a:\n  - 1\n  - {b: 2}\n")
    assert (document.where(("a", 1, "b")).line, document.where(("a", 1, "b")).column) == (3, 9)
    assert document.where(("a", 1, "b"), key=True).column == 6
    assert document.where(("a", 1, "b")).text == "  - {b: 2}"


def test_what_is_missing_stands_where_its_surroundings_do() -> None:
    document = parse("a:\n  b: {c: 1}\n")
    assert (document.where(("a", "b", "d", 3)).line, document.where(("a", "b", "d", 3)).column) == (2, 3)
    assert document.where(("a", "b", "d")).path == "a.b.d"


SYNTAX = {
    "a: [1": "a.yaml:1:6: expected ',' or ']', but got the end of the file   [syntax]",
    "a: b: c": "a.yaml:1:5: a second ':' is not allowed here   [syntax]",
    "a:\n\t- 1": "a.yaml:2:1: a tab cannot indent YAML   [syntax]",
    "a: @x": "a.yaml:1:4: a value cannot begin with '@'   [syntax]",
    'a: "b': "a.yaml:1:6: the quote is never closed   [syntax]",
    "a:\n  - b\n c: 1": "a.yaml:3:2: this line is not indented as the ones before it   [syntax]",
    "{a: 1}}": "a.yaml:1:7: } follows where the spec has ended   [syntax]",
    "a: 1\n---\nb: 2": "a.yaml:2:1: a second document; a spec is one   [syntax]",
    "? [1]\n: 2": "a.yaml:1:3: a key must be a plain name   [syntax]",
    'a: "\x01"': "a.yaml:1:5: the character U+0001 is not allowed   [syntax]",
    'a: "\\x01"': "a.yaml:1:4: a: the character U+0001 is not allowed in a text   [syntax]",
}


@pytest.mark.parametrize("text", SYNTAX)
def test_broken_syntax_is_told_at_its_place(text: str) -> None:
    assert str(refused(text)).splitlines()[0] == SYNTAX[text]


def test_duplicate_keys_and_impossible_numbers_are_told_together() -> None:
    told = refused("a: 1\nb: .inf\na: 2\nc: 123456789012345678901\nd: -.INF\ne: .nan\nf: 1e999\n")
    assert [str(error).splitlines()[0] for error in told.errors] == [
        "a.yaml:2:4: b: .inf is not a finite number   [out-of-range]",
        "a.yaml:3:1: a: 'a' stands here twice, first in line 1   [duplicate-key]",
        "a.yaml:4:4: c: a number of 21 digits   [out-of-range]",
        "a.yaml:5:4: d: -.INF is not a finite number   [out-of-range]",
        "a.yaml:6:4: e: .nan is not a finite number   [out-of-range]",
        "a.yaml:7:4: f: 1e999 is not a finite number   [out-of-range]",
    ]


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [*{before}, *{before}, *{before}, *{before}, *{before}, *{before}, *{before}, *{before}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
UNSAFE = {
    "alias bomb": (BOMB, "tag-not-allowed"),
    "alias": ("a: *b", "tag-not-allowed"),
    "python object": ("a: !!python/object/apply:os.system [ls]", "tag-not-allowed"),
    "own tag": ("a: !x 1", "tag-not-allowed"),
    "tag on a mapping": ("!!map {a: 1}", "tag-not-allowed"),
    "flow depth": ("[" * 5_000, "too-deep"),
    "closed flow depth": ("[" * 500 + "]" * 500, "too-deep"),
    "block depth": ("".join(f"{' ' * depth}a:\n" for depth in range(400)), "too-deep"),
    "sequence depth": ("- " * 1_000 + "1", "too-deep"),
    "many values": ("[" + "1," * (MAX_NODES + 10) + "1]", "file-too-large"),
    "many bytes": ("# " + "x" * MAX_BYTES, "file-too-large"),
    "10 MB": ("a: 1\n" * 2_000_000, "file-too-large"),
}


@pytest.mark.parametrize("case", UNSAFE)
def test_what_could_do_harm_is_refused_at_once(case: str) -> None:
    text, code = UNSAFE[case]
    started = time.process_time()
    told = refused(text)
    assert time.process_time() - started < 2
    assert told.code == code
    assert told.where.file == "a.yaml"


def test_the_largest_allowed_depth_is_read() -> None:
    data = parse("[" * MAX_DEPTH + "]" * MAX_DEPTH).data
    for _ in range(MAX_DEPTH - 1):
        (data,) = data
    assert data == []


@pytest.mark.parametrize(
    "text",
    [
        "a: " + "x " * 120_000,
        "\n" * 260_000,
        "a: |\n" + " x\n" * 80_000,
        '"' + "x\\\n" * 80_000 + '"',
        "{" + "a" * 250_000,
    ],
)
def test_the_worst_text_of_the_largest_size_is_done_with_in_time(text: str) -> None:
    started = time.process_time()
    with suppress(HeddleErrors):
        parse(text)
    assert time.process_time() - started < 3


def test_characters_that_turn_a_line_around_do_not_reach_the_terminal() -> None:
    told = str(refused("a: \u202e1\nb\u200b: .inf\n"))
    assert "\u202e" not in told
    assert "\u200b" not in told
    assert "b\N{REPLACEMENT CHARACTER}" in told


def test_long_lines_are_shown_cut_and_the_caret_stays_right() -> None:
    shown = str(refused("a: .inf # " + "x" * 500)).splitlines()
    assert shown[1].endswith(" …")
    assert shown[2].index("^") == shown[1].index(".inf")
    # Behind the cut no caret would be right.
    assert len(str(refused(f"b: [{'1, ' * 100}.inf]")).splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "code", "what"),
    [
        (None, "file-not-found", "no such file"),
        (b"a: \xff", "file-not-readable", "not UTF-8 text: byte 4 is 0xff"),
        (b"x" * 10_000_000, "file-too-large", "more than 262,144 bytes"),
    ],
)
def test_a_file_that_cannot_be_read_is_told_by_name(
    tmp_path: Path, content: bytes | None, code: str, what: str
) -> None:
    path = tmp_path / "a.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(HeddleErrors) as told:
        read(path)
    assert (told.value.code, told.value.what, told.value.where.file) == (code, what, str(path))


def test_a_folder_and_an_endless_file_are_refused(tmp_path: Path) -> None:
    for path, code in ((tmp_path, "file-not-readable"), (Path("/dev/zero"), "file-too-large")):
        with pytest.raises(HeddleErrors) as told:
            read(path)
        assert told.value.code == code


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes("\ufeffversion: 1\n".encode())
    assert read(path).data == {"version": 1}


def told_by(events: Iterator[Any]) -> list[tuple[Any, ...]]:
    """Kinds, texts and places of events, and of the error that ends them."""
    found: list[tuple[Any, ...]] = []
    try:
        for one in events:
            written = [
                getattr(one, name, None) for name in ("value", "anchor", "tag", "implicit", "flow_style")
            ]
            places = [(mark.line, mark.column) for mark in (one.start_mark, one.end_mark)]
            found.append((type(one).__name__, *map(str, written), *places))
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        found.append(
            (type(error).__name__, mark and (mark.line, mark.column), getattr(error, "problem", None))
        )
    return found


def test_fast_events_are_those_of_ruamel(
    broken_spec: Callable[[random.Random], str], random_seed: int
) -> None:
    for number in range(150):
        text = broken_spec(random.Random(f"{random_seed}-{number}"))
        plain = YAML(typ="safe", pure=True).parse(text)
        assert told_by(events(text)) == told_by(plain), f"seed {random_seed}, case {number} for\n{text}"
