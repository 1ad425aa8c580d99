"""Training curves as the event files that TensorBoard reads; needs the package tensorboard, no TensorFlow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from heddle.dashboards import data
from heddle.errors import HeddleError
from heddle.search.record import Run, Score, Trial

MISSING = HeddleError(
    "package-missing", "event files need tensorboard", hint="pip install 'heddle-lm[tensorboard]'"
)


def write_events(run: Run, folder: Path, trials: Iterable[Trial] | None = None) -> list[Path]:
    """One event file for each trial with a training curve, in a folder of `folder` that is named after the trial.

    Tags are `loss/TASK` in nats per token over the steps, and `score/TASK` at the last one. Without `trials` all of the
    run and its reference are written.

    Raises:
        HeddleError: "package-missing".
    """
    try:
        from tensorboard.summary.writer.record_writer import RecordWriter
    except ModuleNotFoundError:
        raise MISSING from None
    written = []
    for trial in data.with_reference(run) if trials is None else trials:
        if not any(score.losses for score in trial.scores.values()):
            continue
        path = folder / name_of(trial) / "events.out.tfevents.0.heddle"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            writer = RecordWriter(file)
            for event in _events(trial, _began(run)):
                writer.write(event)
        written.append(path)
    return written


def name_of(trial: Trial) -> str:
    """The trial's folder, and so its name in TensorBoard."""
    return f"trial-{trial.number:04d}" if trial.number >= 0 else "reference"


def _events(trial: Trial, began: float) -> Iterator[bytes]:
    from tensorboard.compat.proto.event_pb2 import Event

    yield Event(wall_time=began, file_version="brain.Event:2").SerializeToString()
    for task, score in trial.scores.items():
        for step, loss in score.losses:
            yield _scalar(f"loss/{task}", loss, step, _at(score, step, began))
        if score.losses:
            last = score.losses[-1][0]
            yield _scalar(f"score/{task}", score.value, last, _at(score, last, began))


def _scalar(tag: str, value: float, step: int, at: float) -> bytes:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
    found: bytes = Event(wall_time=at, step=step, summary=summary).SerializeToString()
    return found


def _at(score: Score, step: int, began: float) -> float:
    """When a step was made, if the training had begun with the run and went at one pace; the run knows no more."""
    return began + score.wall_s * step / max(1, score.losses[-1][0])


def _began(run: Run) -> float:
    created: Any = run.meta.get("created")
    with suppress(TypeError, ValueError):
        return datetime.fromisoformat(created).timestamp()
    return 0.0
