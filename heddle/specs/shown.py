"""HTML of a notebook's cell for what knows no page: a heading, layers in the colours of their mixers, a text.

Every style stands at its element, since a notebook has no style sheet of ours; every text is escaped.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from heddle.specs.palette import look_of

HATCH = "background-image:repeating-linear-gradient(45deg,transparent 0 3px,rgba(255,255,255,.7) 3px 5px);"
# More layers than these are a strip too fine to see.
MOST = 1000


def cell(title: str, lines: Sequence[str], mixers: Sequence[str], text: str = "") -> str:
    """One cell: a title, lines, the layers of a model from the first, and a text to unfold."""
    parts = [f"<div><strong>{escape(title)}</strong></div>"]
    parts += [f"<div>{escape(line)}</div>" for line in lines]
    if mixers:
        parts.append(_strip(mixers))
    if text:
        parts.append(f"<details><summary>spec</summary><pre>{escape(text)}</pre></details>")
    return f'<div style="line-height:1.5">{"".join(parts)}</div>'


def _strip(mixers: Sequence[str]) -> str:
    boxes = "".join(
        f'<span title="{escape(f"layer {index}: {mixer}")}" style="flex:1 1 0;min-width:2px;max-width:3em;'
        f'height:1.4em;{_paint(mixer)}"></span>'
        for index, mixer in enumerate(mixers[:MOST])
    )
    names = "".join(
        f'<span style="margin-right:1em"><span style="display:inline-block;width:.9em;height:.9em;{_paint(mixer)}">'
        f"</span> {escape(mixer)} × {mixers.count(mixer)}</span>"
        for mixer in dict.fromkeys(mixers)
    )
    label = escape(f"{len(mixers)} layers")
    return (
        f'<div role="img" aria-label="{label}" style="display:flex;gap:1px">{boxes}</div><div>{names}</div>'
    )


def _paint(mixer: str) -> str:
    look = look_of(mixer)
    return f"background-color:{look.colour};{HATCH if look.hatched else ''}"
