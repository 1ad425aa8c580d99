"""How results look in a terminal. A run is told in the words of `heddle.dashboards.words`, as in the report.

Names of the user are printed as they are: markup is off, so that brackets in them mean nothing.
"""

from __future__ import annotations

import errno
import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from heddle.api import errors_as_data
from heddle.dashboards import words
from heddle.dashboards.doubts import closest_text
from heddle.errors import NOWHERE, HeddleError, Where
from heddle.specs import Difference, SpecFile, expand_layers
from heddle.specs.space_cut import Cut

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from heddle.doctor import Diagnosis
    from heddle.search.record import Latency, Run, Trial
    from heddle.search.training import TrainRun

# Lines in a log or a pipe need no folding at 80 columns.
WIDTH_WITHOUT_TERMINAL = 160
# Of which models targets are judged.
OF_DEFAULTS = "of the defaults of the open values; search.export.must_fit looks at the whole space"


def console(*, stderr: bool = False) -> Console:
    """The console to print to, made anew so that a redirected stream is honoured."""
    # A plain line needs no rich, and `heddle check` prints nothing else.
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else WIDTH_WITHOUT_TERMINAL
    return Console(stderr=stderr, markup=False, highlight=False, width=width)


def show_json(value: object, *, out: Path | None = None) -> None:
    """Print `value` as indented JSON, or write it to `out`."""
    text = json.dumps(value, indent=2, ensure_ascii=False, default=_plain)
    if out is None:
        print(text)
        return
    out.write_text(text + "\n", encoding="utf-8")
    next_steps(f"wrote {out}", [])


def next_steps(done: str, commands: Sequence[str]) -> None:
    """One line on what was done, and what to try next."""
    screen = console()
    screen.print(done)
    if commands:
        screen.print("\nnext:", style="dim")
        for command in commands:
            screen.print(f"  {command}", style="cyan", soft_wrap=True)


def show_error(error: HeddleError, *, as_json: bool) -> None:
    """A user's mistake or a failure with a known reason: on stderr, or as JSON on stdout for a program."""
    if as_json:
        show_json(errors_as_data(error))
    else:
        print(error, file=sys.stderr)


def show_warnings(file: SpecFile) -> None:
    """What a spec says that is legal and seldom meant, each with its place: on stderr."""
    for warning in file.warnings:
        print(f"warning: {warning}", file=sys.stderr)


def os_error(error: OSError) -> HeddleError:
    """A file or folder that cannot be read or written, as an error of ours."""
    where = Where(file=str(error.filename)) if error.filename else NOWHERE
    if error.errno == errno.ENOSPC:
        return HeddleError(
            "disk-full", "no space left on the disk", where=where, hint="free some, or name another disk"
        )
    return HeddleError("system-error", error.strerror or str(error), where=where)


def show_bug(error: Exception) -> None:
    """An error that should not have reached the user."""
    told = " ".join(str(error).split()) or "no message"
    screen = console(stderr=True)
    screen.print(f"heddle failed: {type(error).__name__}: {told}", soft_wrap=True)
    screen.print(
        "  hint: this is a bug of heddle; HEDDLE_TRACEBACK=1 shows where, please report it", soft_wrap=True
    )


def show_diagnosis(diagnosis: Diagnosis) -> None:
    """Versions, devices, and one line a check."""
    screen = console()
    versions = _table("what", "version")
    for name, version in diagnosis.versions.items():
        versions.add_row(name, version)
    devices = _table("device", "name", "memory", "detail")
    for device in diagnosis.devices:
        devices.add_row(device.kind, device.name, words.bytes_text(device.memory), device.detail)
    checks = _table("check", "", "detail")
    for check in diagnosis.checks:
        checks.add_row(
            check.name, "ok" if check.ok else "FAILED", check.detail, style=None if check.ok else "bold red"
        )
    screen.print(versions, devices, checks)
    screen.print("all well" if diagnosis.ok else "something is wrong, see above", style="bold")


def show_checked(found: Cut) -> None:
    """One line: the file is good, and how large its space is; then what the classes of must_fit leave of it."""
    file = found.whole
    spec, size = file.spec, file.space.size()
    layers = len(expand_layers(spec.model))
    space = "no search space" if size == 1 else f"a space of {_size_text(size)}"
    print(f"{file.file}: ok – {spec.name}, {layers} layers, {space}")
    if found.removed:
        print(_cut_text(found.file.space.size()))
        print("\n".join(f"  {one}" for one in found.removed))
    for name in found.unjudged:
        print(f"  blocks.{name} has too many settings to judge each; only its kinds were")


def show_fitting(found: Mapping[str, Any]) -> None:
    """A line for each target that fits; of a server as which class."""
    for row in found["targets"]:
        if row["fits"]:
            told = f"as {row['through']}" if row.get("through") else row["class"]
            print(f"  fits {row['target']:18}{told}")
    if found["defaults"]:
        print(f"  {OF_DEFAULTS}")
    print("  --targets tells what forbids the others")


