"""The tables of docs/export.md, from rows of what was run: `python -m heddle.compose.targets.matrix` writes them there.

Rows are those of `tests/native_versions.py` (exports, a row a version of transformers), `tests/foreign.py` (imports) and
`tests/native_rounding.py` in tests/bench/results/evidence-export.jsonl; of several the last counts. What servers take is read in
their source, and told by `servers.py`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from heddle.compose.targets.catalogue import TARGETS
from heddle.compose.targets.servers import ALWAYS, REMOTE, SOMETIMES, TRIED, VERSIONS, Serves, served

PAGE, ROWS = Path("docs/export.md"), Path("tests/bench/results/evidence-export.jsonl")
_WORDS = {True: "yes", False: "no", None: "?"}
Row = Mapping[str, Any]


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """Each table as Markdown, by the name of its marks in the page."""
    return {
        "targets": "\n".join(_targets()),
        "exports": "\n".join(_exports(rows)),
        "rounding": "\n".join(_rounding(rows)),
        "imports": "\n".join(_imports(rows)),
    }


def with_tables(page: str, rows: Sequence[Row]) -> str:
    """A page with the tables of these rows between their marks."""
    for name, table in tables(rows).items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        head, _, rest = page.partition(begin)
        _, _, tail = rest.partition(end)
        page = f"{head}{begin}\n{table}\n{end}{tail}"
    return page


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of evidence."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def exports(rows: Sequence[Row]) -> dict[tuple[str, str], Row]:
    """By class and version of transformers what was last made of its random specs."""
    # Those of an environment without Heddle are of fewer specs.
    asked = [row for row in rows if "targets" in row and not row.get("own_environment")]
    return {(name, row["transformers"]): told for row in asked for name, told in row["targets"].items()}


def _targets() -> Iterator[str]:
    yield f"| target | class | what a spec may have | {' | '.join(VERSIONS.values())} |"
    yield "|---|---|---|---|---|"
    for target in TARGETS:
        answers = SOMETIMES.get(target.name) or tuple(_cell(one) for one in ALWAYS[target.name])
        tried = (TRIED.get(f"{server} {target.name}", "") for server in VERSIONS)
        servers = ["; ".join(filter(None, told)) for told in zip(answers, tried, strict=True)]
        yield f"| `{target.name}` | {target.model_class} | {target.holds} | {' | '.join(servers)} |"
    remote = served(REMOTE, {"layers": []})
    yield f"| `{REMOTE}` | code in the folder | everything | {' | '.join(_cell(one) for one in remote.values())} |"


def _exports(rows: Sequence[Row]) -> Iterator[str]:
    """A row a class and version: the specs, and how many of them kept what."""
    heads = "float32, begun | float32 | float32, from float64 | bfloat16 (ours) | tokens with and without cache | as ours | hash"
    yield f"| target | what they held | transformers | specs, orders | {heads} |"
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    found = exports(rows)
    for target in TARGETS:
        for version in sorted(version for name, version in found if name == target.name):
            yield _export(target.name, version, found[target.name, version])


def _export(name: str, version: str, told: Row) -> str:
    specs = told["specs"]
    over = f", {told['over']} above 1e-5" if told["over"] else ""
    narrow = f"{told['bfloat16']:.1%} ({told['bfloat16_ours']:.1%})"
    excused = f", the others *expected* ({told['excused']})" if told["excused"] else ""
    tied = f", {told['tied']} at a near tie" if told.get("tied") else ""
    cells = (
        f"`{name}`", "; ".join((", ".join(told["mixers"]), ", ".join(told["channels"]))), version,
        f"{specs}, {told['orders']}", _apart(told.get("begun")), f"{told['float32']:.1e}{over}",
        f"{told['float32_from_float64']:.1e}", narrow,
        f"{told['same_cached']} of {specs}{excused}", f"{told['same_as_ours']} of {specs}{tied}",
        f"{told['hash_back']} of {specs}",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _imports(rows: Sequence[Row]) -> Iterator[str]:
    heads = "float32, begun | float32 | float64 | the lesser | bfloat16 | the same model"
    yield f"| class | transformers | configurations | {heads} |"
    yield "|---|---|---|---|---|---|---|---|---|"
    last = next((row for row in reversed(rows) if "imports" in row), None)
    for name, told in ({} if last is None else last["imports"]).items():
        assert last is not None
        over = f", {told['over']} above 1e-5" if told["over"] else ""
        count = told["configurations"]
        cells = (
            f"`{name}`", last["transformers"], f"{count}", _apart(told.get("begun")), f"{told['float32']:.1e}{over}",
            f"{told['float64']:.1e}", _apart(told.get("least")), f"{told['bfloat16']:.1%}", f"{told['held']} of {count}",
        )  # fmt: skip
        yield f"| {' | '.join(cells)} |"


def _rounding(rows: Sequence[Row]) -> Iterator[str]:
    names = (
        "ours_float32",
        "class_float32",
        "between_float32",
        "between_float32_as_class",
        "between_float32_own_chunks",
    )
    heads = "one from the other | ours with its softplus | and its chunk form | class, no float32"
    yield f"| class | specs | ours | class | {heads} |"
    yield "|---|---|---|---|---|---|---|---|"
    found = {
        row["target"]: row
        for row in rows
        if "largest_logit_apart" in row and names[-1] in row["largest_logit_apart"]
    }
    for name, row in found.items():
        cells = (f"{row['largest_logit_apart'][one]:.1e}" for one in (*names, "class_float64"))
        yield f"| `{name}` | {row['specs']} | {' | '.join(cells)} |"


def _apart(difference: float | None) -> str:
    return "not asked" if difference is None else f"{difference:.1e}"


def _cell(one: Serves) -> str:
    return f"{_WORDS[one.takes]}: {one.note}" if one.note else _WORDS[one.takes]


if __name__ == "__main__":
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE
    path.write_text(with_tables(path.read_text(encoding="utf-8"), read_rows(ROWS)), encoding="utf-8")
