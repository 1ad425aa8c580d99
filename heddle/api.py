"""What heddle does, as functions: one for each command, of the same name. The command line parses and shows.

    from heddle import api

    run = api.search("examples/quickstart.yaml", "runs/mine", trials=20)
    api.export(run.path, "my-model")

Heavy packages (torch, ray, transformers), and what only one function needs, are imported by that function.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import TypeAdapter, ValidationError

from heddle import specs
from heddle.bench_api import bench as bench
from heddle.bench_api import bench_fit as bench_fit
from heddle.bench_api import bench_ops as bench_ops
from heddle.bench_api import bench_tune as bench_tune
from heddle.compose.plan import Plan, plan
from heddle.errors import HeddleError, HeddleErrors
from heddle.folder_api import dashboard as dashboard
from heddle.folder_api import evaluate as evaluate
from heddle.folder_api import event_files as event_files
from heddle.folder_api import import_model as import_model
from heddle.folder_api import plots as plots
from heddle.folder_api import replay as replay
from heddle.folder_api import report as report
from heddle.folder_api import reuse_policy as reuse_policy
from heddle.folder_api import table as table
from heddle.folder_api import verify as verify
from heddle.specs import Difference, SpecFile, differences
from heddle.specs.base import Duration
from heddle.specs.named_files import file_problems
from heddle.specs.space_cut import Cut

if TYPE_CHECKING:
    from heddle.compose.hf.export import ExportResult
    from heddle.doctor import Diagnosis
    from heddle.search.progress import Progress
    from heddle.search.record import Run
    from heddle.search.training import TrainRun

RUNS = Path("runs")


def init(path: Path | str = "spec.yaml", *, of: str | None = None, force: bool = False) -> Path:
    """Write a commented starter spec to `path`, or the spec of the zoo that is called `of`.

    Either names the schema where `heddle schema --out heddle.schema.json` puts it, beside the spec.

    Raises:
        HeddleError: "file-exists" unless `force`; "bad-argument" for a name that the zoo has not.
    """
    from heddle.search.durable import write_whole
    from heddle.specs.zoo_files import zoo_text

    target = Path(path)
    if target.exists() and not force:
        raise HeddleError("file-exists", f"{target} is there already", hint="--force overwrites it")
    starter = resources.files("heddle").joinpath("starter.yaml")
    text = starter.read_text(encoding="utf-8") if of is None else zoo_text(of)
    write_whole(target, text.replace("$schema=../../../docs/", "$schema=", 1).encode())
    return target


def doctor() -> Diagnosis:
    """Versions, devices, and whether the packages import and the kernels compute right."""
    from heddle.doctor import diagnose

    return diagnose()


def check(path: Path | str) -> SpecFile:
    """The spec in `path`, read and planned, so that a file which passes can be built; text and tokenizer that it names are there.

    Raises:
        HeddleErrors: every error of the file, each with its place; else what is wrong with the files that `data` and `tokenizer`
            name, as far as their first bytes tell.
    """
    return _with_files(_read(path))


def _planned(path: Path | str) -> tuple[SpecFile, Plan]:
    file = specs.load(path)
    return file, plan(file.spec.model, where=file.where)


def _read(path: Path | str) -> SpecFile:
    return _planned(path)[0]


def _with_files(file: SpecFile, *, is_trained: bool = False) -> SpecFile:
    if wrong := file_problems(file.spec, file.where, is_trained=is_trained):
        raise HeddleErrors(wrong)
    return file


def cut(file: SpecFile) -> Cut:
    """What `search.export.must_fit` leaves of the space of a file, and what it leaves out; without one the file as it is.

    Raises:
        HeddleError: "target-mismatch", where nothing of the space fits.
    """
    if file.spec.search is None or file.spec.search.export is None:
        return Cut(file, file)
    from heddle.compose.targets.cut import cut_to_targets

    return cut_to_targets(file)


def show(path: Path | str, *, context: int | None = None, batch: int = 1) -> dict[str, Any]:
    """What a spec builds, as plain data: parameters, FLOPs, cache and state bytes, by layer and in total.

    Raises:
        HeddleErrors: as `check` of the file itself, and as `cut`.
    """
    file = _read(path)
    found = cut(file)
    model = file.spec.model
    planned = plan(model, where=file.where)
    context = model.context_length if context is None else context
    return {
        "name": file.spec.name,
        "hash": specs.spec_hash(model),
        "context": context,
        "batch": batch,
        "space": _space(file)
        | ({"left": _space(found.file), "cut": list(found.removed)} if found.removed else {}),
        "parameters": planned.parameters,
        "active_parameters": planned.active_parameters,
        "layers": [layer.summary(context, batch) for layer in planned.layers],
        "cost": planned.cost(context, batch),
    }


def _space(file: SpecFile) -> dict[str, Any]:
    """How many values are open, the placement among them, and how many settings they have; null if nobody can count them."""
    size = file.space.size()
    count = len(file.space.parameters) + (file.space.placement is not None)
    return {"open": count, "size": None if math.isinf(size) else int(size)}


def graph(
    path: Path | str, out: Path | str | None = None, *, form: Literal["text", "mermaid", "svg"] = "text"
) -> str:
    """The graph that a spec is compiled to: a line for each node, a Mermaid flowchart, or an SVG picture; written to `out`.

    Raises:
        HeddleErrors: as `check`; "disk-full".
    """
    from heddle.compose.diagram import mermaid
    from heddle.compose.picture import svg
    from heddle.search.durable import write_whole

    file = _read(path)
    planned = plan(file.spec.model, where=file.where)
    drawn = {"mermaid": mermaid, "svg": svg}.get(form)
    text = f"{planned}\n" if drawn is None else drawn(planned)
    if out is not None:
        write_whole(Path(out), text.encode())
    return text


def position_bias(path: Path | str, *, length: int | None = None) -> dict[str, Any]:
    """Which tokens the masks of a spec favour before any training, at sequences of `length` tokens (128 if not given).

    Raises:
        HeddleErrors: as `check`; "bad-argument" for a length it cannot look at token by token.
    """
    from heddle.compose.position_bias import MAX_LENGTH, POSITIONS
    from heddle.compose.position_bias import position_bias as analyse

    file = _read(path)
    length = min(POSITIONS, file.spec.model.context_length) if length is None else length
    if not 1 <= length <= MAX_LENGTH:
        raise HeddleError("bad-argument", f"position bias is for 1 to {MAX_LENGTH} tokens, not {length}")
    found = analyse(plan(file.spec.model, where=file.where), length)
    return {"name": file.spec.name, **found.data()}


def targets(path: Path | str) -> dict[str, Any]:
    """Which native classes of transformers hold the spec's model exactly, which field forbids each other one, and which servers
    would take it; open values count at their defaults, and `defaults` tells whether there are some. `warning` is what all
    targets do wrong with the model, or empty.

    Raises:
        HeddleErrors: as `check`.
    """
    return _targets(*_planned(path))


def check_with_targets(path: Path | str) -> tuple[SpecFile, dict[str, Any]]:
    """`check` and `targets` in one."""
    file, planned = _planned(path)
    return _with_files(file), _targets(file, planned)


def _targets(file: SpecFile, planned: Plan) -> dict[str, Any]:
    from heddle.compose.targets.report import padding_warning, target_rows

    rows = target_rows(planned.runtime())
    for refused in (one for row in rows for one in row["refused"]):
        refused["line"] = file.where(refused["path"]).line if refused["path"] else None
    told = {
        "name": file.spec.name,
        "hash": specs.spec_hash(file.spec.model),
        "defaults": file.space.size() > 1,
    }
    return {**told, "warning": padding_warning(planned), "targets": rows}


def diff(left: Path | str, right: Path | str) -> list[Difference]:
    """What differs between two specs, layer by layer; nothing for two spellings of one.

    Raises:
        HeddleErrors: as `check`.
    """
    return differences(_read(left).spec, _read(right).spec)


def schema() -> dict[str, Any]:
    """The JSON schema of a spec file."""
    return specs.json_schema()


def train(
    path: Path | str,
    out: Path | str | None = None,
    *,
    seed: int | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
) -> TrainRun:
    """Train the one model of the spec in `path` on its data, into the folder `out` or a new one under runs/.

    Raises:
        HeddleErrors: as `check`; "run-exists", "disk-full", "corpus-missing", "loss-not-finite" …
    """
    from heddle.search.training import train as train_spec

    file = _with_files(_read(path), is_trained=True)
    folder = fresh_folder(f"{file.spec.name}-train") if out is None else Path(out)
    return train_spec(file, folder, seed=seed, on_step=on_step)


def run_folder(path: Path | str, out: Path | str | None = None, *, resume: bool = False) -> Path:
    """Where a search of the spec in `path` goes: `out`, or a folder under runs/ that is not there yet.

    Raises:
        HeddleError: "bad-argument" when a run shall be resumed but is not named.
    """
    if out is not None:
        return Path(out)
    if resume:
        raise HeddleError("bad-argument", "--resume needs the run's folder", hint="name it with --out")
    return fresh_folder(specs.load(path).spec.name)


def search(
    path: Path | str,
    out: Path | str | None = None,
    *,
    trials: int | None = None,
    time: float | str | None = None,
    resume: bool = False,
    storage: str | None = None,
    ray_address: str | None = None,
    progress: Progress | None = None,
    deterministic: bool = False,
) -> Run:
    """Search the space of the spec in `path`, export the winner and write the report.

    `time` is in seconds, or as in a spec ("30m"); for the others see `heddle.search.run.search`.

    Raises:
        HeddleErrors: as `check`; "run-exists", "run-mismatch", "run-locked", "disk-full" …
    """
    seconds = None if time is None else _seconds(time)
    file = _read(path)
    folder = run_folder(path, out, resume=resume)
    from heddle.search.record import RUN_FILE
    from heddle.search.run import search as search_spec

    try:
        return search_spec(
            file,
            folder,
            trials=trials,
            time=seconds,
            resume=resume,
            storage=storage,
            ray_address=ray_address,
            progress=progress,
            deterministic=deterministic,
        )
    finally:
        # Also after Ctrl-C or a failure: what was measured by then is worth a look.
        if (folder / RUN_FILE).exists():
            report(folder)


def _seconds(time: float | str) -> float:
    try:
        return TypeAdapter(Duration).validate_python(time)
    except ValidationError as error:
        told = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise HeddleError("bad-argument", f"time {time!r}: {told}") from None


def export(
    run: Path | str,
    out: Path | str,
    *,
    trial: str | int = "best",
    force: bool = False,
    max_shard_size: str = "50GB",
    target: str = "auto",
    battery: str = "auto",
) -> ExportResult:
    """Write the model of `run`, a search, a training, a folder that was imported or a spec file (whose weights are then
    random), as a Hugging Face folder; `force` replaces it.

    `target` is the name of a native class of transformers (`targets`), "remote" for code in the folder, or "auto": the first
    class that holds the model exactly, else "remote".

    Weights of more than `max_shard_size` are spread over several files. `battery` says which checks the folder must pass: "full",
    "short", "none" (its logits alone), or "auto": all, where that takes less than a minute.

    Raises:
        HeddleError: "run-not-found", "file-exists", "no-weights" (with the command that trains that trial),
            "target-mismatch" (with each field that forbids it) …
    """
    from heddle.search.export import export_run

    how = {"target": target, "max_shard_size": max_shard_size, "battery": battery}
    return export_run(run, out, trial=trial, overwrite=force, **how)


def fresh_folder(name: str) -> Path:
    """runs/<name>, or runs/<name>-2 and so on: the first that is not there."""
    folder, number = RUNS / name, 1
    while folder.exists():
        number += 1
        folder = RUNS / f"{name}-{number}"
    return folder


def errors_as_data(error: HeddleError) -> dict[str, Any]:
    """What a command with --json prints when it fails."""
    return {"ok": False, "errors": [error_as_data(one) for one in error.errors]}


def error_as_data(error: HeddleError) -> dict[str, Any]:
    """An error or a warning as --json prints it, with its place."""
    where = error.where
    place = {"file": where.file, "line": where.line, "column": where.column, "path": where.path}
    return {"code": error.code, **place, "message": error.what, "hint": error.hint}