def show_summary(summary: Mapping[str, Any]) -> None:
    """The layers of a model and its totals."""
    screen = console()
    cost = summary["cost"]
    screen.print(f"{summary['name']}   hash {summary['hash']}", style="bold")
    screen.print(f"context {summary['context']}, batch {summary['batch']}")
    if summary["space"]["open"]:
        size = summary["space"]["size"]
        told = _size_text(math.inf if size is None else size)
        screen.print(f"open values: {summary['space']['open']}, a space of {told}; shown at its defaults")
    if "cut" in summary["space"]:
        left = summary["space"]["left"]["size"]
        screen.print(_cut_text(math.inf if left is None else left))
        for one in summary["space"]["cut"]:
            screen.print(f"  {one}", style="dim", soft_wrap=True)
    screen.print()
    # Eighty columns hold a row; a block with a long name is what folds in a narrower terminal.
    heads = ("#", "block", "mixer", "channel", *_COST_HEADS)
    table = _table(*heads, numeric=range(4, len(heads)), whole=(0, 2, 3))
    for layer in summary["layers"]:
        table.add_row(
            str(layer["index"]), layer["block"], layer["mixer"], layer["channel"], *_cost_cells(layer)
        )
    table.add_section()
    table.add_row(
        "", "total", "", "", *_cost_cells({**cost, "parameters": summary["parameters"]}), style="bold"
    )
    screen.print(table)
    if summary["active_parameters"] < summary["parameters"]:
        active = words.count_text(summary["active_parameters"])
        screen.print(f"a token meets {active} of the parameters: of routed experts those that it is sent to")
    moved = [words.bytes_text(cost[key]) for key in ("decode_bytes", "prefill_bytes")]
    screen.print(
        f"training: {words.count_text(cost['train_flops_per_token'])} FLOPs per token; "
        f"bytes moved: {moved[0]} a decode step, {moved[1]} a prefill"
    )
    screen.print(
        "prefill, decode: FLOPs per token; total counts embeddings, the last norm and the head as well",
        style="dim",
    )


def _cut_text(left: float) -> str:
    return f"search.export.must_fit leaves {_size_text(left)} of it:"


def _size_text(size: float) -> str:
    return "countless specs" if math.isinf(size) else f"{words.count_text(size)} specs"


def show_position_bias(bias: Mapping[str, Any]) -> None:
    """What the analysis found, a line each, in words."""
    screen = console()
    needed, centre = bias["layers_to_reach_all"], bias["centre"]
    rows = {
        "a token hears back to": "all before it" if bias["reach"] is None else f"{bias['reach']} tokens",
        "all is heard after": "no layer"
        if needed is None
        else f"{needed} layer{'' if needed == 1 else 's'}, through {bias['most_hops']} mixers at most",
        "with depth, weight gathers at": f"token {centre[0]}"
        if len(centre) == 1
        else f"{len(centre)} tokens",
        "weight of the first token": f"{bias['primacy']:.3f} (evenly spread: {bias['uniform']:.3f})",
        "weight of the last 8 tokens": f"{bias['recency']:.3f}",
        "weight of one in the middle": f"{bias['middle']:.4f}",
        "mean distance": f"{bias['mean_distance']:.1f} tokens",
        "entropy": f"{bias['entropy']:.2f} nats",
    }
    screen.print(f"{bias['name']}   at {bias['length']} tokens, from the masks alone\n", style="bold")
    for name, value in rows.items():
        screen.print(f"{name:<30} {value}")


_COST_HEADS = ("params", "prefill", "decode", "KV cache", "state")


def _cost_cells(row: Mapping[str, Any]) -> list[str]:
    counts = (
        words.count_text(row[key])
        for key in ("parameters", "prefill_flops_per_token", "decode_flops_per_token")
    )
    return [*counts, *(words.bytes_text(row[key]) for key in ("cache_bytes", "state_bytes"))]


def show_differences(found: Sequence[Difference]) -> None:
    """A row for each field that differs."""
    screen = console()
    if not found:
        screen.print("the same: every layer, and how it is trained and searched")
        return
    table = _table("field", "left", "right")
    for one in found:
        table.add_row(one.path, _side(one.left), _side(one.right))
    screen.print(table)


def _side(value: object) -> str:
    if value is None:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def show_timings(timings: Sequence[Latency]) -> None:
    """Latency of a spec, a row for each phase, and the path of each mixer."""
    screen = console()
    table = _table(
        "phase",
        "batch",
        "context",
        "median [95 %]",
        "p10",
        "p90",
        "turns",
        "peak memory",
        "method",
        "dtype",
        numeric=range(1, 8),
    )
    for seen in timings:
        spread = (f"{seen.p10_ms:.3f}", f"{seen.p90_ms:.3f}")
        table.add_row(
            seen.phase,
            str(seen.batch),
            str(seen.context),
            words.latency_text(seen),
            *spread,
            str(seen.n),
            words.peak_text(seen),
            seen.method,
            seen.dtype,
        )
    screen.print(table)
    for kind, path in timings[0].paths.items():
        screen.print(f"{kind}: {words.PATH_WORDS.get(path, path)}")
    screen.print(f"device: {timings[0].device}", style="dim")


