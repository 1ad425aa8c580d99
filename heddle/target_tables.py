"""What a spec may become, and what became one, in a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.padding import Padding
from rich.text import Text

from heddle.terminal import OF_DEFAULTS, console, next_steps

if TYPE_CHECKING:
    from rich.console import Console

    from heddle.compose.hf.card import ParityRow
    from heddle.compose.hf.export import ExportResult
    from heddle.search.import_model import ImportResult

# So many files of code, and no more, are told by name: an export with code of its own has some ninety.
FEW_FILES = 4
_WORDS = {True: "yes", False: "no", None: "?"}


def show_targets(found: Mapping[str, Any]) -> None:
    """A row a target, the fields that forbid one below its name, and the servers that take those that fit."""
    screen = console()
    screen.print(f"{found['name']}   hash {found['hash']}", style="bold")
    for line in (OF_DEFAULTS if found["defaults"] else "", found["warning"]):
        if line:
            screen.print(line, soft_wrap=True)
    for row in found["targets"]:
        through = f", as {row['through']}" if row.get("through") else ""
        screen.print(f"{row['target']:18}{_WORDS[row['fits']]}{through}", style="bold" if row["fits"] else "")
        for line in (*_refused(row["refused"]), *filter(None, (row["warning"], *_servers(row)))):
            _print_below(screen, line)
    versions = {one["version"]: None for row in found["targets"] for one in row["servers"].values()}
    screen.print(f"{' and '.join(versions)}: read in their source; what was run is told", style="dim")


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
    told += [server["checked"]] if not server["checked"].startswith("read") else []
    return ", ".join(filter(None, (f"{name}: {_WORDS[server['takes']]}", *told)))


def show_imported(result: ImportResult) -> None:
    """Where the spec and the weights lie, and what to do with them."""
    told = f"read {result.target}, {result.parameters:,} parameters, as the spec of hash {result.hash}"
    console().print(told)
    if result.note:
        console().print(result.note, soft_wrap=True)
    if result.left:
        code = [name for name in result.left if name.endswith(".py")]
        rest = [name for name in result.left if name not in code]
        names = [*rest, f"{len(code)} files of code"] if len(code) > FEW_FILES else result.left
        console().print(f"left behind: {', '.join(names)}", soft_wrap=True)
    console().print("its weights go to export; train and search begin with random ones", soft_wrap=True)
    path = result.path
    next_steps(
        f"wrote {path}",
        [f"heddle show {path / 'spec.yaml'}", f"heddle export {path} --out DIR --target auto"],
    )


def exported_data(result: ExportResult) -> dict[str, Any]:
    """An export as JSON can say it."""
    return {**asdict(result), "parity": parity_data(result.parity)}


def parity_data(rows: Iterable[ParityRow]) -> list[dict[str, Any]]:
    """The rows of the battery as JSON can say them: a figure that is infinite, of a check that raised, is null."""
    return [
        {**asdict(row), "figure": row.figure if math.isfinite(row.figure) else None, "tolerance": _most(row)}
        for row in rows
    ]


def _most(row: ParityRow) -> float | None:
    return row.tolerance if row.tolerance is not None and math.isfinite(row.tolerance) else None


def show_exported(result: ExportResult) -> None:
    """Where the Hugging Face folder lies, how close it computes, and what it was checked for."""
    screen = console()
    show_parity(result.parity)
    if result.battery:
        screen.print(f"parity battery: {result.battery}", soft_wrap=True)
    screen.print(f"largest difference of its logits, read back without heddle: {result.max_difference:.1e}")
    if result.generated_text:
        screen.print(f"it writes: {result.generated_text!r}", soft_wrap=True)
    if result.note:
        screen.print(result.note, soft_wrap=True)
    kind = "code in the folder" if result.target == "remote" else f"{result.target} of transformers, no code"
    next_steps(f"wrote {result.path} ({kind}); its README.md holds a snippet {result.snippet}", [])


def show_parity(rows: Sequence[ParityRow]) -> None:
    """One line a check: what it is, its figure, the most it may be, and how it went; a note that has no room there below it."""
    screen = console()
    wide = max((len(row.check) for row in rows), default=0)
    if rows:
        screen.print(f"{'check':{wide}}  {'figure':>7}  {'at most':>7}", style="dim")
    for row in rows:
        verdict, style = ("FAILED", "bold red") if row.verdict == "fail" else (row.verdict, "")
        most = "" if row.tolerance is None else _figure(row.tolerance)
        line = Text(f"{row.check:{wide}}  {_figure(row.figure):>7}  {most:>7}  {verdict:8}", style=style)
        fits = len(line) + len(row.note) + 2 <= screen.width
        if row.note and fits:
            line.append(f"  {row.note}", style="dim")
        line.rstrip()
        screen.print(line)
        if not fits:
            _print_below(screen, row.note)


def _print_below(screen: Console, line: str) -> None:
    """A line that belongs to the one above it; whole where nobody sees its width."""
    if screen.is_terminal:
        screen.print(Padding(Text(line, style="dim"), (0, 0, 0, 4), expand=False))
    else:
        screen.print(f"    {line}", soft_wrap=True)


def _figure(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"
