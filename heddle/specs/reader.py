"""YAML and JSON into plain data that remembers where every value stood.

Safe by construction: no tags, no aliases, no duplicate keys, bounded size, depth and count.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.events import (
    AliasEvent,
    CollectionEndEvent,
    CollectionStartEvent,
    DocumentStartEvent,
    MappingStartEvent,
    ScalarEvent,
)
from ruamel.yaml.reader import ReaderError

from heddle.errors import HeddleError, HeddleErrors, Where
from heddle.specs.yaml_events import events

# The scanner reads some 20,000 values a second or more, and a layer with an override of its own is a dozen: these take
# a thousand such layers, and keep the worst file under two seconds.
MAX_BYTES = 262_144
MAX_DEPTH = 64
MAX_NODES = 24_000
# Nobody reads more; the first ones are kept.
MAX_ERRORS = 100
# A whole number of 19 digits still fits into 64 bits.
MAX_DIGITS = 19
SHOWN_COLUMNS = 160

# A place in the data: keys and list indices, outermost first.
Path_ = tuple[str | int, ...]
# 1-based line and column.
Mark = tuple[int, int]


class Hole:
    """Stands where a value is missing because of an error that is told already; nothing more is said about it."""


HOLE = Hole()


@dataclass(frozen=True)
class Source:
    """A text and its name."""

    text: str
    file: str

    @cached_property
    def lines(self) -> list[str]:
        # The line breaks of YAML; str.splitlines knows more of them.
        return re.split("\r\n|[\n\r\x85\u2028\u2029]", self.text)

    def mark_of(self, position: int) -> Mark:
        """Line and column of the character at `position`."""
        return self.text.count("\n", 0, position) + 1, position - self.text.rfind("\n", 0, position)

    def where(self, mark: Mark, path: Path_ = ()) -> Where:
        line, column = mark
        return Where(dotted(path), self.file, line, column, self._shown(line, column))

    def _shown(self, line: int, column: int) -> str | None:
        if not 0 < line <= len(self.lines):
            return None
        shown = self.lines[line - 1]
        if len(shown) <= SHOWN_COLUMNS:
            return printable(shown)
        # The caret stands below `column`, so a long line can be cut only behind it.
        return None if column > SHOWN_COLUMNS else printable(shown[:SHOWN_COLUMNS]) + " …"


@dataclass(frozen=True, slots=True)
class Document:
    """Plain data, and the place of each key and value by path.

    `errors` are those of single keys and values, which hide none of the others: data has the first of two equal keys, and
    a hole for a value that is none.
    """

    data: Any
    source: Source
    keys: dict[Path_, Mark] = field(repr=False)
    values: dict[Path_, Mark] = field(repr=False)
    errors: tuple[HeddleError, ...] = ()

    def where(self, path: Path_, *, key: bool = False) -> Where:
        """The place of the value at `path` (of its key with `key`), or of the nearest thing around it."""
        known = path
        while known and known not in self.values:
            known = known[:-1]
        mark = self.keys.get(known) if key or known != path else None
        return self.source.where(mark or self.values.get(known) or (1, 1), path)


def dotted(path: Path_) -> str:
    """`blocks.full.mixer.heads`: the path as users write it, without the `model` it begins with."""
    shown = path[1:] if path[0:1] == ("model",) and len(path) > 1 else path
    return ".".join(printable(str(part)[:80]) for part in shown)


def steps_of(path: str) -> Path_:
    """The steps of a dotted path; those that are numbers lead into lists."""
    return tuple(int(step) if step.isdecimal() else step for step in path.split(".") if step)


def printable(text: str) -> str:
    """The text with each character that does not show, or that turns the line around, as one mark."""
    return "".join(
        one if one.isprintable() else " " if one == "\t" else "\N{REPLACEMENT CHARACTER}" for one in text
    )


def read(source: Path) -> Document:
    """The document in a file.

    Raises:
        HeddleErrors: file-not-found, file-not-readable, file-too-large, or what `parse` raises.
    """
    file = str(source)
    try:
        with source.open("rb") as stream:
            # Not by the size in the directory: a pipe has none.
            content = stream.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise _failure(
                "file-too-large", f"more than {MAX_BYTES:,} bytes", Where(file=file, line=1, column=1)
            )
        text = content.decode("utf-8")
    except FileNotFoundError:
        hint = "heddle init writes a starter spec"
        raise _failure("file-not-found", "no such file", Where(file=file), hint) from None
    except UnicodeDecodeError as error:
        what = f"not UTF-8 text: byte {error.start + 1:,} is {content[error.start]:#04x}"
        raise _failure("file-not-readable", what, Where(file=file)) from None
    except (OSError, ValueError) as error:
        what = getattr(error, "strerror", None) or str(error)
        raise _failure("file-not-readable", what, Where(file=file)) from None
    return parse(text, file=file)


def parse(text: str, *, file: str = "<string>") -> Document:
    """The document in a string of YAML 1.2 or JSON; duplicate-key, out-of-range and the like are among its `errors`.

    Raises:
        HeddleErrors: syntax, too-deep, tag-not-allowed, file-too-large.
    """
    if len(text) > MAX_BYTES:
        raise _failure(
            "file-too-large", f"more than {MAX_BYTES:,} characters", Where(file=file, line=1, column=1)
        )
    source = Source(text.removeprefix("\ufeff"), file)
    try:
        return _Builder(source).document()
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        raise _syntax(error.problem, source.where(place)) from None
    except ReaderError as error:
        what = f"the character {named(source.text[error.position])} is not allowed"
        raise _failure("syntax", what, source.where(source.mark_of(error.position))) from None
    except HeddleError:
        raise
    except Exception:
        # The scanner answers some broken escapes and directives with exceptions of Python's own.
        raise _failure("syntax", "not valid YAML", source.where((1, 1))) from None


def named(character: str) -> str:
    """`U+200B ZERO WIDTH SPACE`."""
    return f"U+{ord(character):04X} {unicodedata.name(character, '')}".rstrip()


def _failure(code: str, what: str, where: Where, hint: str | None = None) -> HeddleErrors:
    return HeddleErrors([HeddleError(code, what, where=where, hint=hint)])


# What the YAML scanner says, and how to say it to a person: words, and a hint.
_SAID: tuple[tuple[str, str, str | None], ...] = (
    (
        r"mapping values are not allowed here",
        "a second ':' is not allowed here",
        "put quotes around a text with ': ' in it",
    ),
    (r"found character '\\t' that cannot start any token", "a tab cannot indent YAML", "use spaces"),
    (
        r"found character (.+) that cannot start any token",
        r"a value cannot begin with \1",
        "put it in quotes",
    ),
    (r"found unexpected end of stream", "the quote is never closed", None),
    (r"could not find expected ':'", "there is no ':' after this key", None),
    (
        r"expected '?<document start>'?, but found .*<stream end>.*",
        "the file ends before the spec begins",
        None,
    ),
    (
        r"expected '?<document start>'?, but found \(?'(.+?)',?\)?",
        r"\1 follows where the spec has ended",
        None,
    ),
    (
        r"expected <block end>, but found .*",
        "this line is not indented as the ones before it",
        "align it with them",
    ),
    (r"found non-comment content after document end marker.*", "nothing may follow '...'", None),
)
_WORDS = {
    "<block end>": "the end of the block",
    "<block mapping start>": "a mapping",
    "<block sequence start>": "a list",
    "<scalar>": "a value",
    "<stream end>": "the end of the file",
}


def _syntax(problem: str | None, where: Where) -> HeddleErrors:
    told = problem or "not valid YAML"
    for pattern, what, hint in _SAID:
        if re.fullmatch(pattern, told):
            return _failure("syntax", re.sub(pattern, what, told), where, hint)
    for word, meaning in _WORDS.items():
        told = told.replace(f"'{word}'", meaning).replace(word, meaning)
    return _failure("syntax", told, where)


_NULL = {"", "~", "null", "Null", "NULL"}
_TRUE, _FALSE = {"true", "True", "TRUE"}, {"false", "False", "FALSE"}
_INT = re.compile(r"[-+]?[0-9]+(_[0-9]+)*|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(
    r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)


class _Builder:
    """Parser events into plain data; the errors of values and keys are collected."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.keys: dict[Path_, Mark] = {}
        self.values: dict[Path_, Mark] = {}
        self.errors: list[HeddleError] = []
        self.events = self._guarded()

    def document(self) -> Document:
        data, documents = None, 0
        for event in self.events:
            if isinstance(event, DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise _failure("syntax", "a second document; a spec is one", self._at(event))
            elif isinstance(event, (ScalarEvent, CollectionStartEvent)):
                data = self._value(event, ())
        return Document(data, self.source, self.keys, self.values, tuple(self.errors[:MAX_ERRORS]))

    def _guarded(self) -> Iterator[Any]:
        depth = 0
        for count, event in enumerate(events(self.source.text)):
            if count > MAX_NODES:
                raise _failure("file-too-large", f"more than {MAX_NODES:,} values", self._at(event))
            if isinstance(event, AliasEvent) or getattr(event, "anchor", None):
                what, hint = "anchors and aliases are not allowed", "give a block a name instead"
                raise _failure("tag-not-allowed", what, self._at(event), hint)
            if getattr(event, "tag", None):
                what = f"the tag {printable(str(event.tag))} is not allowed"
                raise _failure("tag-not-allowed", what, self._at(event), "remove it")
            depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise _failure("too-deep", f"nested deeper than {MAX_DEPTH} levels", self._at(event))
            yield event

    def _value(self, event: Any, path: Path_) -> Any:
        self.values[path] = _mark(event)
        if isinstance(event, MappingStartEvent):
            return self._mapping(path)
        if isinstance(event, CollectionStartEvent):
            return self._list(path)
        return self._scalar(event, path)

    def _list(self, path: Path_) -> list[Any]:
        made: list[Any] = []
        while not isinstance(event := next(self.events), CollectionEndEvent):
            made.append(self._value(event, (*path, len(made))))
        return made

    def _mapping(self, path: Path_) -> dict[str, Any]:
        made: dict[str, Any] = {}
        while not isinstance(event := next(self.events), CollectionEndEvent):
            if not isinstance(event, ScalarEvent):
                raise _failure("syntax", "a key must be a plain name", self._at(event, path))
            key = self._text(event, path)
            here = (*path, key)
            if key in made:
                first = self.keys[here][0]
                self._fail("duplicate-key", f"{key!r} stands here twice, first in line {first}", event, here)
                self._skip(next(self.events))
                continue
            self.keys[here] = _mark(event)
            made[key] = self._value(next(self.events), here)
            if made[key] is None and self.values[here][0] > self.keys[here][0]:
                # Nothing stands behind this key; the scanner is at the next one already.
                self.values[here] = self.keys[here]
        return made

    def _skip(self, event: Any) -> None:
        depth = int(isinstance(event, CollectionStartEvent))
        while depth:
            event = next(self.events)
            depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)

    def _scalar(self, event: Any, path: Path_) -> Any:
        text = str(event.value)
        # Only a plain scalar can be anything but text; `style` names the quotes of the others.
        if event.style is not None or len(text) > 400:
            return self._text(event, path)
        if text in _NULL:
            return None
        if text in _TRUE or text in _FALSE:
            return text in _TRUE
        if _INT.fullmatch(text):
            return self._int(text, event, path)
        if _FLOAT.fullmatch(text):
            number = float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
            if not math.isfinite(number):
                self._fail("out-of-range", f"{text} is not a finite number", event, path)
                return HOLE
            return number
        return self._text(event, path)

    def _int(self, text: str, event: Any, path: Path_) -> int | Hole:
        if len(text) > MAX_DIGITS:
            self._fail("out-of-range", f"a number of {len(text.lstrip('+-'))} digits", event, path)
            return HOLE
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)

    def _text(self, event: Any, path: Path_) -> str:
        text = str(event.value)
        if text.isprintable():
            return text
        # JSON writes characters beyond U+FFFF as two escapes, which are one character.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        bad = next((one for one in text if unicodedata.category(one) == "Cc" and one not in "\t\n"), None)
        if bad is not None:
            self._fail("syntax", f"the character {named(bad)} is not allowed in a text", event, path)
        return text

    def _fail(self, code: str, what: str, event: Any, path: Path_) -> None:
        if len(self.errors) < MAX_ERRORS:
            self.errors.append(HeddleError(code, what, where=self._at(event, path)))

    def _at(self, event: Any, path: Path_ = ()) -> Where:
        return self.source.where(_mark(event), path)


def _mark(event: Any) -> Mark:
    return event.start_mark.line + 1, event.start_mark.column + 1