def show_ops(rows: Sequence[Mapping[str, Any]]) -> None:
    """Speed of the ops, a row for each shape and implementation, after what the machine can do at most."""
    screen = console()
    heads = ("op", "phase", "impl", "shape", "dtype", "median ms", "p10", "p90", "GB/s", "TFLOP/s")
    table = _table(*heads, numeric=range(5, len(heads)))
    for row in rows:
        shape = " ".join(f"{letter}{size}" for letter, size in row["shape"].items())
        times = (f"{row[key]:.3f}" for key in ("ms", "ms_p10", "ms_p90"))
        rates = ("–" if row[key] is None else f"{row[key]:.3g}" for key in ("gbps", "tflops"))
        table.add_row(row["op"], row["phase"], row["impl"], shape, row["dtype"], *times, *rates)
    screen.print(table)
    screen.print(f"device: {rows[0]['device']}", style="dim")


def show_trained(run: TrainRun) -> None:
    """Where a trained model lies, its score, and how to export it."""
    name, score, metric = run.record["task"]["name"], run.score, run.record["task"]["metric"]
    loss = f"training loss {run.losses[-1]:.4f} nats at the end"
    screen = console()
    told = f"{name}, {words.unit_text(metric)}: {words.value_text(metric, score.value)}"
    screen.print(f"{told} (standard error {score.se:.2g}); {loss}")
    for warning in run.warnings:
        screen.print(f"warning: {warning}", style="yellow", soft_wrap=True)
    next_steps(f"wrote {run.path}", [f"heddle export {run.path} --out {run.path.name}-hf"])


def show_run(run: Run, spec_path: Path) -> None:
    """The end of a search: the front, the best spec, where things lie, what to do next."""
    screen = console()
    screen.print()
    screen.print(words.headline(run), style="bold")
    if run.front or run.reference is not None:
        screen.print(front_table(run))
    if run.best is None and run.least_violating:
        screen.print("closest to the budget:")
        screen.print(_run_table(run, [run.trial(number) for number in run.least_violating]))
    best = run.best_trial
    if best is not None:
        for line in [
            *words.confirmation(run),
            *([] if run.longer is None else words.longer_texts(run.longer)),
        ]:
            screen.print(line)
        screen.print("\nbest spec:", style="bold")
        screen.print(best.spec.rstrip(), soft_wrap=True)
        screen.print()
    _paths(screen, run)
    next_steps("", list(_next_commands(run, spec_path)))


def front_table(run: Run) -> Table:
    """The Pareto front with the reference model, the winner marked."""
    shown = ([run.reference] if run.reference is not None else []) + list(run.front_trials)
    return _run_table(run, shown)


def _run_table(run: Run, trials: Iterable[Trial]) -> Table:
    from heddle.dashboards.data import name_of

    ratios = [budget for budget in run.budgets if budget.relative_to is not None and budget.is_timed]
    heads = [f"{task.name} {'↑' if task.higher_is_better else '↓'}" for task in run.tasks]
    heads += [f"{words.budget_name(budget)} (≤ {budget.at_most:g})" for budget in run.budgets]
    heads += [f"{budget.phase} ms" for budget in ratios]
    table = _table("spec", *heads, "layers", numeric=range(1, 1 + len(heads)))
    for trial in trials:
        mark = " ★" if trial.number == run.best else ""
        style = "bold green" if mark else "dim" if trial is run.reference else None
        times = (trial.latency.get(budget.label) for budget in ratios)
        cells = [*words.score_cells(trial, run), *words.budget_cells(trial, run)]
        cells += ["–" if seen is None else f"{seen.median_ms:.3f}" for seen in times]
        table.add_row(name_of(trial, run) + mark, *cells, words.short_layers(trial.layers), style=style)
    return table


def _paths(screen: Console, run: Run) -> None:
    places = {"report": run.path / "report.html", "model": run.export, "run": run.path}
    for name, path in places.items():
        if path is not None and path.exists():
            screen.print(f"{name + ':':<8} {path}", soft_wrap=True)


def _next_commands(run: Run, spec_path: Path) -> Iterable[str]:
    if run.status not in ("finished", "nothing-feasible"):
        yield f"heddle search {spec_path} --out {run.path} --resume"
        return
    if run.best is None:
        close = closest_text(run)
        yield f"heddle search {spec_path} --trials 100   # or raise at_most under search.budgets{close}"
        return
    yield f"heddle export {run.path} --trial best --out my-model"
    yield f"heddle train {run.path / 'best' / 'spec.yaml'} --out runs/longer"
    yield f"heddle bench {run.path / 'best' / 'spec.yaml'}"


def _table(*heads: str, numeric: Iterable[int] = (), whole: Iterable[int] = (0,)) -> Table:
    """Columns `numeric` stand to the right; they and the columns `whole` are never folded."""
    from rich.table import Table

    right = set(numeric)
    kept = right | set(whole)
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for index, head in enumerate(heads):
        justify: Literal["left", "right"] = "right" if index in right else "left"
        table.add_column(head, justify=justify, overflow="fold", no_wrap=index in kept)
    return table


def _plain(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, (Path, range)):
        return str(value)
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")
