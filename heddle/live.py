"""Progress while a search or a training runs: a live board in a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from heddle import terminal
from heddle.dashboards import words
from heddle.search.progress import Progress, Silent, Status
from heddle.search.record import Run, Score, Trial

OnStep = Callable[[int, int, float], None]
# A plain log gets a line about a training this often.
SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def searching(*, quiet: bool) -> Iterator[Progress]:
    """The progress to hand to a search: silent, live in a terminal, or plain lines."""
    screen = terminal.console()
    if quiet:
        yield Silent()
    elif screen.is_terminal:
        board = Board(screen)
        with Live(board, console=screen, refresh_per_second=4, transient=True):
            yield board
    else:
        yield Lines(screen)


@contextmanager
def training(*, quiet: bool) -> Iterator[OnStep | None]:
    """The callback to hand to a training: none when quiet, else a line or a bar with step and loss."""
    screen = terminal.console()
    if quiet:
        yield None
    elif screen.is_terminal:
        with Live("", console=screen, refresh_per_second=4, transient=True) as live:
            yield lambda done, steps, loss: live.update(
                _bar(done, steps, f"step {done} of {steps}, loss {loss:.4f}")
            )
    else:
        yield _lines_about_steps(screen)


def _lines_about_steps(screen: Console) -> OnStep:
    last = -SECONDS_BETWEEN_LINES

    def on_step(done: int, steps: int, loss: float) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES or done == steps:
            last = now
            screen.print(f"step {done} of {steps}, loss {loss:.4f}")

    return on_step


class Lines:
    """One plain line for each thing that happens."""

    def __init__(self, screen: Console) -> None:
        self._screen = screen
        self._status: Status | None = None

    def started(self, run: Run, total: int) -> None:
        self._say(f"search {run.name} in {run.path}, {total} trials")

    def phase(self, name: str, detail: str) -> None:
        if detail:
            self._say(f"{name}: {detail}")

    def trial_started(self, trial: Trial) -> None:
        pass

    def trial_finished(self, trial: Trial) -> None:
        self._say(f"{trial_line(trial)}{self._counts()}")

    def status(self, status: Status) -> None:
        self._status = status

    def message(self, text: str, level: str = "info") -> None:
        self._say(text if level == "info" else f"{level}: {text}")

    def finished(self, run: Run) -> None:
        self._say(f"done in {words.duration_text(run.wall_s)}")

    def _counts(self) -> str:
        status = self._status
        if status is None:
            return ""
        left = "" if status.seconds_left is None else f", {words.duration_text(status.seconds_left)} left"
        counts = f"{status.done} of {status.total} done, {status.running} running, {status.failed} failed"
        best = "" if status.best is None else f", best so far trial {status.best.number}"
        return f"   [{counts}{best}{left}]"

    def _say(self, line: str) -> None:
        self._screen.print(line, soft_wrap=True)


class Board:
    """A live board: phase, counts, a bar, the best score of each task so far, the latest news."""

    def __init__(self, screen: Console) -> None:
        self._screen = screen
        self._title = ""
        self._phase = "starting"
        self._status: Status | None = None
        self._seen_at = time.monotonic()
        self._best: dict[str, tuple[Trial, Score]] = {}
        self._higher: dict[str, bool] = {}

    def started(self, run: Run, total: int) -> None:  # noqa: ARG002 - the status tells it too
        self._title = f"{run.name}   {run.path}"
        self._higher = {task.name: task.higher_is_better for task in run.tasks}
        for trial in run.trials:
            self._remember(trial)

    def phase(self, name: str, detail: str) -> None:
        self._phase = f"{name}: {detail}" if detail else name

    def trial_started(self, trial: Trial) -> None:
        pass

    def trial_finished(self, trial: Trial) -> None:
        self._remember(trial)
        self._screen.print(trial_line(trial), style="red" if trial.state == "failed" else "dim")

    def status(self, status: Status) -> None:
        self._status, self._seen_at = status, time.monotonic()

    def message(self, text: str, level: str = "info") -> None:
        self._screen.print(text, style="yellow" if level == "warning" else None)

    def finished(self, run: Run) -> None:
        self._phase = f"done in {words.duration_text(run.wall_s)}"

    def _remember(self, trial: Trial) -> None:
        if not trial.feasible or trial.number < 0:
            return
        for name, score in trial.scores.items():
            held = self._best.get(name)
            gain = 1.0 if held is None else score.value - held[1].value
            if gain > 0 if held is None or self._higher.get(name, True) else gain < 0:
                self._best[name] = (trial, score)

    def __rich__(self) -> Group:
        parts: list[Text | Table] = [Text(self._title, style="bold"), Text(self._phase, style="cyan")]
        if self._status is not None:
            parts.append(self._counted(self._status))
        for name, (trial, score) in self._best.items():
            parts.append(
                Text(f"best {name}: {words.score_text(score)} (trial {trial.number})", style="green")
            )
        parts.append(Text("Ctrl-C finishes what runs and stops; twice stops now", style="dim"))
        return Group(*parts)

    def _counted(self, status: Status) -> Table:
        since = time.monotonic() - self._seen_at
        left = ""
        if status.seconds_left is not None and status.done < status.total:
            left = f", about {words.duration_text(max(0.0, status.seconds_left - since))} left"
        spent = words.duration_text(status.elapsed_s + since)
        counts = f"{status.done} of {status.total} done, {status.running} running"
        pruned = f"{status.pruned} pruned, " if status.pruned else ""
        lost = f"{pruned}{status.infeasible} over budget, {status.failed} failed"
        return _bar(status.done, status.total, f"{counts}, {lost}; {spent}{left}")


def _bar(done: int, total: int, text: str) -> Table:
    row = Table.grid(padding=(0, 1))
    row.add_row(ProgressBar(total=max(total, 1), completed=done, width=24), Text(text))
    return row


def trial_line(trial: Trial) -> str:
    """A told trial in one line: its state, scores, ratios or the reason."""
    name = f"trial {trial.number}" if trial.number >= 0 else "reference"
    parts = [f"{name} {words.STATE_WORDS.get(trial.state, trial.state)}"]
    parts += [
        f"{name} {words.score_text(score)}{words.rate_text(trial, name)}"
        for name, score in trial.scores.items()
    ]
    parts += [
        f"{label} {words.ratio_text(seen)}" for label, seen in trial.latency.items() if seen.ratio is not None
    ]
    parts += [words.rungs_text(trial)] if trial.state == "pruned" else []
    if trial.reason and trial.state == "failed":
        parts.append(trial.reason)
    return "; ".join(parts)
