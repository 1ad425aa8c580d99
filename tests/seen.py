"""A page of the dashboard as a test looks at it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

from starlette.testclient import TestClient

from heddle.dashboards import server
from heddle.dashboards.site import open_site


class Seen(HTMLParser):
    """Tags, attributes and visible text of a page, and its figures."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.figures: list[dict[str, object]] = []
        self._inside = ""
        self.feed(markup)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self._inside = tag if tag == "script" else ""

    def handle_endtag(self, tag: str) -> None:  # noqa: ARG002
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if not self._inside:
            self.words.append(data)
        elif data.strip():
            self.figures = json.loads(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def client(
    root: Path, bench: Path | None = None, token: str | None = None, specs: Sequence[Path] = ()
) -> TestClient:
    site = open_site(root, bench, specs)
    return TestClient(server.app(site, token=token), base_url="http://localhost:8642")


def get(asked: TestClient, path: str, status: int = 200) -> Seen:
    answer = asked.get(path)
    assert answer.status_code == status, answer.text
    return Seen(answer.text)
