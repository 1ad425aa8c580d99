"""HTML that escapes by default: a plain string is text, only `Html` is markup."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

VOID = {"meta", "br", "hr", "link", "input", "img"}


class Html(str):
    """Markup that is already safe."""

    __slots__ = ()


def text(value: object) -> Html:
    """`value` as text, with every character that HTML reads escaped."""
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def element(name: str, /, *children: object, **attributes: object) -> Html:
    """One element. `cls` stands for class, underscores in names for hyphens; None leaves an attribute out."""
    words = {"class" if key == "cls" else key.replace("_", "-"): value for key, value in attributes.items()}
    opening = "".join(
        f' {key}="{html.escape(str(value))}"' for key, value in words.items() if value is not None
    )
    if name in VOID:
        return Html(f"<{name}{opening}>")
    return Html(f"<{name}{opening}>{join(children)}</{name}>")


def join(parts: Iterable[object], separator: str = "") -> Html:
    """Parts one after the other, each escaped unless it is `Html`."""
    return Html(text(separator).join(text(part) for part in parts))


def table(
    header: Sequence[object], rows: Iterable[Sequence[object]], *, numeric: Sequence[int] = (), cls: str = ""
) -> Html:
    """A table that scrolls inside its own box; columns in `numeric` are aligned right.

    A row may be a `Row` to carry a class.
    """
    head = element(
        "tr", *(element("th", cell, scope="col", cls=_align(i, numeric)) for i, cell in enumerate(header))
    )
    body = (
        element(
            "tr",
            *(element("td", cell, cls=_align(i, numeric)) for i, cell in enumerate(row)),
            cls=getattr(row, "cls", None),
        )
        for row in rows
    )
    inner = element("table", element("thead", head), element("tbody", *body), cls=cls or None)
    # A box that scrolls can be reached with the keyboard.
    return element("div", inner, cls="scroll", tabindex="0")


class Row(tuple[object, ...]):
    """The cells of one table row, with a class for its look."""

    cls: str | None

    def __new__(cls, cells: Iterable[object], look: str | None = None) -> Row:
        row = super().__new__(cls, cells)
        row.cls = look
        return row


def _align(column: int, numeric: Sequence[int]) -> str | None:
    return "number" if column in numeric else None
