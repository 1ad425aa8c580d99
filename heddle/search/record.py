"""A run folder read back: what was searched, measured, trained, chosen and confirmed.

Needs only the standard library, so that reports, dashboards and the command line start at once. The files are
described in docs/decisions/0003-run-folder.md; `read_run` gives them as frozen dataclasses.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from heddle.errors import HeddleError
from heddle.search import curse
from heddle.search.durable import is_name, read_lines
from heddle.search.longer_results import LONGER_FILE, Longer, read_longer
from heddle.search.results import (
    BudgetInfo,
    Confirm,
    Difference,
    Figure,
    Latency,
    RankCorrelation,
    Rate,
    Score,
    TaskInfo,
    Trial,
)

__all__ = [
    "BudgetInfo",
    "Confirm",
    "Difference",
    "Figure",
    "Latency",
    "RankCorrelation",
    "Rate",
    "Run",
    "Score",
    "TaskInfo",
    "Trial",
    "assemble",
    "elapsed",
    "read_run",
    "read_trials",
    "rung_stage",
]

RUN_FILE = "run.json"
EVENTS_FILE = "events.jsonl"
LEDGER_FOLDER = "ledger"
WEIGHTS_FOLDER = "weights"
TRIALS_FOLDER = "trials"
BEST_FOLDER = "best"
EXPORT_FOLDER = "export"
CONFIRM_FILE = "confirm.json"
RANKS_EVENT = "rungs_compared"
# The number under which the reference model of the budgets appears among the trials.
REFERENCE = -1


@dataclass(frozen=True, slots=True)
class Run:
    """A search as its folder tells it. `status` is "running", "stopped", "finished" or "nothing-feasible".

    A search that was killed reads as "running"; `heddle search … --resume` takes it up again.
    """

    path: Path
    name: str
    status: str
    meta: dict[str, Any]
    tasks: tuple[TaskInfo, ...]
    budgets: tuple[BudgetInfo, ...]
    trials: tuple[Trial, ...]
    reference: Trial | None
    front: tuple[int, ...]
    best: int | None
    least_violating: tuple[int, ...]
    confirm: Confirm | None
    events: tuple[dict[str, Any], ...]
    # How far consecutive rungs agree, as of the last session's end.
    ranks: tuple[RankCorrelation, ...] = ()
    # The best trials trained for longer; None where the spec asks for none, or another trial won since.
    longer: Longer | None = None

    def trial(self, number: int) -> Trial:
        """The trial of that number. Raises HeddleError "bad-argument"."""
        for trial in self.trials:
            if trial.number == number:
                return trial
        numbers = f"0 to {self.trials[-1].number}" if self.trials else "none yet"
        raise HeddleError("bad-argument", f"{self.path} has no trial {number}", hint=f"its trials: {numbers}")

    @property
    def best_trial(self) -> Trial | None:
        return None if self.best is None else self.trial(self.best)

    @property
    def front_trials(self) -> tuple[Trial, ...]:
        return tuple(self.trial(number) for number in self.front)

    def count(self, state: str) -> int:
        """How many trials are in that state."""
        return sum(trial.state == state for trial in self.trials)

    def summary(self) -> dict[str, Any]:
        """What `heddle search --json` prints: plain data."""
        best = self.best_trial
        return {
            "run": str(self.path),
            "name": self.name,
            "status": self.status,
            "trials": {state: self.count(state) for state in self.states},
            "wall_s": self.wall_s,
            "front": list(self.front),
            "best": None if best is None else best.summary(),
            "least_violating": [self.trial(number).summary() for number in self.least_violating],
            "confirm": None if self.confirm is None else asdict(self.confirm),
            **({} if self.longer is None else {"longer": asdict(self.longer)}),
            "latency_model": curse.summary(self),
            "export": str(self.export) if self.export is not None else None,
            **(
                {"rungs": {**self.meta["rungs"], "ranks": list(map(asdict, self.ranks))}}
                if self.has_rungs
                else {}
            ),
        }

    @property
    def has_rungs(self) -> bool:
        """Whether specs were trained briefly before the best were trained in full."""
        return "rungs" in self.meta

    @property
    def states(self) -> tuple[str, ...]:
        """What a trial of this run may be."""
        pruned = ("pruned",) if self.has_rungs else ()
        return ("complete", *pruned, "infeasible", "failed", "running")

    @property
    def export(self) -> Path | None:
        """The folder that plain transformers loads; None before it is written."""
        folder = self.path / BEST_FOLDER / EXPORT_FOLDER
        return folder if folder.is_dir() else None

    def _repr_html_(self) -> str:
        # A notebook alone asks for it; everything else here needs only the standard library.
        from heddle.search.shown import run_cell

        return run_cell(self)

    @property
    def wall_s(self) -> float:
        """Seconds the search has run, summed over its sessions."""
        return elapsed(self.events)


def read_run(path: Path | str) -> Run:
    """The search in folder `path`, whole or still under way.

    Raises:
        HeddleError: "run-not-found" when there is no search in `path`.
    """
    folder = Path(path)
    meta, events = read_meta(folder), read_lines(folder / EVENTS_FILE)
    return run_from(folder, meta, events, read_trials(folder, events))


def run_from(
    folder: Path, meta: dict[str, Any], events: Sequence[dict[str, Any]], trials: Mapping[int, Trial]
) -> Run:
    """The run that these events and trials of `folder` tell of."""
    last = {event["event"]: event for event in events}
    front = last.get("front", {})
    return Run(
        path=folder,
        name=meta["name"],
        status=_status(events),
        meta=meta,
        tasks=tuple(TaskInfo(**task) for task in meta["tasks"]),
        budgets=tuple(BudgetInfo(**budget) for budget in meta["budgets"]),
        trials=tuple(trial for number, trial in trials.items() if number >= 0),
        reference=trials.get(REFERENCE),
        front=tuple(front.get("front", ())),
        best=front.get("best"),
        least_violating=tuple(front.get("least_violating", ())),
        confirm=_read_confirm(folder / CONFIRM_FILE, front.get("best")),
        events=tuple(events),
        ranks=tuple(RankCorrelation(**one) for one in last.get(RANKS_EVENT, {}).get("ranks", ())),
        longer=read_longer(folder / LONGER_FILE, front.get("best")),
    )


def trial_file(folder: Path, number: int) -> Path:
    """Where a run keeps the spec of a trial, as a file that `heddle train` takes."""
    return folder / TRIALS_FOLDER / f"{number:04d}.yaml"


def elapsed(events: Iterable[Mapping[str, Any]]) -> float:
    """Seconds between first and last event of each session, summed: time in which nothing ran does not
    count."""
    clocks: dict[str, float] = {}
    for event in events:
        clocks[event["session"]] = max(clocks.get(event["session"], 0.0), event["clock_s"])
    return sum(clocks.values())


def assemble(
    ledger: Path,
    asked: Mapping[str, Any],
    told: Mapping[str, Any] | None = None,
    again: Mapping[str, Any] | None = None,
) -> Trial:
    """A trial from its events "trial_started", "trial_finished" and "remeasured" and the ledger they point
    into."""
    told, spec = told or {}, asked["hash"]
    scores = _results(ledger, spec, {task: (task, key) for task, key in told.get("scores", {}).items()})
    return Trial(
        number=asked["number"],
        state=told.get("state", "running"),
        params=asked["params"],
        layers=tuple(asked["layers"]),
        hash=spec,
        round=asked["round"],
        spec=told.get("spec", asked["spec"]),
        parameters=asked["parameters"],
        scores={task: score_from(result) for task, result in scores.items()},
        latency=_latencies(ledger, spec, told.get("latency", {})),
        constraints=told.get("constraints", {}),
        reason=told.get("reason"),
        attempts=told.get("attempts", 0),
        wall_s=told.get("wall_s", 0.0),
        duplicate_of=told.get("duplicate_of"),
        remeasured=_latencies(ledger, spec, (again or {}).get("latency", {})),
        figures={label: Figure(**one) for label, one in told.get("figures", {}).items()},
        rungs=tuple(_rung(ledger, spec, at, keys) for at, keys in enumerate(told.get("rungs", ()))),
        rates=_rates(ledger, spec, told),
    )


def rung_stage(rung: int, task: str) -> str:
    """Where the ledger keeps the results of a task at a rung before the last, counted from 0."""
    return f"rung-{rung + 1}-{task}"


def _rung(ledger: Path, spec: str, rung: int, keys: Mapping[str, str]) -> dict[str, Score]:
    results = _results(ledger, spec, {task: (rung_stage(rung, task), key) for task, key in keys.items()})
    return {task: score_from(result) for task, result in results.items()}


def _rates(ledger: Path, spec: str, told: Mapping[str, Any]) -> dict[str, tuple[Rate, ...]]:
    """What each of several learning rates gave, by stage."""
    best = {
        *told.get("scores", {}).values(),
        *(key for rung in told.get("rungs", ()) for key in rung.values()),
    }
    found = {}
    for stage, each in told.get("rates", {}).items():
        results = _results(ledger, spec, {key: (stage, key) for _, key in each})
        found[stage] = tuple(
            Rate(rate, score_from(results[key]) if key in results else None, key in best)
            for rate, key in each
        )
    return found


def read_trials(folder: Path, events: Iterable[Mapping[str, Any]]) -> dict[int, Trial]:
    """Every trial that was asked for, by number; the last event of each kind counts."""
    found: dict[str, dict[int, Mapping[str, Any]]] = {
        "trial_started": {},
        "trial_finished": {},
        "remeasured": {},
    }
    for event in events:
        if event["event"] in found:
            found[event["event"]][event["number"]] = event
    told, again = found["trial_finished"], found["remeasured"]
    return {
        number: assemble(folder / LEDGER_FOLDER, asked, told.get(number), again.get(number))
        for number, asked in sorted(found["trial_started"].items())
    }


def _latencies(ledger: Path, spec: str, keys: Mapping[str, str]) -> dict[str, Latency]:
    results = _results(ledger, spec, {label: ("latency", key) for label, key in keys.items()})
    return {label: Latency(**result) for label, result in results.items()}


def _results(ledger: Path, spec: str, places: Mapping[str, tuple[str, str]]) -> dict[str, dict[str, Any]]:
    """The results of the ledger's entries at (stage, key) of one spec; failures have none.

    Parts that are no names are passed over: a record that somebody else wrote leads to no file outside the ledger.
    """
    found = {}
    for name, (stage, key) in places.items():
        if not all(map(is_name, (spec, stage, key))):
            continue
        try:
            # Ten thousand trials have some thirty thousand of them: text paths, since pathlib takes as long as the reading.
            with open(f"{ledger}/{spec}/{stage}/{key}.json", encoding="utf-8") as file:
                result = json.loads(file.read())["result"]
        except FileNotFoundError:
            continue
        if result is not None:
            found[name] = result
    return found


def score_from(result: Mapping[str, Any]) -> Score:
    """A `Score` from the ledger's plain data."""
    losses = tuple([(int(step), float(loss)) for step, loss in result["losses"]])
    known = {name: result[name] for name in Score.__dataclass_fields__ if name in result}
    shares = tuple([(int(layer), float(share)) for layer, share in result.get("learned_share", [])])
    return Score(**{**known, "losses": losses, "learned_share": shares})


