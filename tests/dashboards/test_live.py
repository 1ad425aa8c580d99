"""Progress in a terminal and in a log, fed with the events of a made-up run."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from heddle import live, terminal
from heddle.search.progress import Progress, Status
from heddle.search.record import Run, read_run

MakeRun = Callable[..., Path]


def _feed(progress: Progress, run: Run) -> None:
    progress.started(run, len(run.trials))
    progress.phase("ask", "")
    progress.phase("timing", "2 specs")
    for trial in run.trials:
        progress.trial_started(trial)
        progress.trial_finished(trial)
    status = Status("training", 3, 2, 1, 1, 13, None, elapsed_s=65.0, seconds_left=130.0)
    progress.status(status)
    progress.message("[not markup] stays", "warning")


def _console(*, is_terminal: bool) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    screen = Console(
        file=out, force_terminal=is_terminal, width=200, markup=False, highlight=False, color_system=None
    )
    return screen, out


def test_a_log_gets_plain_lines(make_run: MakeRun) -> None:
    screen, out = _console(is_terminal=False)
    run = read_run(make_run())
    lines = live.Lines(screen)
    _feed(lines, run)
    lines.trial_finished(run.trial(4))
    lines.finished(run)
    told = out.getvalue()
    assert "\x1b" not in told
    assert "timing: 2 specs" in told
    assert "trial 4 trained; mqar 90.0 ± 1.0 %" in told
    assert "trial 12 failed; loss-not-finite" in told
    assert "[3 of 13 done, 2 running, 1 failed, 2 min 10 s left]" in told
    assert "warning: [not markup] stays" in told


def test_the_board_shows_phase_counts_time_left_and_the_best_of_each_task(make_run: MakeRun) -> None:
    screen, out = _console(is_terminal=True)
    board = live.Board(screen)
    _feed(board, read_run(make_run()))
    out.truncate(0)
    screen.print(board)
    told = out.getvalue()
    assert "timing: 2 specs" in told
    assert "3 of 13 done, 2 running, 1 over budget, 1 failed" in told
    assert "about 2 min" in told
    # Higher is better for mqar, lower for text; the failed and the infeasible do not count.
    assert "best mqar: 90.0 ± 1.0 % (trial 4)" in told
    assert "best text: 2.2700 ± 0.0100 (trial 11)" in told


def test_brackets_in_names_are_no_markup(make_run: MakeRun) -> None:
    screen, out = _console(is_terminal=False)
    screen.print(terminal.front_table(read_run(make_run(name="[red]x[/red]"))))
    assert "trial 4 ★" in out.getvalue()
    lines = live.Lines(screen)
    lines.message("[red]x[/red]")
    assert "[red]x[/red]" in out.getvalue()
