"""The table of targets in docs/export.md: `python -m heddle.compose.targets.matrix` writes it there."""

from __future__ import annotations

import sys
from pathlib import Path

from heddle.compose.targets.catalogue import TARGETS
from heddle.compose.targets.servers import ALWAYS, SOMETIMES, VERSIONS, Serves

BEGIN, END = "<!-- targets: begin -->", "<!-- targets: end -->"
_WORDS = {True: "yes", False: "no", None: "?"}


def matrix() -> str:
    """The table as Markdown."""
    lines = [f"| target | class | holds exactly | {' | '.join(VERSIONS.values())} |", "|---|---|---|---|---|"]
    for target in TARGETS:
        servers = SOMETIMES.get(target.name) or tuple(_cell(one) for one in ALWAYS[target.name])
        lines.append(f"| `{target.name}` | {target.model_class} | {target.holds} | {' | '.join(servers)} |")
    servers = tuple(_cell(one) for one in ALWAYS["remote"])
    lines.append(f"| `remote` | code in the folder | everything | {' | '.join(servers)} |")
    return "\n".join(lines)


def with_matrix(page: str) -> str:
    """A page with the table of today between its marks."""
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{matrix()}\n{END}{tail}"


def _cell(one: Serves) -> str:
    return f"{_WORDS[one.takes]}: {one.note}" if one.note else _WORDS[one.takes]


if __name__ == "__main__":
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/export.md")
    path.write_text(with_matrix(path.read_text(encoding="utf-8")), encoding="utf-8")
