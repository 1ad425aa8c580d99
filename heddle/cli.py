"""The `heddle` command: one function for each command, each a call on its namesake in `heddle.api`.

Each command imports what it needs when it is called, so that `heddle --help` answers at once.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

import heddle
from heddle import bench_commands, folder_commands
from heddle.command_options import (
    Batch,
    BatteryForm,
    Context,
    Deterministic,
    GraphForm,
    Json,
    RayAddress,
    Replay,
    SpecPath,
    SpecToSearch,
    Storage,
    example,
)
from heddle.errors import FAILED, HeddleError

app = typer.Typer(
    name="heddle",
    help="Design, search and export hybrid language models under a measured latency budget.",
    epilog="Start with: heddle init && heddle search spec.yaml",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


# What typer ends with when a command is interrupted.
CTRL_C = 130
# Commands that read and write specs and train nothing, and how many new objects they make between two collections.
LIGHT = ("init", "check", "show", "diff", "schema")
OBJECTS = 50_000


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"heddle {heddle.__version__}")
        raise typer.Exit


@app.callback(epilog=example("heddle init", "heddle search spec.yaml"))
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Design, search and export hybrid language models under a measured latency budget."""


@app.command(epilog=example("heddle init", "heddle init my-spec.yaml --from qwen3-0.6b"))
def init(
    path: Annotated[Path, typer.Argument(metavar="[FILE]", help="File to write.")] = Path("spec.yaml"),
    of: Annotated[
        str | None,
        typer.Option(
            "--from", help="A known architecture to begin with: docs/zoo.md lists them.", show_default=False
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Write a commented starter spec, or the spec of a known architecture."""
    from heddle import api, terminal

    written = api.init(path, of=of, force=force)
    # What is in the zoo is one model, with nothing to search.
    then = "search" if of is None else "show"
    terminal.next_steps(f"wrote {written}", [f"heddle check {written}", f"heddle {then} {written}"])


@app.command(epilog=example("heddle doctor", "heddle doctor --json"))
def doctor(json: Json = False) -> None:
    """Show versions and devices, and test the kernels against their references."""
    from heddle import api, terminal

    diagnosis = api.doctor()
    terminal.show_json(diagnosis) if json else terminal.show_diagnosis(diagnosis)
    if not diagnosis.ok:
        raise typer.Exit(FAILED)


@app.command(epilog=example("heddle check spec.yaml", "heddle check spec.yaml --targets --json"))
def check(
    file: SpecPath,
    targets: Annotated[
        bool,
        typer.Option("--targets", help="Tell of each class and server that does not fit what forbids it."),
    ] = False,
    json: Json = False,
) -> None:
    """Check a spec, tell all its errors in one go, and which classes of transformers and servers it fits."""
    from heddle import api, terminal

    checked, fitting = api.check_with_targets(file)
    found = api.cut(checked)
    if json:
        told: dict[str, Any] = {"cut": list(found.removed)} if found.removed else {}
        if checked.warnings:
            told["warnings"] = [api.error_as_data(one) for one in checked.warnings]
        told |= {"fits": [row["target"] for row in fitting["targets"] if row["fits"]]}
        terminal.show_json(
            {"ok": True, "errors": [], **told, **({"targets": fitting["targets"]} if targets else {})}
        )
        return
    terminal.show_checked(found)
    terminal.show_warnings(checked)
    if targets:
        from heddle import target_tables

        target_tables.show_targets(fitting)
    else:
        terminal.show_fitting(fitting)


@app.command(
    epilog=example(
        "heddle show spec.yaml --context 32768 --batch 8 --json",
        "heddle show spec.yaml --graph svg --out model.svg",
    )
)
def show(
    file: SpecPath,
    context: Context = None,
    batch: Batch = 1,
    graph: Annotated[
        GraphForm | None,
        typer.Option(help="Show the compiled graph instead: as text, a flowchart or a picture."),
    ] = None,
    position_bias: Annotated[
        bool,
        typer.Option(
            "--position-bias", help="Show which tokens the masks favour instead, before any training."
        ),
    ] = False,
    targets: Annotated[
        bool,
        typer.Option(
            "--targets",
            help="Show which classes of transformers hold it exactly instead, and what forbids the rest.",
        ),
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="File to write the graph to; the terminal if not given.")
    ] = None,
    json: Json = False,
) -> None:
    """Show what a spec builds: parameters, FLOPs, cache and state bytes, per layer and in total."""
    from heddle import api, terminal

    if targets:
        from heddle import target_tables

        found = api.targets(file)
        terminal.show_json(found) if json else target_tables.show_targets(found)
        return
    if position_bias:
        bias = api.position_bias(file, length=context)
        terminal.show_json(bias) if json else terminal.show_position_bias(bias)
        return
    if graph is not None:
        text = api.graph(file, out, form=graph.value)
        if out is not None:
            terminal.next_steps(f"wrote {out}", [])
        else:
            terminal.show_json({"graph": text}) if json else typer.echo(text, nl=False)
        return
    if out is not None:
        raise HeddleError("bad-argument", "--out takes a graph", hint="--graph svg --out model.svg")
    summary = api.show(file, context=context, batch=batch)
    terminal.show_json(summary) if json else terminal.show_summary(summary)


@app.command(epilog=example("heddle diff a.yaml b.yaml", "heddle diff a.yaml b.yaml --json"))
def diff(
    left: SpecPath,
    right: Annotated[Path, typer.Argument(metavar="OTHER", help="Spec to compare with.", show_default=False)],
    json: Json = False,
) -> None:
    """Show what differs between two specs, layer by layer; open values count at their defaults."""
    from heddle import api, terminal

    found = api.diff(left, right)
    terminal.show_json({"same": not found, "differences": found}) if json else terminal.show_differences(
        found
    )


@app.command(epilog=example("heddle schema --out heddle.schema.json"))
def schema(
    out: Annotated[Path | None, typer.Option(help="File to write; the terminal if not given.")] = None,
) -> None:
    """Print the JSON schema of spec files, for editors."""
    from heddle import api, terminal

    terminal.show_json(api.schema(), out=out)


@app.command(epilog=example("heddle train spec.yaml --out runs/train"))
def train(
    file: SpecPath,
    out: Annotated[
        Path | None, typer.Option(help="Run folder to make; runs/<name>-train if not given.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed; the spec's if not given.")] = None,
    json: Json = False,
) -> None:
    """Train the one model a spec describes, on its data, and keep the weights; open values count at their defaults."""
    from heddle import api, live, terminal

    with live.training(quiet=json) as on_step:
        run = api.train(file, out, seed=seed, on_step=on_step)
    terminal.show_json(run) if json else terminal.show_trained(run)


@app.command(
    epilog=example("heddle search spec.yaml --time 30m", "heddle search spec.yaml --out runs/a --resume")
)
def search(
    file: SpecToSearch = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; a new runs/<name> if not given.")] = None,
    trials: Annotated[int | None, typer.Option(min=1, help="Trials; the spec's if not given.")] = None,
    time: Annotated[
        str | None, typer.Option(help='Time limit, as "5m" or "2h"; the spec\'s if not given.')
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    storage: Storage = None,
    ray_address: RayAddress = None,
    replay: Replay = None,
    deterministic: Deterministic = False,
    json: Json = False,
) -> None:
    """Search a spec's space under its latency budget, and export the best model."""
    from heddle import api, live, terminal

    where: dict[str, Any] = {"storage": storage, "ray_address": ray_address, "deterministic": deterministic}
    if file is None or replay is not None:
        given = None if file is None and trials is None and time is None else "SPEC, --trials or --time"
        folder_commands.replay(replay, out, given, resume=resume, json=json, **where)
        return
    folder = api.run_folder(file, out, resume=resume)
    with live.searching(quiet=json) as progress:
        run = api.search(
            file,
            folder,
            resume=resume,
            trials=trials,
            time=time,
            progress=progress,
            **where,
        )
    terminal.show_json(run.summary()) if json else terminal.show_run(run, file)
    if run.status != "finished":
        raise typer.Exit(FAILED)


@app.command(
    epilog=example(
        "heddle export runs/quickstart --trial best --out my-model",
        "heddle export spec.yaml --target llama --out my-model",
    )
)
def export(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN",
            help="Folder of a search, training or import; a spec file's weights are random.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.", show_default=False)],
    trial: Annotated[str, typer.Option(help='"best" or the number of a trial on the Pareto front.')] = "best",
    target: Annotated[
        str,
        typer.Option(
            help="auto, remote (code in the folder), or a class of transformers as `heddle show --targets` names it."
        ),
    ] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace an existing folder.")] = False,
    max_shard_size: Annotated[
        str, typer.Option(help='Spread larger weights over several files, as "5GB".')
    ] = "50GB",
    battery: Annotated[
        BatteryForm,
        typer.Option(help="Checks to pass: auto is full where that takes less than a minute, else short."),
    ] = BatteryForm.auto,
    json: Json = False,
) -> None:
    """Write a trained model as a Hugging Face folder that loads without heddle."""
    from heddle import api, target_tables, terminal

    how = {"target": target, "max_shard_size": max_shard_size, "battery": battery.value}
    result = api.export(run, out, trial=trial, force=force, **how)
    terminal.show_json(target_tables.exported_data(result)) if json else target_tables.show_exported(result)


@app.command(name="import", epilog=example("heddle import Qwen3-0.6B --out runs/qwen"))
def import_model(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Checkpoint of transformers.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="Folder to make.", show_default=False)],
    json: Json = False,
) -> None:
    """Turn a native checkpoint of transformers, or an export, into a spec and weights; no code of it runs."""
    from heddle import api, target_tables, terminal

    result = api.import_model(folder, out)
    terminal.show_json(result) if json else target_tables.show_imported(result)


