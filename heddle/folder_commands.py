"""Commands on folders of transformers, which `heddle.cli` adds to its own: each a call on its namesake in `heddle.api`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from heddle.errors import FAILED

if TYPE_CHECKING:
    from heddle.compose.hf.battery import Battery

FolderPath = Annotated[
    Path, typer.Argument(metavar="DIR", help="Folder of an exported model.", show_default=False)
]
Trust = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run the folder's own model code, which you made or have read."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]


def add_to(app: typer.Typer, example: Callable[..., str]) -> None:
    """Adds the commands of this file to `app`; `example` formats the line at the end of their help."""
    app.command(epilog=example("heddle verify my-model --trust-remote-code"))(verify)


def verify(folder: FolderPath, trust_remote_code: Trust = False, json: Json = False) -> None:
    """Check that a folder computes the same whichever way it is asked: in steps, padded, reloaded, in beams."""
    from heddle import api, terminal

    battery = api.verify(folder, trust_remote_code=trust_remote_code)
    terminal.show_json({"ok": battery.ok, **_data(battery)}) if json else _show(battery)
    if not battery.ok:
        raise typer.Exit(FAILED)


def _data(battery: Battery) -> dict[str, object]:
    from dataclasses import asdict

    return asdict(battery)


def _show(battery: Battery) -> None:
    """One line a check: what it is, its figure, the most it may be, and how it went."""
    from rich.table import Table

    from heddle import terminal

    table = Table("check", "figure", "tolerance", "", "", box=None, pad_edge=False, header_style="dim")
    for row in battery.rows:
        tolerance = "" if row.tolerance is None else f"{row.tolerance:.1e}"
        verdict, style = ("FAILED", "bold red") if row.verdict == "fail" else (row.verdict, None)
        table.add_row(row.check, f"{row.figure:.1e}", tolerance, verdict, row.note, style=style)
    screen = terminal.console()
    screen.print(f"{battery.folder}   {battery.auto_class}", style="bold")
    screen.print(f"{battery.device}, transformers {battery.transformers}, torch {battery.torch}")
    screen.print(table)
    failed = sum(row.verdict == "fail" for row in battery.rows)
    expected = sum(row.verdict == "expected" for row in battery.rows)
    told = "all well" if battery.ok else f"{failed} of {len(battery.rows)} checks failed"
    screen.print(f"{told}, {expected} expected to fail" if expected else told, style="bold")
