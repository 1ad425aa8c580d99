"""The command line of scripts that write a part of docs/performance.md, or look whether it is current."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "performance.md"


def between(page: str, begin: str, end: str, text: str) -> str:
    """The page with `text` between two marks, which it has."""
    before, _, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    assert closed, f"no place between {begin} and {end}"
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"


def write_page(description: str | None, written: Callable[[str], str]) -> int:
    """Writes what `written` makes of the page; with `--check` nothing, and 1 if it would be another."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 if the page is not current"
    )
    check = parser.parse_args().check
    page = PAGE.read_text(encoding="utf-8")
    new = written(page)
    if check:
        return int(new != page)
    PAGE.write_text(new, encoding="utf-8")
    return 0