app.registered_commands += folder_commands.app.registered_commands + bench_commands.app.registered_commands


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 is ok, 1 failed, 2 bad input. A user's mistake gives no traceback."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    # Placement solves small systems by NumPy: on 16 cores its BLAS kept ten of them busy, and took many times as long.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        with _collecting(OBJECTS if words[:1] and words[0] in LIGHT else gc.get_threshold()[0]):
            app(words)
        status = 0
    except SystemExit as done:
        if done.code != CTRL_C:
            raise
        hint = "what was finished by then is kept; a search that had begun goes on with --resume"
        status = _tell(HeddleError("interrupted", "stopped by Ctrl-C", hint=hint), as_json="--json" in words)
    except Exception as error:
        status = _tell(error, as_json="--json" in words)
    sys.exit(status)


@contextmanager
def _collecting(objects: int) -> Iterator[None]:
    """Python's collector of circles runs after so many new objects.

    What a light command imports and reads it keeps to its end, and full collections walk it all: in `heddle check` of
    1,000 layers 3 % of the instructions, after the usual 700 (cachegrind). The usual number stays where there are
    tensors, since one in a circle holds memory of a GPU until the next collection.
    """
    usual = gc.get_threshold()
    gc.set_threshold(objects, *usual[1:])
    try:
        yield
    finally:
        gc.set_threshold(*usual)


def _tell(error: Exception, *, as_json: bool) -> int:
    """Say what went wrong, and give the exit status for it."""
    from heddle import terminal

    known = terminal.os_error(error) if isinstance(error, OSError) else error
    if isinstance(known, HeddleError):
        terminal.show_error(known, as_json=as_json)
        return known.exit_status
    if os.environ.get("HEDDLE_TRACEBACK"):
        raise error
    terminal.show_bug(error)
    return FAILED