def confirm_from(value: Mapping[str, Any]) -> Confirm:
    """A `Confirm` from the plain data of confirm.json."""
    differences = tuple(
        Difference(**{**item, "winner": tuple(item["winner"]), "uniform": tuple(item["uniform"])})
        for item in value["differences"]
    )
    return Confirm(
        **{
            **value,
            "layers": tuple(value["layers"]),
            "uniform_layers": tuple(value["uniform_layers"]),
            "seeds": tuple(value["seeds"]),
            "scores": {task: tuple(scores) for task, scores in value["scores"].items()},
            "differences": differences,
            "failures": tuple(value["failures"]),
        }
    )


def _read_confirm(path: Path, best: int | None) -> Confirm | None:
    """The confirmation of trial `best`; one of an earlier best is out of date."""
    found = confirm_from(json.loads(path.read_bytes())) if path.exists() else None
    return found if found is not None and found.number == best else None


def read_meta(folder: Path) -> dict[str, Any]:
    path = folder / RUN_FILE
    try:
        meta: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise HeddleError(
            "run-not-found",
            f"{folder} is not a search run: it has no {RUN_FILE}",
            hint="heddle search SPEC --out DIR makes one",
        ) from None
    except json.JSONDecodeError as error:
        raise HeddleError("run-not-found", f"{path} is damaged: {error}") from None
    if meta.get("kind") != "search":
        raise HeddleError(
            "run-not-found", f"{folder} holds a {meta.get('kind', 'unknown')} run, not a search"
        )
    return meta


def _status(events: Sequence[dict[str, Any]]) -> str:
    for event in reversed(events):
        if event["event"] == "search_finished":
            return str(event["status"])
        if event["event"] == "search_started":
            break
    return "running"
