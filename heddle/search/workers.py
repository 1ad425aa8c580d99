"""Ray for this search: a local cluster or one by address, and calls that say why they failed.

A timing takes the whole device, so that Ray itself lets no training run beside it. A call whose process dies, or whose
result is lost with its node, is made again, twice; an error that the call itself raised is final. The node of a worker
keeps a result until the driver has written it (docs/decisions/0007-copies-of-results.md).
"""

from __future__ import annotations

import gc
import importlib
import logging
import os
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import ray
from ray.exceptions import (
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayError,
    TaskUnschedulableError,
    WorkerCrashedError,
)

from heddle.errors import HeddleError
from heddle.search import cluster, places, said, watch
from heddle.search.cores import usable_cores
from heddle.search.device_kinds import DeviceKind
from heddle.search.in_worker import Outcome, guarded, limited
from heddle.search.nodes import SameCode
from heddle.search.own_session import own_session

# A call whose process dies is made again this often.
RETRIES = 2
MADE_AGAIN = ("worker-died", "timed-out")
# Its process or its node is gone, or with the node the result that it had given.
DIED = (WorkerCrashedError, OutOfMemoryError, NodeDiedError, ObjectLostError, TaskUnschedulableError)
# How often a waiting driver looks up: for Ctrl-C, for the display.
TICK_S = 0.5
# Threads that wait for each other sleep instead of spinning: where anything else runs on the machine, a
# spinning thread keeps the one it waits for off its core, and a 1 ms step was seen to take 490 ms.
WORKER_ENV = {"OMP_WAIT_POLICY": "PASSIVE"}
# Ray ends a process that is idle for a second, as all but one are while a spec is timed; the next would
# import torch anew, for seconds.
KEEP_IDLE_MS = 24 * 3600 * 1000
# Trainings side by side on one GPU, unless the spec says another number.
ON_ONE_GPU = 4


