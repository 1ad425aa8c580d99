"""What a spec may become, and what became one, in a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.padding import Padding
from rich.text import Text

from heddle.terminal import console, next_steps

if TYPE_CHECKING:
    from heddle.search.import_model import ImportResult

_WORDS = {True: "yes", False: "no", None: "?"}


def show_targets(found: Mapping[str, Any]) -> None:
    """A row a target, the fields that forbid one below its name, and the servers that take those that fit."""
    screen = console()
    screen.print(f"{found['name']}   hash {found['hash']}", style="bold")
    for row in found["targets"]:
        through = f", as {row['through']}" if row.get("through") else ""
        screen.print(f"{row['target']:18}{_WORDS[row['fits']]}{through}", style="bold" if row["fits"] else "")
        for line in (*_refused(row["refused"]), *filter(None, (row["warning"], *_servers(row)))):
            screen.print(Padding(Text(line, style="dim"), (0, 0, 0, 4), expand=False))
    versions = {one["version"]: None for row in found["targets"] for one in row["servers"].values()}
    screen.print(f"{' and '.join(versions)}: read in their source; what was run is told", style="dim")


def show_fitting(found: Mapping[str, Any]) -> None:
    """A line for each target that fits; of a server as which class."""
    screen = console()
    for row in found["targets"]:
        if row["fits"]:
            told = f"as {row['through']}" if row.get("through") else row["class"]
            screen.print(f"  fits {row['target']:18}{told}", style="dim", soft_wrap=True)
    screen.print("  --targets tells what forbids the others", style="dim")


def _refused(refused: Sequence[Mapping[str, str]]) -> list[str]:
    return [f"{one['path']}: {one['why']}" if one["path"] else one["why"] for one in refused]


def _servers(row: Mapping[str, Any]) -> list[str]:
    return [
        _served(name, row["servers"][key])
        for name, key in (("vLLM", "vllm"), ("SGLang", "sglang"))
        if key in row["servers"]
    ]


def _served(name: str, server: Mapping[str, Any]) -> str:
    told = [f"{server['path']}: {server['note']}" if server["path"] else server["note"]]
    told += [server["checked"]] if server["checked"].startswith("run") else []
    return ", ".join(filter(None, (f"{name}: {_WORDS[server['takes']]}", *told)))


def show_imported(result: ImportResult) -> None:
    """Where the spec and the weights lie, and what to do with them."""
    told = f"read {result.target}, {result.parameters:,} parameters, as the spec of hash {result.hash}"
    console().print(told)
    path = result.path
    next_steps(
        f"wrote {path}",
        [f"heddle show {path / 'spec.yaml'}", f"heddle export {path} --out DIR --target auto"],
    )
