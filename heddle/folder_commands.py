"""Commands on folders, which `heddle.cli` adds to its own: `verify` and `eval` (`heddle.api.evaluate`) on models, `report` and
`dashboard` on runs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from heddle.command_options import Curves, Json, RunPath, TableForm, example
from heddle.errors import FAILED, HeddleError

if TYPE_CHECKING:
    from heddle.compose.hf.battery import Battery
    from heddle.compose.hf.card import ScoreRow
    from heddle.search.replay import Moved, Replay

FolderPath = Annotated[
    Path, typer.Argument(metavar="DIR", help="Folder of an exported model.", show_default=False)
]
Trust = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run the folder's own model code, which you made or have read."),
]
app = typer.Typer()


@app.command(epilog=example("heddle report runs/quickstart --out report.html"))
def report(
    run: RunPath,
    out: Annotated[
        Path | None,
        typer.Option(help="File to write; RUN/report.html if not given, a table to the terminal."),
    ] = None,
    plots: Annotated[
        Path | None, typer.Option(help="Folder for the plots as SVG and PNG instead.", show_default=False)
    ] = None,
    table: Annotated[
        TableForm | None, typer.Option(help="A table instead: all trials as csv, or the front.")
    ] = None,
    tensorboard: Curves = None,
) -> None:
    """Write a run as one HTML page that needs no network, or its plots, curves, or a table."""
    from heddle import api, terminal

    folders = ((plots, api.plots), (tensorboard, api.event_files))
    for path in (path for folder, write in folders if folder is not None for path in write(run, folder)):
        terminal.next_steps(f"wrote {path}", [])
    if table is not None:
        text = api.table(run, table.value, out)
        typer.echo(text, nl=False) if out is None else terminal.next_steps(f"wrote {out}", [])
    elif plots is None and tensorboard is None:
        terminal.next_steps(f"wrote {api.report(run, out)}", [])


@app.command(epilog=example("heddle verify my-model --trust-remote-code"))
def verify(folder: FolderPath, trust_remote_code: Trust = False, json: Json = False) -> None:
    """Check that a folder computes the same whichever way it is asked: in steps, padded, reloaded, in beams."""
    from heddle import api, target_tables, terminal

    battery = api.verify(folder, trust_remote_code=trust_remote_code)
    data = {"ok": battery.ok, **asdict(battery), "rows": target_tables.parity_data(battery.rows)}
    terminal.show_json(data) if json else _show(battery)
    if not battery.ok:
        raise typer.Exit(FAILED)


@app.command("eval", epilog=example("heddle eval my-model --tasks lambada_openai --limit 100"))
def evaluate(
    folder: FolderPath,
    tasks: Annotated[str, typer.Option(help="Tasks by name, with commas between.", show_default=False)],
    include_path: Annotated[
        Path | None, typer.Option(help="Folder with tasks of your own; functions that they name are run.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Examples of each task; all if not given.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 8,
    device: Annotated[str, typer.Option(help='Where to compute, as "cpu" or "cuda:0".')] = "cpu",
    trust_remote_code: Trust = False,
    json: Json = False,
) -> None:
    """Evaluate a folder with lm-evaluation-harness, which the extra `eval` installs."""
    from heddle import api, terminal

    rows = api.evaluate(
        folder,
        [task.strip() for task in tasks.split(",") if task.strip()],
        trust_remote_code=trust_remote_code,
        include_path=include_path,
        limit=limit,
        batch_size=batch_size,
        device=device,
    )
    terminal.show_json(rows) if json else _show_scores(rows)


@app.command(epilog=example("heddle dashboard runs/quickstart", "heddle dashboard runs --port 9000"))
def dashboard(
    path: Annotated[
        Path, typer.Argument(metavar="RUN_OR_FOLDER", help="A run, or a folder of runs.", show_default=False)
    ],
    host: Annotated[
        str, typer.Option(help="Address to listen on; one that others reach asks for a token.")
    ] = "localhost",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")
    ] = 8642,
    bench: Annotated[
        Path | None, typer.Option(help="Folder with rows of make bench, for the page of kernels.")
    ] = None,
    spec: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="A spec file to compare with trials; may be given again."),
    ] = None,
) -> None:
    """Show runs as web pages that follow a running search. Ctrl-C ends it."""
    from heddle import api

    api.dashboard(path, host=host, port=port, bench=bench, specs=spec or (), ready=typer.echo)


def replay(
    lock: Path | None, out: Path | None, given: str | None, *, resume: bool, json: bool, **where: Any
) -> None:
    """`heddle search --replay LOCK`; `given` names what the lockfile decides and a user gave beside it."""
    from heddle import api, live, terminal

    if lock is None:
        raise HeddleError("bad-argument", "heddle search takes a SPEC, or --replay LOCK")
    if given is not None:
        raise HeddleError("bad-argument", f"--replay takes no {given}: the lockfile has them")
    with live.searching(quiet=json) as progress:
        found = api.replay(lock, out, resume=resume, progress=progress, **where)
    terminal.show_json(found.summary()) if json else _show_replay(found)
    if not found.same:
        raise typer.Exit(FAILED)


def _show_replay(found: Replay) -> None:
    """What differs, a line each; then the latencies of now, which always do."""
    from heddle import terminal
    from heddle.dashboards import words

    screen = terminal.console()
    screen.print(words.headline(found.run), style="bold")
    for change in found.changes:
        screen.print(str(change), style="bold red", soft_wrap=True, markup=False)
    for moved in found.moved:
        screen.print(_moved_text(moved), soft_wrap=True, markup=False)
    parts = dict.fromkeys(change.part for change in found.changes)
    screen.print(f"differs in: {', '.join(parts)}" if parts else "nothing differs", style="bold")


def _moved_text(moved: Moved) -> str:
    """A latency of then and of now: first in ratios to what it was timed in turns with, then in milliseconds."""
    from heddle.dashboards import words

    ratios = ""
    if moved.then_ratio is not None and moved.now_ratio is not None:
        share = moved.now_ratio.value / moved.then_ratio.value - 1
        then, now = words.interval_text(*moved.then_ratio), words.interval_text(*moved.now_ratio)
        ratios = f"{then} × {moved.relative_to} then, {now} now ({share:+.1%}); "
    share = moved.now_ms / moved.then_ms - 1
    peak = f"; peak {moved.then_bytes:,} bytes then, {moved.now_bytes:,} now" if moved.is_peak_other else ""
    name = "reference" if moved.number < 0 else f"trial {moved.number}"
    times = f"{moved.then_ms:.3g} ms then, {moved.now_ms:.3g} ms now ({share:+.1%})"
    return f"{name}, {moved.label}: {ratios}{times}{peak}"


def _show_scores(rows: list[ScoreRow]) -> None:
    from rich.table import Table

    from heddle import terminal

    table = Table("task", "metric", "score", "standard error", "n", "", box=None, pad_edge=False)
    for row in rows:
        error = "" if row.se is None else f"{row.se:.2g}"
        number = "" if row.n is None else str(row.n)
        table.add_row(row.task, row.metric, f"{row.value:.4g}", error, number, row.note)
    terminal.console().print(table)


def _show(battery: Battery) -> None:
    from heddle import terminal
    from heddle.target_tables import show_parity

    screen = terminal.console()
    screen.print(f"{battery.folder}   {battery.auto_class}", style="bold")
    screen.print(f"{battery.device}, transformers {battery.transformers}, torch {battery.torch}")
    if battery.note:
        screen.print(battery.note, soft_wrap=True)
    show_parity(battery.rows)
    failed = sum(row.verdict == "fail" for row in battery.rows)
    expected = sum(row.verdict == "expected" for row in battery.rows)
    told = "all well" if battery.ok else f"{failed} of {len(battery.rows)} checks failed"
    screen.print(f"{told}, {expected} expected to fail" if expected else told, style="bold")
