"""`search`: a spec file in, a run folder out – searched, confirmed, exported; and taken up again after
anything."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from optuna.storages import BaseStorage
from pydantic import TypeAdapter, ValidationError

from heddle.compose.plan import plan
from heddle.compose.targets.cut import cut_to_targets
from heddle.compose.targets.report import fits_line, target_rows
from heddle.errors import HeddleError, HeddleErrors
from heddle.search import changed_software, cluster, environment, finish, lock, longer, space
from heddle.search.driver import Driver
from heddle.search.durable import full_disk_told, write_json
from heddle.search.evaluate import Evaluate
from heddle.search.evaluations import Evaluations
from heddle.search.evaluators import evaluator_of
from heddle.search.evaluators.supernet_run import prepare
from heddle.search.events import EventLog
from heddle.search.given import Given
from heddle.search.latency import Effort
from heddle.search.latency_model import at_start, find, told
from heddle.search.ledger import key_of
from heddle.search.limits import Limits, budgets_on
from heddle.search.lock import Frozen
from heddle.search.objectives import Asked, Trained, asked_of, without_unset
from heddle.search.progress import Progress, Silent
from heddle.search.rank_correlation import compare_rungs
from heddle.search.record import RUN_FILE, BudgetInfo, Run, read_meta, read_run
from heddle.search.setting import Setting
from heddle.search.stopping import Stopping
from heddle.search.storage import StudyHold
from heddle.search.study import Direction, RunLock, Study, open_storage
from heddle.search.workers import Workers
from heddle.specs import SpecFile, loads
from heddle.specs.base import Duration
from heddle.specs.beside import text_beside
from heddle.specs.named_files import file_problems
from heddle.specs.search import names_file
from heddle.specs.space_cut import Cut

FORMAT = 1
# Rounds of a search with few trials: fewer would leave the sampler nothing to learn from.
LEAST_ROUNDS = 3


def search(
    file: SpecFile,
    out: Path,
    *,
    trials: int | None = None,
    time: float | str | None = None,
    resume: bool = False,
    storage: str | None = None,
    ray_address: str | None = None,
    progress: Progress | None = None,
    evaluate: Evaluate | None = None,
    effort: Effort = Effort(),  # noqa: B008 - frozen
    deterministic: bool = False,
    frozen: Frozen | None = None,
) -> Run:
    """Search the space of `file`, and leave in `out` all that was measured, the best model and its export.

    `trials` counts all trials that are told, also those of earlier sessions; no round is begun after `time`
    ("5m", or seconds). `evaluate` takes the place of `search.evaluator`; `effort` says how long to time.
    `deterministic` trains with deterministic kernels alone and lets no second timing choose the winner; `frozen` is the
    lockfile of a search that is made again, with its latencies (`heddle.search.replay`).

    Ctrl-C once lets the running evaluations finish, twice stops at once; SIGTERM and SIGHUP give them 5 s. `resume=True` goes
    on from there, as it does after a kill.

    Raises:
        HeddleError: "run-exists", "run-not-found", "run-mismatch", "run-locked", "bad-argument", "disk-full",
            "interrupted", "latency-model", and what the corpus of the tasks raises. A trial that fails, or a budget that
            nothing keeps, is no error: the run says so.
    """
    _check_folder(out, resume=resume)
    if wrong := file_problems(file.spec, file.where):
        raise HeddleErrors(wrong)
    # Before anything is written: a missing corpus or cluster leaves no folder behind.
    cut = cut_to_targets(file)
    asked = asked_of(file)
    evaluate = evaluate or evaluator_of(file)
    given = Given(
        trials, _seconds(time), resume, storage, ray_address, evaluate, effort, deterministic, frozen
    )
    if frozen is not None:
        lock.refuse_other_data(frozen, asked.data)
    if ray_address is not None:
        cluster.check_address(ray_address)
    with ExitStack() as stack:
        stack.enter_context(full_disk_told(out))
        stack.enter_context(RunLock(out))
        with Stopping(out, given.again(file, out)) as stopping:
            driver = _open(stack, cut, out, given, asked=asked, progress=progress or Silent())
            _greet(driver, file, resume=resume)
            stopping.driver = driver
            _search(driver)
        driver.log.write("search_finished", status=_status(driver))
        driver.keeper.write()
    run = read_run(out)
    driver.progress.finished(run)
    return run


def _greet(driver: Driver, file: SpecFile, *, resume: bool) -> None:
    """Say where the search is, by which latency model it goes, and of a new one which classes and servers its models fit."""
    run = read_run(driver.setting.folder)
    driver.progress.started(run, driver.setting.trials)
    if fits := run.meta.get("latency_model"):
        driver.tell(told.which(fits, run.meta["environment"]["device_name"]), "info")
        for doubt in told.doubts(fits):
            driver.warn(doubt)
    if not resume and not driver.setting.must_fit:
        driver.progress.message(fits_line(target_rows(plan(file.spec.model, where=file.where).runtime())))


def _open(stack: ExitStack, cut: Cut, out: Path, given: Given, *, asked: Asked, progress: Progress) -> Driver:
    """A driver with its workers, its study and its folder, new or as they were left; `stack` closes them."""
    file = cut.whole
    env = lock.DETERMINISTIC_ENV if given.is_deterministic(out) else None
    workers = stack.enter_context(_workers(file, given, env, given.timed_on(out)))
    workers.warm_up()
    trained = asked.objectives(workers.share)
    machine = workers.call(environment.describe, workers.device)
    meta = _new_meta(cut, asked, machine, workers.parallel)
    meta |= lock.begun_as(given.frozen) if given.frozen is not None else {}
    meta |= {"storage": _storage(given), "effort": asdict(given.effort), "deterministic": env is not None}
    meta["timed_on"] = workers.timed_on
    if given.resume:
        new, meta = meta, read_meta(out)
        # By today's language: a field that came after the run began would tell the same spec apart.
        began = _space_digest(loads(meta["spec"], file=file.file or "<string>"))
        _refuse_other(meta, new, out, is_same_space=began == new["lock"]["space"])
    meta |= at_start.begin(file, out, given, meta, reads=asked.read, workers=workers, progress=progress)
    meta |= {"trials": given.trials or meta["trials"], "seconds": given.seconds or meta["seconds"]}
    if given.frozen is not None:
        write_json(out / lock.FOLLOWED_FILE, given.frozen.lock)
    write_json(out / RUN_FILE, meta)
    setting = _setting(cut.file, out, trained, meta, evaluate=given.evaluate, effort=given.effort)
    log = stack.enter_context(closing(EventLog(out)))
    driver = Driver(setting, _study(stack, file, meta, open_storage(out, given.storage)), log, progress)
    driver.study.on_outage = driver.warn
    driver.evaluations = Evaluations(
        out,
        log,
        workers,
        on_tick=driver.tick,
        is_stopping=driver.is_stopping,
        timeout=setting.timeout,
    )
    log.write("search_started", machine=machine, trials=setting.trials, seconds=setting.seconds)
    driver.keeper.write()
    _tell_changes(driver, meta, machine)
    return driver


def _tell_changes(driver: Driver, meta: Mapping[str, Any], machine: Mapping[str, Any]) -> None:
    """Warn of software that is not what results or the latency model of the run were made with."""
    if meta.get("latency_changed"):
        driver.tell(*changed_software.told(meta["latency_changed"], meta.get("latency_sentinels", {})))
    if meta["environment"]["packages"] != machine["packages"]:
        driver.warn(
            "package versions changed since the search began; what is unfinished is measured with these"
        )


def _workers(file: SpecFile, given: Given, env: Mapping[str, str] | None, timed_on: str | None) -> Workers:
    assert file.spec.search is not None
    per_gpu = file.spec.search.per_gpu
    return Workers(address=given.ray_address, env=env, per_gpu=per_gpu, timed_on=timed_on)


def _storage(given: Given) -> str:
    return "journal" if given.storage is None else "url"


def _seconds(time: float | str | None) -> float | None:
    if time is None:
        return None
    try:
        return float(TypeAdapter(Duration).validate_python(time))
    except ValidationError:
        raise HeddleError("bad-argument", f"{time!r} is no time", hint='write "90s", "5m" or "2h"') from None


def _search(driver: Driver) -> None:
    """What specs share is trained, then come the rounds, then what is done once: the front again, the winner confirmed, kept and
    exported."""
    prepare(driver)
    driver.run()
    compare_rungs(driver)
    best = driver.update_front()
    if best is not None and not driver.stopping:
        timed = finish.remeasure_front(driver, best)
        best = timed if driver.setting.feeds_back else best
        driver.update_front(best)
        if driver.setting.frozen is not None:
            lock.time_now(driver)
        finish.confirm(driver, best)
        longer.confirm_longer(driver, best)
    if best is not None:
        finish.keep_best(driver, best, export=not driver.stopping)
    driver.enter("finish")


def _status(driver: Driver) -> str:
    if driver.stopping:
        return "stopped"
    return "finished" if driver.log.last("front")["best"] is not None else "nothing-feasible"


# What run.json says.


def _check_folder(out: Path, *, resume: bool) -> None:
    present = (out / RUN_FILE).exists()
    if resume and not present:
        raise HeddleError(
            "run-not-found", f"{out} holds no search to resume", hint="leave out --resume to start one there"
        )
    if present and not resume:
        raise HeddleError(
            "run-exists",
            f"{out} holds a search already",
            hint="add --resume to go on with it, or name another --out",
        )


def _space_digest(file: SpecFile) -> str:
    """A digest of what a resumed search may not change; how long it runs, and its name, it may."""
    assert file.spec.search is not None
    left = {"trials", "time", "timeout", "latency_model", "per_gpu", "confirm_longer"} | (
        {"rungs"} if file.spec.search.rungs is None else set()
    )
    spec = file.spec.model_dump(mode="json", exclude={"name": True, "search": left})
    parameters = [asdict(parameter) for parameter in file.space.parameters]
    placement = file.space.placement
    return key_of({"spec": without_unset(spec), "space": repr(parameters), "placement": repr(placement)})


def _beside(file: SpecFile) -> dict[str, Any]:
    """The hash of each model of another file that a budget is relative to, by the file's name, and what the file says."""
    assert file.spec.search is not None
    budgets = file.spec.search.budgets
    names = sorted({one.relative_to for one in budgets if one.relative_to and names_file(one.relative_to)})
    return {
        "beside": {name: space.reference(file, name).hash for name in names},
        "texts": {name: text_beside(file.file, name, file.beside) for name in names},
    }


