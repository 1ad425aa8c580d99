"""The parser events of a YAML text: those of ruamel.yaml, in half its time.

Its scanner looks at every character by a method call, and asks before each token anew whether it has looked far enough.
What is here answers the common cases at once, from the same text and to the same end, and hands on all others.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.parser import Parser
from ruamel.yaml.reader import Reader
from ruamel.yaml.scanner import Scanner
from ruamel.yaml.tokens import ScalarToken

# What stands between tokens on a line. In a list or mapping between brackets a tab may stand there as well.
_BLANK = re.compile(" *(?:#[^\n\0\r\x85\u2028\u2029]*)?")
_FLOW_BLANK = re.compile("[ \t]*(?:#[^\n\0\r\x85\u2028\u2029]*)?")
# A plain word, and behind it what ends it on the spot: for a key inside brackets or not, or for a value inside them.
_KEY = re.compile("[A-Za-z0-9_./+-]+(?=:[ \n])")
_FLOW_WORD = re.compile(r"[A-Za-z0-9_./+-]+(?=[,\]}]|:[ \n])")
# A text in quotes without escapes and line breaks.
_QUOTED = {
    '"': re.compile(r'"([^"\\\n\0\r\x85\u2028\u2029]*)"'),
    "'": re.compile(r"'([^'\n\0\r\x85\u2028\u2029]*)'(?!')"),
}


def events(text: str) -> Iterator[Any]:
    """Every event of a text, as `YAML(typ="safe", pure=True).parse` gives them; marks know line and column alone.

    Raises:
        YAMLError: the first thing that is no YAML, when it is reached.
    """
    yaml = YAML(typ="safe", pure=True)
    yaml.Reader, yaml.Scanner, yaml.Parser = _Reader, _Scanner, _Parser
    return iter(yaml.parse(text))


class _Mark(NamedTuple):
    """A place, counted from 0."""

    line: int
    column: int


class _Reader(Reader):
    def get_mark(self) -> Any:
        return _Mark(self.line, self.column)

    def forward(self, length: int = 1) -> None:
        passed = self.buffer[self.pointer : self.pointer + length]
        # Line breaks and byte order marks, which do not count as columns, are not printable.
        if not passed.isprintable():
            super().forward(length)
            return
        self.pointer += length
        self.index += length
        self.column += length


class _Scanner(Scanner):
    # A plain attribute in the place of a property: it is asked for some twenty times a token.
    reader: Any = None

    def __init__(self, loader: Any) -> None:
        self.reader = loader.reader
        # Characters read and tokens taken, together, when nothing more was needed; both only grow.
        self._settled = -1
        super().__init__(loader)

    def need_more_tokens(self) -> bool:
        state = self.reader.index + self.tokens_taken
        if state == self._settled:
            return False
        if super().need_more_tokens():
            return True
        self._settled = state
        return False

    def check_token(self, *choices: Any) -> bool:
        while self.need_more_tokens():
            self.fetch_more_tokens()
        return bool(self.tokens) and (not choices or isinstance(self.tokens[0], choices))

    def stale_possible_simple_keys(self) -> None:
        line, index = self.reader.line, self.reader.index
        for key in self.possible_simple_keys.values():
            if key.line != line or index - key.index > 1024:
                super().stale_possible_simple_keys()
                return

    def scan_to_next_token(self) -> None:
        reader = self.reader
        if reader.index == 0:
            super().scan_to_next_token()
            return
        blank = _FLOW_BLANK if self.flow_context else _BLANK
        while True:
            found = blank.match(reader.buffer, reader.pointer)
            assert found is not None
            if found.end() > reader.pointer:
                reader.forward(found.end() - reader.pointer)
            if not self.scan_line_break():
                return
            if not self.flow_context:
                self.allow_simple_key = True

    def scan_plain(self) -> Any:
        reader = self.reader
        found = (_FLOW_WORD if self.flow_context else _KEY).match(reader.buffer, reader.pointer)
        if found is None:
            return super().scan_plain()
        start = reader.get_mark()
        reader.forward(len(found[0]))
        return ScalarToken(found[0], True, start, reader.get_mark())

    def scan_flow_scalar(self, style: Any) -> Any:
        reader = self.reader
        found = _QUOTED[style].match(reader.buffer, reader.pointer)
        if found is None:
            return super().scan_flow_scalar(style)
        start = reader.get_mark()
        reader.forward(len(found[0]))
        return ScalarToken(found[1], False, start, reader.get_mark(), style)


class _Parser(Parser):
    scanner: Any = None

    def __init__(self, loader: Any) -> None:
        self.scanner = loader.scanner
        super().__init__(loader)
