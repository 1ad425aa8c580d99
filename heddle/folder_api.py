"""The functions of `heddle.api` that look at finished folders: models of transformers, and runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from heddle.errors import HeddleError

if TYPE_CHECKING:
    from heddle.compose.hf.battery import Battery
    from heddle.compose.hf.card import ScoreRow
    from heddle.search.import_model import ImportResult
    from heddle.search.progress import Progress
    from heddle.search.replay import Replay
    from heddle.search.reuse_policy import ReusePolicy


def verify(folder: Path | str, *, trust_remote_code: bool = False) -> Battery:
    """Every check of the parity battery on a folder of transformers, in a clean process without a network.

    The folder's own code runs only with `trust_remote_code`.

    Raises:
        HeddleError: "untrusted-code", "file-not-found", "checkpoint-broken", "pickle-refused", "export-mismatch" …
    """
    from heddle.compose.hf.battery import run_battery

    return run_battery(folder, trusted=trust_remote_code)


def evaluate(
    folder: Path | str,
    tasks: Sequence[str],
    *,
    trust_remote_code: bool = False,
    include_path: Path | str | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    device: str = "cpu",
) -> list[ScoreRow]:
    """The scores of a folder of transformers under lm-evaluation-harness, one row for each task and metric: `heddle eval`.

    Raises:
        HeddleError: "package-missing" without the extra `eval`; "bad-argument" for an unknown task; "untrusted-code" …
    """
    from heddle.compose.hf.harness import run_harness

    how: dict[str, Any] = {"include_path": include_path, "limit": limit, "batch_size": batch_size}
    return run_harness(folder, tasks, trusted=trust_remote_code, device=device, **how)


def import_model(folder: Path | str, out: Path | str) -> ImportResult:
    """Turn a checkpoint of a native class of transformers, or an export with code of its own, into a spec and weights in the new
    folder `out`, which `export` takes. No code of the folder runs.

    Raises:
        HeddleError: "import-mismatch", naming the field that a spec cannot say; "file-exists", "checkpoint-broken",
            "pickle-refused" …
    """
    from heddle.search.import_model import import_folder

    return import_folder(folder, out)


def replay(
    lock: Path | str,
    out: Path | str | None = None,
    *,
    resume: bool = False,
    deterministic: bool = False,
    storage: str | None = None,
    ray_address: str | None = None,
    progress: Progress | None = None,
) -> Replay:
    """Make the search of the lockfile `lock` again in the folder `out`, or `lock`'s folder with "-replay", and compare.

    Raises:
        HeddleErrors: as `search`; "lock-broken".
    """
    from heddle.search.record import RUN_FILE
    from heddle.search.replay import replay as make_again

    path = Path(lock)
    beside = path if path.is_dir() else path.resolve().parent
    folder = beside.with_name(f"{beside.name}-replay") if out is None else Path(out)
    how: dict[str, Any] = {"storage": storage, "ray_address": ray_address, "progress": progress}
    try:
        return make_again(path, folder, resume=resume, deterministic=deterministic, **how)
    finally:
        if (folder / RUN_FILE).exists():
            report(folder)


def report(run: Path | str, out: Path | str | None = None) -> Path:
    """Write the search in folder `run` as one HTML page; `out` defaults to report.html inside it.

    Raises:
        HeddleError: "run-not-found", "disk-full".
    """
    from heddle.dashboards.report import FILE, write_report
    from heddle.search.record import read_run

    folder = Path(run)
    return write_report(read_run(folder), folder / FILE if out is None else Path(out))


def plots(run: Path | str, folder: Path | str) -> list[Path]:
    """Write every plot of the search in folder `run` as SVG and PNG into `folder`.

    Raises:
        HeddleError: "run-not-found", "package-missing".
    """
    from heddle.dashboards.drawing import draw_all
    from heddle.search.record import read_run

    return draw_all(read_run(run), Path(folder))


def event_files(run: Path | str, folder: Path | str) -> list[Path]:
    """Write the training curves of the search in folder `run` into `folder`, as files that TensorBoard reads.

    Raises:
        HeddleError: "run-not-found", "package-missing".
    """
    from heddle.dashboards.event_files import write_events
    from heddle.search.record import read_run

    return write_events(read_run(run), Path(folder))


def table(run: Path | str, form: Literal["csv", "md", "latex"] = "md", out: Path | str | None = None) -> str:
    """The front of the search in folder `run` as Markdown or LaTeX, or all its trials as CSV; written to `out`.

    Raises:
        HeddleError: "run-not-found", "disk-full".
    """
    from heddle.dashboards.tables import table as write
    from heddle.search.durable import write_whole
    from heddle.search.record import read_run

    text = write(read_run(run), form)
    if out is not None:
        write_whole(Path(out), text.encode())
    return text


def dashboard(
    path: Path | str,
    *,
    host: str = "localhost",
    port: int = 8642,
    bench: Path | str | None = None,
    specs: Sequence[Path | str] = (),
    ready: Callable[[str], None] = print,
) -> None:
    """Serve a run, or a folder of runs, as web pages that follow them; `ready` gets the address. Ends with Ctrl-C.

    `specs` are spec files to compare with trials.

    Raises:
        HeddleError: "run-not-found", "bad-argument", "package-missing"; what is wrong with a spec.
    """
    try:
        from heddle.dashboards.server import serve
        from heddle.dashboards.site import open_site
    except ModuleNotFoundError as error:
        hint = "pip install 'heddle-lm[dashboard]'"
        raise HeddleError("package-missing", f"the dashboard needs {error.name}", hint=hint) from None
    site = open_site(Path(path), None if bench is None else Path(bench), [Path(one) for one in specs])
    serve(site, host=host, port=port, ready=ready)


def reuse_policy(run: Path | str, **how: Any) -> ReusePolicy:
    """Which layers of the trained model of `run` – a search, a training, an import – may choose blocks of keys, or take over an
    earlier layer's choice (HyLRA, arXiv 2602.00777); for `how` see `heddle.search.reuse_policy.reuse_policy`. No command yet.

    Raises:
        HeddleError: "run-not-found", "no-weights", "bad-argument", "nothing-feasible" …
    """
    from heddle.search.reuse_policy import reuse_policy as solve

    return solve(run, **how)