def _new_meta(cut: Cut, asked: Asked, machine: Mapping[str, Any], workers: int) -> dict[str, Any]:
    file, search = cut.whole, cut.whole.spec.search
    assert search is not None
    trials = search.trials
    infos = [info for _, _, info in asked.tasks]
    return {
        "format": FORMAT,
        "kind": "search",
        "id": secrets.token_hex(4),
        "name": file.spec.name,
        "created": datetime.now(UTC).isoformat(),
        "file": file.file,
        "spec": file.text,
        "tasks": [asdict(info) for info in infos],
        **asked.recorded,
        "exported": asked.exported,
        "budgets": [asdict(budget) for budget in budgets_on(file, machine["device"])],
        "latency": search.latency,
        "trials": trials,
        "seconds": search.time,
        "sampler": search.sampler,
        # Fixed when the search begins: what is asked depends on them.
        "round": search.round or max(1, min(2 * workers, math.ceil(trials / LEAST_ROUNDS))),
        "startup": max(2, min(10, trials // 4)),
        "lock": {
            "space": _space_digest(file),
            **_beside(file),
            "data": asked.data,
            "seeds": {"search": search.seed, "train": file.spec.train.seed},
            "packages": machine["packages"],
            # A storage refuses a parameter whose options change.
            **({"cut": key_of({"space": repr(cut.file.space)})} if cut.removed else {}),
        },
        "environment": dict(machine),
    }


def _refuse_other(meta: Mapping[str, Any], new: Mapping[str, Any], out: Path, *, is_same_space: bool) -> None:
    """Raise "run-mismatch" where resuming would mix results that do not belong together."""
    then, now = meta["lock"], new["lock"]
    checks = {
        "spec space, tasks, budgets or recipe": is_same_space,
        "model that a budget is relative to": then.get("beside", {}) == now["beside"],
        "cut of its space to the classes of must_fit": then.get("cut") == now.get("cut"),
        "training data": then["data"] == now["data"],
        "device": meta["environment"]["device_name"] == new["environment"]["device_name"],
        "kind of node to time on": meta.get("timed_on") in (None, new["timed_on"]),
    }
    if meta["storage"] != new["storage"]:
        hint = "leave out --storage" if meta["storage"] == "journal" else "give the same --storage URL again"
        raise HeddleError("run-mismatch", f"{out} keeps its study in another storage", hint=hint)
    if new["deterministic"] and not meta.get("deterministic"):
        hint = "leave out --deterministic, or start anew with another --out"
        raise HeddleError("run-mismatch", f"{out} was begun without --deterministic", hint=hint)
    if "follows" in new and meta.get("follows") != new["follows"]:
        hint = "name the lockfile it was begun with, or another --out"
        raise HeddleError("run-mismatch", f"{out} follows another lockfile, or none", hint=hint)
    other = [what for what, same in checks.items() if not same]
    if other:
        raise HeddleError(
            "run-mismatch",
            f"{out} was searched with another {' and another '.join(other)}",
            hint="give the file as it was, or start anew with another --out; trials and time may change",
        )


def _setting(file: SpecFile, out: Path, trained: Trained, meta: Mapping[str, Any], **given: Any) -> Setting:
    budgets = tuple(BudgetInfo(**budget) for budget in meta["budgets"])
    names = dict.fromkeys(budget.relative_to for budget in budgets if budget.relative_to)
    machine = meta["environment"]
    references = {name: space.reference(file, name) for name in names}
    model = find.of_run(out) if meta.get("latency") == "model" else None
    assert file.spec.search is not None
    return Setting(
        folder=out,
        file=file,
        objectives=trained[0],
        rungs=trained[1],
        eta=meta.get("rungs", {}).get("eta", 0.0),
        exported=meta["exported"],
        budgets=budgets,
        references=references,
        limits=Limits(budgets, references, model),
        device=machine["device"],
        environment=environment.deciding(machine),
        trials=meta["trials"],
        seconds=meta["seconds"],
        round=meta["round"],
        seed=file.spec.search.seed,
        confirm_seeds=file.spec.search.confirm_seeds,
        deterministic=meta.get("deterministic", False),
        frozen=lock.followed(out, meta),
        **given,
    )


def _study(stack: ExitStack, file: SpecFile, meta: Mapping[str, Any], storage: BaseStorage) -> Study:
    directions: list[Direction] = [
        "maximize" if task["higher_is_better"] else "minimize" for task in meta["tasks"]
    ]
    # The id keeps two runs of one name apart where they share a database.
    name = f"{meta['name']}-{meta['id']}"
    assert file.spec.search is not None
    return Study(
        storage,
        name,
        directions,
        sampler=meta["sampler"],
        seed=file.spec.search.seed,
        startup=meta["startup"],
        hold=stack.enter_context(StudyHold(storage, name)),
    )
