"""Evaluations behind the ledger: what is asked for is looked up there, else done in a worker and written
there."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from heddle.search.device_kinds import require_device
from heddle.search.durable import write_whole
from heddle.search.events import EventLog
from heddle.search.ledger import Entry, Ledger, key_of
from heddle.search.record import WEIGHTS_FOLDER, Latency
from heddle.search.results import Evaluation
from heddle.search.workers import Answer, Job, Workers

LATENCY = "latency"
# Where the spec sets no limit: so many times the longest evaluation of the stage, and no less than these seconds.
TIMES_THE_LONGEST, LEAST_LIMIT_S = 20.0, 600.0
LOGS_FOLDER = "logs"
# Before the digest in the name of weights that specs share, which no spec on the front decides about.
SHARED_WEIGHTS = "supernet-"


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
    # From a lockfile: the "result" or the "reason" that stand for making the call.
    known: Mapping[str, Any] | None = None
    # So many times as long as the search's own, where it is longer; a limit of time grows with it.
    times: float = 1.0
    # Whether it is one of several trainings, the best of which keeps its weights (`Evaluations.keep_weights`).
    is_one_of_several: bool = False

    key: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", key_of(self.inputs))

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
        timeout: float | None = None,
    ) -> None:
        self._folder, self._log, self._workers = folder, log, workers
        self._on_tick, self._is_stopping = on_tick, is_stopping
        self.ledger = Ledger(folder / "ledger")
        # Starts of each evaluation, also those of sessions that died in the middle of it.
        self._starts = Counter(
            _place(event) for event in log.events if event["event"] == "evaluation_started"
        )
        # How long the longest evaluation of each stage took that came to its end.
        self._timeout, self._longest = timeout, dict[str, float]()
        for event in log.events:
            if event["event"] == "evaluation_finished" and event["ok"]:
                self._note(event["stage"], event["wall_s"])
        self.flying = 0
        self._room: tuple[int, int] | None = None
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
        for request in missing.values():
            if request.known is not None:
                self._put(request, request.known["result"], request.known["reason"], attempts=0)
        jobs = [
            Job(request.call, request.arguments, request, limit_s=self._limit(request))
            for request in missing.values()
            if request.known is None
        ]
        for answer in run(jobs, self):
            self.flying -= 1
            self._write(answer)

    def _limit(self, request: Request) -> float | None:
        """Seconds an evaluation may take: what the spec says, else far more than any took so far."""
        if self._timeout is not None:
            return self._timeout * request.times
        if request.stage not in self._longest:
            return None
        return max(LEAST_LIMIT_S, TIMES_THE_LONGEST * self._longest[request.stage])

    def _note(self, stage: str, wall_s: float) -> None:
        self._longest[stage] = max(wall_s, self._longest.get(stage, 0.0))

    def seconds_for(self, trainings: int) -> float:
        """How long so many trainings side by side take, at the pace of this session's."""
        return trainings * self._trained_s / max(1, self.trained) / self._workers.parallel

    def share(self, value: Any) -> Any:
        """A ticket for `value`, as `Workers.share` gives it."""
        return self._workers.share(value)

    def kept_weights(self, spec: str) -> Any:
        """A ticket for the bytes of the weights that the run keeps of a spec; None where it keeps none."""
        path = weights_path(self._folder, spec)
        return self.share(path.read_bytes()) if path.exists() else None

    def begun(self, jobs: Sequence[Job]) -> None:
        """Jobs go to workers."""
        room = self._workers.parallel, self._workers.gpus
        if room != self._room:
            self._room = room
            self._log.write("workers", parallel=room[0], gpus=room[1])
        self._starts.update(job.tag.place for job in jobs)
        # A job that is made again after its process died is still the same one in flight.
        self.flying += sum(job.attempt == 1 for job in jobs)
        told = [{**_fields(job.tag), "attempt": self._starts[job.tag.place]} for job in jobs]
        self._log.write_all("evaluation_started", told)

    def placed(self, job: Job, place: Mapping[str, Any]) -> None:
        """Its worker told where it runs."""
        self._log.write("evaluation_placed", **_fields(job.tag), node=place["node"], gpus=place["gpus"])

    def tick(self) -> None:
        self._on_tick()

    def is_stopping(self) -> bool:
        return self._is_stopping()

    def _write(self, answer: Answer) -> None:
        """Make one answer durable: weights before the entry that speaks of them."""
        request: Request = answer.job.tag
        result = self._result(request, answer.value) if answer.ok else None
        reason = None if answer.ok else {"code": str(answer.code), "message": answer.message}
        if result is not None and (wrong := _not_finite(result)) is not None:
            result, reason = None, {"code": "evaluation-failed", "message": wrong}
        if reason is None:
            self._note(request.stage, answer.wall_s)
        if request.stage != LATENCY:
            self.trained, self._trained_s = self.trained + 1, self._trained_s + answer.wall_s
        if answer.log:
            name = f"{request.number:04d}-{request.stage}-{request.key}.log"
            write_whole(self._folder / LOGS_FOLDER / name, answer.log.encode())
        attempts = self._starts[request.place]
        self._put(request, result, reason, attempts=attempts, wall_s=answer.wall_s)
        told = {} if reason is None else {"reason": reason}
        self._log.write(
            "evaluation_finished", **_fields(request), ok=reason is None, wall_s=answer.wall_s, **told
        )
        self._on_tick()

    def _put(self, request: Request, result: Any, reason: Any, **spent: Any) -> None:
        spec, stage, key = request.place
        self.ledger.put(Entry(spec, stage, key, request.inputs, result, reason, **spent))

    def _result(self, request: Request, value: Any) -> dict[str, Any]:
        if isinstance(value, Latency):
            require_device(value.device, request.inputs.get("environment", {}).get("device"))
            return asdict(value)
        assert isinstance(value, Evaluation)
        if value.weights is not None:
            key = request.key if request.is_one_of_several else ""
            write_whole(weights_path(self._folder, request.spec, key), value.weights)
        return value.result

    def keep_weights(self, spec: str, key: str) -> None:
        """Of the trainings of `spec` with several learning rates keep the weights of this one alone."""
        path = weights_path(self._folder, spec, key)
        if path.exists():
            path.replace(weights_path(self._folder, spec))
        for other in path.parent.glob(f"{spec}.*.safetensors"):
            other.unlink()


def _not_finite(result: Mapping[str, Any]) -> str | None:
    """What is wrong with a result that holds nan or infinity, which JSON has no word for and no sampler can use."""
    try:
        json.dumps(result, allow_nan=False)
    except ValueError:
        values = (
            name for name, value in result.items() if isinstance(value, float) and not math.isfinite(value)
        )
        name = next(values, None)
        return f"{name or 'a figure of the result'} is {result[name] if name else 'not finite'}"
    return None


def weights_path(folder: Path, spec: str, key: str = "") -> Path:
    """Where the run keeps the weights of a spec, if it does; with `key` those of one of several trainings, until one is best."""
    return folder / WEIGHTS_FOLDER / f"{spec}{'.' * bool(key)}{key}.safetensors"


def _fields(request: Request) -> dict[str, Any]:
    return {"number": request.number, "hash": request.spec, "stage": request.stage, "key": request.key}


def _place(event: dict[str, Any]) -> tuple[str, str, str]:
    return event["hash"], event["stage"], event["key"]