@dataclass(frozen=True, slots=True)
class Job:
    """`call(*arguments)` in a worker. `tag` is the caller's, to know the answer by; `attempt` counts from
    1."""

    call: Callable[..., Any]
    arguments: tuple[Any, ...]
    tag: Any
    attempt: int = 1
    # Seconds in the worker, after which its process ends itself.
    limit_s: float | None = None
    # What the attempts before this one said.
    said: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a job: a value, or the code and message of the error; `log` is what it said, and the attempts before it."""

    job: Job
    value: Any = None
    code: str | None = None
    message: str = ""
    log: str = ""
    wall_s: float = 0.0

    @property
    def ok(self) -> bool:
        return self.code is None


@dataclass(slots=True)
class Flight:
    """A job at a worker: since when, and the name under which it tells its place until that was heard; None on a CPU."""

    job: Job
    began: float
    key: str | None


class Workers:
    """A pool of Ray workers for one kind of device; use it as a context.

    `parallel` trainings run side by side: one a core on a CPU, `per_gpu` a GPU on CUDA. `env` are variables of every
    worker. Timings, and what tells of the device, run on nodes of one kind: `timed_on` where there are such.
    """

    def __init__(
        self,
        device: str | None = None,
        *,
        address: str | None = None,
        env: Mapping[str, str] | None = None,
        per_gpu: int = ON_ONE_GPU,
        timed_on: str | None = None,
    ) -> None:
        self._per_gpu, self._timed_on = per_gpu, timed_on
        self._wanted, self._address, self._env = device, address, WORKER_ENV | dict(env or {})
        self._guard: watch.Guard | None = None
        # Ray's own processes that this one started.
        self._roots: watch.Processes = {}
        self._owned = False
        self._nodes: SameCode | None = None

    def __enter__(self) -> Workers:
        if not ray.is_initialized():
            self._owned = True
            with own_session():
                self._start()
        self.device = self._wanted or ("cuda" if ray.cluster_resources().get("GPU", 0) >= 1 else "cpu")
        self.parallel = self._room()
        share = {"num_gpus": 1 / self._per_gpu} if self.device == "cuda" else {}
        # Ray ends a process after one GPU task unless told otherwise; ours take seconds to import torch.
        kept: dict[str, Any] = {"max_retries": 0, "max_calls": 0}
        self._one = ray.remote(num_cpus=1, **share, **kept)(guarded)
        self._kind = DeviceKind(self.device, self._timed_on)
        return self

    @property
    def timed_on(self) -> str | None:
        """The kind of node that is timed on, as `heddle.search.device_kinds` names it."""
        return self._kind.name

    def _room(self) -> int:
        """How many trainings the nodes of now take side by side."""
        resources = ray.cluster_resources()
        cores, gpus = int(resources.get("CPU", 1)), int(resources.get("GPU", 0))
        self.gpus = gpus if self.device == "cuda" else 0
        return max(1, min(cores, gpus * self._per_gpu) if self.device == "cuda" else cores)

    def __exit__(self, *_: object) -> None:
        if self._owned:
            ray.shutdown()
        if self._guard is not None:
            self._guard.release()

    def _start(self) -> None:
        # Ray's own lines would break into the live display; what matters reaches us as exceptions.
        logging.getLogger("ray").setLevel(logging.ERROR)
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if self._address is None:
            cores = usable_cores()
            os.environ |= {name: os.environ.get(name, value) for name, value in self._env.items()}
            self._guard = watch.Guard()
            _set_token()
            ray.init(
                address="local",
                include_dashboard=False,
                num_cpus=cores,
                _system_config={"idle_worker_killing_time_threshold_ms": KEEP_IDLE_MS},
                **options,
            )
            self._roots = watch.ray_roots(os.getpid())
            return
        self._nodes = cluster.join(self._address, self._env, **options)

    def _require_ray(self) -> None:
        """Raises HeddleError "cluster-lost" where no call can come back: Ray itself would wait for ever.

        Of Ray on this machine it is seen at once. Ray notices after some 13 s, and may then end this process without a word: its
        connection to the object store is broken (ray 2.60).
        """
        is_lost = watch.ray_roots(os.getpid()).keys() < self._roots.keys()
        if is_lost or not any(node["Alive"] for node in ray.nodes()):
            raise _cluster_lost()

    def warm_up(self) -> None:
        """Let every worker process start and import torch and transformers while the caller goes on."""
        for _ in range(self.parallel):
            self._one.remote(_import_all, self.device)

    def share(self, value: Any) -> Any:
        """A ticket for `value`, which travels to each node once however many jobs take it as an argument."""
        return ray.put(value)

    def call(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """`call(*arguments)` in a worker with a share of a device that is timed on, awaited; what it raises is raised
        here."""
        answer = ray.get(self._one.options(**self._kind.share()).remote(call, self.device, *arguments))
        if answer.error is not None:
            raise answer.error
        return answer.value

    def on_whole_device(self, jobs: Iterable[Job], watcher: Watcher) -> Iterator[Answer]:
        """Answers of `jobs`, one after the other, each with a whole device of the kind that is timed on to itself."""
        self._ask_nodes()
        return self._answers(jobs, lambda: self._one.options(**self._kind.whole()), 1, watcher)

    def side_by_side(self, jobs: Iterable[Job], watcher: Watcher) -> Iterator[Answer]:
        """Answers of `jobs` as they come, `parallel` at a time; nodes that came or went since the last ones count.

        What finds too little memory beside others on its GPU is made once more, after them, with a GPU to itself.
        """
        self._ask_nodes()
        self.parallel = self._room()
        crowded = list[Job]()
        for answer in self._answers(jobs, lambda: self._one, self.parallel, watcher):
            if answer.code == "out-of-memory" and self.device == "cuda" and self._per_gpu > 1:
                crowded.append(_again(answer))
            else:
                yield answer
        yield from self._answers(crowded, lambda: self._one.options(num_gpus=1), max(1, self.gpus), watcher)

    def _ask_nodes(self) -> None:
        """Raises HeddleError "bad-argument" where a node has come since whose heddle is another."""
        if self._nodes is not None:
            self._nodes.ask_again()
            self._nodes.require()

    def _answers(
        self, jobs: Iterable[Job], remote: Callable[[], Any], width: int, watcher: Watcher
    ) -> Iterator[Answer]:
        waiting, flying = deque(jobs), dict[Any, Flight]()

        def hand_out() -> None:
            room = 0 if watcher.is_stopping() else min(width - len(flying), len(waiting))
            some = [waiting.popleft() for _ in range(room)]
            if some:
                watcher.begun(some)
            for job in some:
                key = places.new_key() if self.device == "cuda" else None
                reference = remote().remote(_call_of(job, key), self.device, *job.arguments)
                flying[reference] = Flight(job, time.monotonic(), key)

        hand_out()
        while flying:
            done = {reference: flying.pop(reference) for reference in self._done(flying, watcher)}
            took = {reference: time.monotonic() - flight.began for reference, flight in done.items()}
            # Many workers do not wait until the answers of others are written; a timing has nothing beside it.
            if width > 1:
                hand_out()
            for reference, flight in done.items():
                answer = self._heard(flight.job, reference, round(took[reference], 3))
                if answer.code in MADE_AGAIN and flight.job.attempt <= RETRIES:
                    waiting.appendleft(_again(answer))
                else:
                    # The caller writes the answer before it comes back: until then `reference` keeps the copy that lies
                    # with the worker.
                    yield answer
            hand_out()

    def _done(self, flying: Mapping[Any, Flight], watcher: Watcher) -> list[Any]:
        """All that have an answer by now, or none within a tick."""
        done, _ = ray.wait(list(flying), timeout=TICK_S)
        if done and len(flying) > 1:
            done, _ = ray.wait(list(flying), num_returns=len(flying), timeout=0)
        _hear_places(flying.values(), watcher)
        if not done:
            self._require_ray()
        elif self._nodes is not None:
            # Ray gives work to a node as soon as it is there.
            self._nodes.require()
        watcher.tick()
        return list(done)

    def _heard(self, job: Job, reference: Any, wall_s: float) -> Answer:
        """The answer to a job that is done, with what its process said if that has died."""
        answer = _timed_out(replace(_answer(job, reference), wall_s=wall_s))
        if answer.code in MADE_AGAIN:
            self._require_ray()
            answer = replace(answer, log=said.of_dead(reference))
        return replace(answer, log=job.said + answer.log) if job.said else answer


class Watcher(Protocol):
    """What a driver hears of its jobs while it waits for answers."""

    def begun(self, jobs: Sequence[Job]) -> None:
        """`jobs` are handed to workers."""

    def placed(self, job: Job, place: Mapping[str, Any]) -> None:
        """`job` runs on the GPUs of `place`; heard of those that have some, before their answer."""

    def tick(self) -> None:
        """Called at least twice a second."""

    def is_stopping(self) -> bool:
        """True once no further job shall begin; those in flight are still answered."""


def _call_of(job: Job, key: str | None) -> Callable[..., Any]:
    call = job.call if job.limit_s is None else partial(limited, job.limit_s, job.call)
    return call if key is None else partial(places.told, key, call)


def _hear_places(flying: Iterable[Flight], watcher: Watcher) -> None:
    """Tell `watcher` where those run that have told it since."""
    for flight in flying:
        found = None if flight.key is None else places.place(flight.key)
        if found is not None:
            flight.key = None
            watcher.placed(flight.job, found)


def _again(answer: Answer) -> Job:
    """The next attempt at what `answer` has failed at."""
    job = answer.job
    told = f"{answer.log.rstrip()}\n--- attempt {job.attempt}: {answer.code}: {answer.message}\n".lstrip()
    return replace(job, attempt=job.attempt + 1, said=told)


def _timed_out(answer: Answer) -> Answer:
    """`answer`, with the reason of a process that ended itself at the limit."""
    limit = answer.job.limit_s
    if answer.code != "worker-died" or limit is None or answer.wall_s < limit:
        return answer
    return replace(answer, code="timed-out", message=f"it took more than {limit:g} s")


def _answer(job: Job, reference: Any) -> Answer:
    try:
        outcome: Outcome = ray.get(reference)
    except LocalRayletDiedError as error:
        raise _cluster_lost() from error
    except DIED as error:
        return Answer(job, code="worker-died", message=_first_line(error))
    except RayError as error:
        # Outside of the call: what it asks for could not be read there, say.
        cause = getattr(error, "cause", None)
        said = _first_line(error) if cause is None else f"{type(cause).__name__}: {_first_line(cause)}"
        return Answer(job, code="evaluation-failed", message=said)
    if outcome.error is None:
        return Answer(job, value=outcome.value, log=outcome.log)
    if isinstance(outcome.error, HeddleError):
        return Answer(job, code=outcome.error.code, message=outcome.error.what, log=outcome.log)
    return Answer(job, code="evaluation-failed", message=_first_line(outcome.error), log=outcome.log)


def _cluster_lost() -> HeddleError:
    hint = "everything finished so far is kept; go on with --resume"
    return HeddleError("cluster-lost", "Ray's process on this machine (the raylet) has ended", hint=hint)


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _import_all() -> None:
    # What is imported stays: to collect it over and over would take a sixth of the time.
    gc.disable()
    try:
        importlib.import_module("heddle.search.evaluate")
    finally:
        gc.enable()


def _set_token() -> None:
    """A password for our own local cluster: Ray (2.60) asks for one, and would write it into the home folder.

    The mode stays Ray's to choose: it reads that once, when it is imported, and sees no later change of ours.
    """
    if not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
