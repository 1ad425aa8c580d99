"""Evaluations behind the ledger: what is asked for is looked up there, else done in a worker and written
there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from heddle.search.durable import write_whole
from heddle.search.evaluate import Evaluation
from heddle.search.events import EventLog
from heddle.search.ledger import Entry, Ledger, key_of
from heddle.search.record import WEIGHTS_FOLDER, Latency
from heddle.search.workers import Answer, Job, Workers

LATENCY = "latency"
LOGS_FOLDER = "logs"


@dataclass(frozen=True, slots=True)
class Request:
    """One evaluation of trial `number`: `call(*arguments)`, remembered under (spec, stage, digest of
    inputs)."""

    number: int
    spec: str
    stage: str
    inputs: dict[str, Any]
    call: Callable[..., Any]
    arguments: tuple[Any, ...]

    @property
    def key(self) -> str:
        return key_of(self.inputs)

    @property
    def place(self) -> tuple[str, str, str]:
        return self.spec, self.stage, self.key


class Evaluations:
    """The ledger of a run with workers behind it. `on_tick` and `is_stopping` are the driver's."""

    def __init__(
        self,
        folder: Path,
        log: EventLog,
        workers: Workers,
        *,
        on_tick: Callable[[], None],
        is_stopping: Callable[[], bool],
    ) -> None:
        self._folder, self._log, self._workers = folder, log, workers
        self._on_tick, self._is_stopping = on_tick, is_stopping
        self.ledger = Ledger(folder / "ledger")
        # Starts of each evaluation, also those of sessions that died in the middle of it.
        self._starts = Counter(
            _place(event) for event in log.events if event["event"] == "evaluation_started"
        )
        self.flying = 0
        # Of this session, to tell how long what is left will take.
        self.trained, self._trained_s = 0, 0.0

    def get(self, request: Request) -> Entry | None:
        """What the ledger knows of `request`; None while it is not finished."""
        return self.ledger.get(*request.place)

    def time_all(self, requests: Iterable[Request]) -> None:
        """Finish `requests` one by one, each alone on the device."""
        self._finish(requests, self._workers.on_whole_device)

    def train_all(self, requests: Iterable[Request]) -> None:
        """Finish `requests` side by side; after a stop those in flight are finished, the others are not
        begun."""
        self._finish(requests, self._workers.side_by_side)

    def _finish(self, requests: Iterable[Request], run: Callable[..., Iterable[Answer]]) -> None:
        missing = {request.place: request for request in requests if self.get(request) is None}
        jobs = [Job(request.call, request.arguments, request) for request in missing.values()]
        for answer in run(jobs, self):
            self.flying -= 1
            self._write(answer)

    def seconds_for(self, trainings: int) -> float:
        """How long so many trainings side by side take, at the pace of this session's."""
        return trainings * self._trained_s / max(1, self.trained) / self._workers.parallel

    def begun(self, job: Job) -> None:
        """A job goes to a worker."""
        request: Request = job.tag
        self._starts[request.place] += 1
        # A job that is made again after its process died is still the same one in flight.
        self.flying += job.attempt == 1
        self._log.write("evaluation_started", **_fields(request), attempt=self._starts[request.place])

    def tick(self) -> None:
        self._on_tick()

    def is_stopping(self) -> bool:
        return self._is_stopping()

    def _write(self, answer: Answer) -> None:
        """Make one answer durable: weights before the entry that speaks of them."""
        request: Request = answer.job.tag
        result = self._result(request, answer.value) if answer.ok else None
        entry = Entry(
            spec=request.spec,
            stage=request.stage,
            key=request.key,
            inputs=request.inputs,
            result=result,
            reason=None if answer.ok else {"code": str(answer.code), "message": answer.message},
            attempts=self._starts[request.place],
            wall_s=answer.wall_s,
        )
        if request.stage != LATENCY:
            self.trained, self._trained_s = self.trained + 1, self._trained_s + answer.wall_s
        if answer.log:
            name = f"{request.number:04d}-{request.stage}-{request.key}.log"
            write_whole(self._folder / LOGS_FOLDER / name, answer.log.encode())
        self.ledger.put(entry)
        reason = {} if entry.reason is None else {"reason": entry.reason}
        self._log.write(
            "evaluation_finished", **_fields(request), ok=answer.ok, wall_s=entry.wall_s, **reason
        )
        self._on_tick()

    def _result(self, request: Request, value: Any) -> dict[str, Any]:
        if isinstance(value, Latency):
            return asdict(value)
        assert isinstance(value, Evaluation)
        if value.weights is not None:
            write_whole(weights_path(self._folder, request.spec), value.weights)
        return value.result


def weights_path(folder: Path, spec: str) -> Path:
    """Where the run keeps the weights of a spec, if it does."""
    return folder / WEIGHTS_FOLDER / f"{spec}.safetensors"


def _fields(request: Request) -> dict[str, Any]:
    return {"number": request.number, "hash": request.spec, "stage": request.stage, "key": request.key}


def _place(event: dict[str, Any]) -> tuple[str, str, str]:
    return event["hash"], event["stage"], event["key"]
