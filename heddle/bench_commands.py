"""`heddle bench`, which `heddle.cli` adds to its commands: a spec, a space of specs, or the kernels, on this machine."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from heddle.command_options import Batch, Context, Json, Phase, example
from heddle.errors import HeddleError

if TYPE_CHECKING:
    from heddle.search.latency_model.model import LatencyModel, PlaceFit

app = typer.Typer()


@app.command(
    epilog=example(
        "heddle bench spec.yaml --context 8192 --phase decode",
        "heddle bench space.yaml --fit",
        "heddle bench --ops",
        "heddle bench --tune --op gla",
    )
)
def bench(
    file: Annotated[
        Path | None, typer.Argument(metavar="[SPEC]", help="Spec file.", show_default=False)
    ] = None,
    ops: Annotated[bool, typer.Option("--ops", help="Time the kernels instead of a spec.")] = False,
    tune: Annotated[
        bool,
        typer.Option("--tune", help="Search faster launches of the kernels for this GPU, and keep them."),
    ] = False,
    op: Annotated[
        list[str] | None,
        typer.Option(
            help="With --tune: an op to tune; all if not given. May be given again.", show_default=False
        ),
    ] = None,
    fit: Annotated[
        bool, typer.Option("--fit", help="Fit a latency model of the spec's space, for its search to go by.")
    ] = False,
    context: Context = None,
    batch: Batch = 1,
    phase: Annotated[Phase, typer.Option(help="What to time; both: prefill and decode.")] = Phase.both,
    stacks: Annotated[
        int | None, typer.Option(min=2, help="With --fit: specs to fit on; three a coefficient if not given.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="With --fit: a file to write the model to as well.")
    ] = None,
    precision: Annotated[
        float | None,
        typer.Option(
            min=1e-3, max=1.0, help="With --fit: width of a 95 % interval over its median to stop at; 0.01."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Measure the latency of a spec's model, of a space of specs, or of the kernels, on this machine."""
    from heddle import api, terminal

    if (ops, tune, file is not None).count(True) != 1:
        raise HeddleError("bad-argument", "heddle bench takes a SPEC, --ops or --tune, one of them")
    if op and not tune:
        raise HeddleError("bad-argument", "--op is for --tune")
    if not fit and (stacks, out, precision) != (None, None, None):
        raise HeddleError("bad-argument", "--stacks, --out and --precision are for --fit")
    if file is None:
        if fit:
            raise HeddleError("bad-argument", "--fit takes a SPEC whose space it fits")
        if tune:
            _tune(op, json=json)
            return
        rows = api.bench_ops()
        terminal.show_json(rows) if json else terminal.show_ops(rows)
        return
    place: dict[str, Any] = {"context": context, "batch": batch, "phases": phase.phases}
    if not fit:
        timings = api.bench(file, **place)
        terminal.show_json(timings) if json else terminal.show_timings(timings)
        return
    tell = _silent if json else _tell
    model, path = api.bench_fit(file, out, stacks=stacks, precision=precision, on_stack=tell, **place)
    terminal.show_json({**model.data(), "file": str(path)}) if json else _show(model, path, file)


def _tune(names: list[str] | None, *, json: bool) -> None:
    from heddle import api, terminal

    tell = (lambda _: None) if json else (lambda line: typer.echo(line, err=True))
    found, path = api.bench_tune(names, report=tell)
    if json:
        terminal.show_json([*map(asdict, found)])
        return
    for one in found:
        gain = (
            f"{one.shipped_ms:.4f} ms as shipped, now {one.found_ms:.4f}"
            if one.launches
            else "as shipped is best"
        )
        typer.echo(f"{one.op}: {gain} ({one.tried} tried)")
    if any(one.launches for one in found):
        terminal.next_steps(f"wrote {path}", ["heddle bench --ops   # the kernels with what was found"])


def _silent(done: int, total: int, known: bool) -> None:
    """Nothing: a program reads the output."""


def _tell(done: int, total: int, known: bool) -> None:
    typer.echo(f"stack {done} of {total}: {'in the table' if known else 'timing'}", err=True)


def _show(model: LatencyModel, path: Path, spec: Path) -> None:
    from heddle import terminal

    screen = terminal.console()
    screen.print(f"{model.environment['device']}, {model.environment['dtype']}", style="bold")
    for fit in model.fits:
        _show_fit(model, fit)
    done = f"wrote {path}"
    terminal.next_steps(done, [f"heddle search {spec}   # with latency: model under search"])


def _show_fit(model: LatencyModel, fit: PlaceFit) -> None:
    """The terms, the meetings, and the held-out errors in plain sentences."""
    from rich.table import Table

    from heddle import terminal
    from heddle.search.latency_model.model import RANDOM

    screen, weights = terminal.console(), fit.sum.weights
    screen.print()
    timer = f"{fit.method}, beside {fit.reference} ({fit.reference_ms:.3f} ms)"
    read = {None: "", RANDOM: ", of random tokens"}.get(fit.reads, f", of tokens of task {fit.reads}")
    screen.print(f"{fit.place.label}: {timer}{read}", style="bold")
    table = Table("term", "ms", box=None, pad_edge=False, header_style="dim")
    constants = [ms for name, ms in weights.items() if name[0] == "frame"]
    for ms in constants:
        table.add_row("without layers", f"{ms:.4f}")
    for name, ms in weights.items():
        if name[0] == "term":
            table.add_row(f"a layer of {model.labels[name[1]]}", f"{ms:.4f}")
    for name, ms in weights.items():
        if name[0] == "pair":
            table.add_row(f"{model.labels[name[1]]} | {model.labels[name[2]]}", f"{ms:+.4f}")
    screen.print(table)
    for line in held_out_lines(fit):
        screen.print(line, soft_wrap=True)


def held_out_lines(fit: PlaceFit) -> list[str]:
    """What the held-out errors are, and what they mean."""
    from heddle.search.latency_model.told import no_better_than

    seen = fit.held_out
    lines = [
        f"fitted on {fit.measured} stacks: {fit.sum.way.told} (cross-validated error {_percent(fit.crossed)})",
        f"{seen.n} held-out stacks, slowest {seen.span:.2f} times the fastest: MAPE {_percent(seen.mape)}, worst "
        f"{_percent(seen.worst)}, Spearman {seen.spearman:.3f}, bias {100 * seen.bias:+.1f} %",
        f"for comparison: one number for all {_percent(seen.constant_mape)}, a line in FLOPs {_percent(seen.flops_mape)}",
    ]
    if seen.bias_near_budget is not None:
        near = f"{seen.near_budget} stacks within a fifth of the budget"
        lines.append(f"bias near the budget ({near}): {100 * seen.bias_near_budget:+.1f} %")
    if seen.margin is None:
        lines.append("too few were held out for a margin: a search will time every spec")
    else:
        lines.append(
            f"margin {_percent(seen.margin)} of the prediction: 95 of 100 specs like these are measured within it; a search "
            "leaves out what is over its budget by more"
        )
    simpler = no_better_than(seen.mape, seen.constant_mape, seen.flops_mape)
    if simpler is not None:
        lines.append(f"the model is no better than {simpler}: do not go by it here")
    lines += [] if fit.timings is None else fit.timings.told
    if fit.method == "cpu-timer":
        lines.append("timed by the wall clock of a CPU, whatever else runs on it")
    if fit.taken_over:
        lines.append(f"{fit.taken_over} rows are of older software; the sentinels agreed within 2 %")
    return lines


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"
