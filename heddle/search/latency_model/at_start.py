"""The latency model that a search begins, or goes on, with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from heddle.search import lock
from heddle.search.given import Given
from heddle.search.latency_model import find, sentinels
from heddle.search.latency_model.model import LatencyModel
from heddle.search.latency_model.table import timing_environment
from heddle.search.progress import Progress
from heddle.search.tasks import Task
from heddle.search.timing_subject import task_ids
from heddle.search.workers import Workers
from heddle.specs import SpecFile


def begin(
    file: SpecFile,
    out: Path,
    given: Given,
    meta: Mapping[str, Any],
    *,
    reads: Task,
    workers: Workers,
    progress: Progress,
) -> dict[str, Any]:
    """Puts the model of the search of `file` into the folder `out`; gives what run.json, so far `meta`, says of it. Sentinels
    with routers read the tokens of `reads`, as all specs of the search do.

    Raises what `find.into_run` raises.
    """
    if meta.get("latency") != "model":
        return {}

    def judge(model: LatencyModel) -> list[sentinels.Verdict]:
        progress.phase("timing", "sentinels of the latency model, fitted with other software")
        how = {"device": workers.device, "effort": given.effort, "ids": task_ids(reads)}
        return sentinels.judged(file, model, meta["budgets"], sentinels.timer(workers), how)

    made_with = workers.call(timing_environment, workers.device)
    kept = _kept(given, out, meta)
    return find.into_run(file, out, made_with, meta, judge, reads=reads.digest, kept=kept)


def _kept(given: Given, out: Path, meta: Mapping[str, Any]) -> Any:
    """The latency model of the lockfile that the search in `out` takes its latencies from, as data."""
    frozen = given.frozen or lock.followed(out, meta)
    return None if frozen is None else frozen.lock.get("latency_model")
