"""The rounds of a search: ask a batch, time all of it, train what keeps the budgets, tell in number order.

A round is asked whole before any of it is told, so that what is asked depends on finished rounds alone. That
makes a search the same whether or not it was interrupted.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from optuna.trial import TrialState

from heddle.compose.plan import plan
from heddle.compose.targets.catalogue import BY_NAME
from heddle.compose.targets.verdict import require
from heddle.errors import HeddleError
from heddle.search import pareto, space
from heddle.search.durable import write_whole
from heddle.search.evaluations import Evaluations, Request, weights_path
from heddle.search.events import EventLog
from heddle.search.ledger import Entry
from heddle.search.lock import LockKeeper
from heddle.search.placement import Seen, Timed
from heddle.search.progress import Progress, Status
from heddle.search.record import (
    REFERENCE,
    WEIGHTS_FOLDER,
    Figure,
    Latency,
    Trial,
    assemble,
    elapsed,
    read_trials,
    trial_file,
)
from heddle.search.rungs import Ladder, learnt
from heddle.search.setting import Setting
from heddle.search.study import Study
from heddle.specs import to_yaml

BEFORE_FINISH = ("start", "ask", "timing", "training")
BEFORE_EXPORT = (*BEFORE_FINISH, "remeasure", "confirm")


class Driver:
    """Runs the rounds of one search. `stop` lets the evaluations in flight finish and begins no other."""

    def __init__(self, setting: Setting, study: Study, log: EventLog, progress: Progress) -> None:
        self.setting, self.study, self.log, self.progress = setting, study, log, progress
        self.stopping = False
        search = setting.file.spec.search
        self._least_reach = None if search is None else search.min_reach
        self.trials: dict[int, Trial] = read_trials(setting.folder, log.events)
        self._asked = {e["number"]: e for e in log.events if e["event"] == "trial_started"}
        self._ended = {e["number"]: e for e in log.events if e["event"] == "trial_finished"}
        own = [trial for number, trial in self.trials.items() if number >= 0]
        # Kept as trials come, since to look through thousands of them for each new one takes longer than to make it.
        self._front = pareto.front(own, setting.infos)
        self._first: dict[str, int] = {}
        for number, event in sorted(self._asked.items()):
            if number >= 0 and event["hash"]:
                self._first.setdefault(event["hash"], number)
        self._candidates: dict[int, space.Candidate] = {}
        self._illegal: dict[int, str] = {}
        self._figures: dict[int, dict[str, Figure]] = {}
        self._spent_s = elapsed(log.events)
        self._told_before = self.told
        self._phase, self._trained_before = "start", 0
        self._ticked = 0.0
        self.evaluations: Evaluations
        self.keeper = LockKeeper(setting.folder)
        self.ladder = Ladder(self)

    @property
    def told(self) -> int:
        """Trials that have ended: complete, pruned, infeasible or failed."""
        return sum(trial.state != "running" for number, trial in self.trials.items() if number >= 0)

    @property
    def elapsed_s(self) -> float:
        """Seconds the search has run, in this session and those before."""
        return self._spent_s + self.log.clock_s

    def stop(self) -> None:
        self.stopping = True

    def is_stopping(self) -> bool:
        return self.stopping

    def tick(self) -> None:
        """Show where the search stands, at most twice a second."""
        if time.monotonic() - self._ticked > 0.5:
            self._ticked = time.monotonic()
            self.progress.status(self.status())

    def enter(self, phase: str, detail: str = "") -> None:
        """A phase begins."""
        self._phase, self._trained_before = phase, self.evaluations.trained
        self.log.write("phase", phase=phase, detail=detail)
        self.progress.phase(phase, detail)

    def warn(self, text: str) -> None:
        """Tell the user something that is not an error, now and in the record."""
        self.log.write("message", level="warning", text=text)
        self.progress.message(text, "warning")

    def status(self) -> Status:
        trials = [trial for number, trial in self.trials.items() if number >= 0]
        states = [trial.state for trial in trials]
        return Status(
            phase=self._phase,
            done=self.told,
            running=self.evaluations.flying,
            failed=states.count("failed"),
            infeasible=states.count("infeasible"),
            pruned=states.count("pruned"),
            total=self.setting.trials,
            best=pareto.best(self._front),
            elapsed_s=self.elapsed_s,
            seconds_left=self._seconds_left(),
        )

    def _seconds_left(self) -> float | None:
        """Of the rounds at the pace of this session's, and of the confirmation after them."""
        told = self.told - self._told_before
        if not told and self._phase in BEFORE_FINISH:
            return None
        rounds = 0.0
        if self._phase in BEFORE_FINISH:
            rounds = self.log.clock_s / told * max(0, self.setting.trials - self.told)
            if self.setting.seconds is not None:
                rounds = min(rounds, max(0.0, self.setting.seconds - self.elapsed_s))
        confirming = 2 * self.setting.confirm_seeds * len(self.setting.objectives)
        if self._phase == "confirm":
            confirming -= self.evaluations.trained - self._trained_before
        return rounds + self.evaluations.seconds_for(
            max(0, confirming) if self._phase in BEFORE_EXPORT else 0
        )

    # The rounds.

    def run(self) -> None:
        """Rounds until the trials, the time or the space are used up, or `stop` is called."""
        while not self.stopping:
            numbers = [*self._ask_round(), *self._baseline()]
            if not numbers:
                return
            self._time(numbers)
            self._train(numbers)
            for number in numbers:
                self._tell(number)
            self.update_front()
            self.keeper.keep()

    def _baseline(self) -> list[int]:
        """The reference model as a row of its own, timed and trained once, never told to Optuna."""
        if not self.setting.references:
            return []
        if REFERENCE in self.trials and self.trials[REFERENCE].state != "running":
            return []
        one = next(iter(self.setting.references.values()))
        self._candidates[REFERENCE] = one
        self._figures[REFERENCE] = self.setting.limits.figures(one.model)
        if REFERENCE not in self.trials:
            self._start(REFERENCE, {}, one, plan(one.model).parameters)
        return [REFERENCE]

    def _ask_round(self) -> list[int]:
        """The numbers of the next round, asked for; of an interrupted one, those that were never told."""
        self.enter("ask")
        frozen = self.study.trials
        pending = [trial.number for trial in frozen if trial.state == TrialState.RUNNING]
        first = (pending[0] if pending else len(frozen)) // self.setting.round * self.setting.round
        last = min(first + self.setting.round, self.setting.trials)
        # Once one of a round is told, the round was asked whole.
        was_told = any(trial.state.is_finished() for trial in frozen[first:]) and bool(pending)
        for number in pending:
            self.study.adopt(number)
            self._settle(number)
        count = len(frozen)
        while not was_told and count < last and not self._is_over():
            pending.append(self.study.ask())
            self._settle(pending[-1])
            count += 1
        return pending

    def _is_over(self) -> bool:
        """No further trial is to be asked for: the time is up, or every spec of the space was asked for."""
        limit = self.setting.seconds
        if limit is not None and self.elapsed_s >= limit:
            return True
        return len(self._first) >= self.setting.file.space.size()

    def _settle(self, number: int) -> None:
        """Give trial `number` its values and its layers, and store both before anything is evaluated."""
        file, study = self.setting.file, self.study
        values = space.suggest_all(study, number, file.space)
        layers = study.attr(number, "layers")
        try:
            one = space.candidate(file, values, layers) if layers else self._place(number, values)
            planned = plan(one.model)
            parameters = planned.parameters
            space.check_reach(one.model, self._least_reach)
            for name in self.setting.must_fit:
                require(BY_NAME[name], planned.runtime())
        except HeddleError as error:
            # A combination that the space allows and the model does not, such as heads that do not divide.
            self._illegal[number] = f"{error.code}: {error.what}"
            self._start(number, values)
            return
        self._candidates[number] = one
        self._figures[number] = self.setting.limits.figures(one.model)
        self._start(number, values, one, parameters)
        study.set_attr(number, "spec_hash", one.hash)
        study.set_attr(number, "layers", list(one.layers))

    def _start(
        self, number: int, values: dict[str, Any], one: space.Candidate | None = None, parameters: int = 0
    ) -> None:
        """Record what is asked in trial `number`; `one` is None where no legal model came of it."""
        text = to_yaml(self.setting.as_trained(one.spec)) if one else ""
        if number >= 0 and one:
            write_whole(trial_file(self.setting.folder, number), text.encode())
        event = self.log.write(
            "trial_started",
            number=number,
            round=number // self.setting.round,
            params=values,
            layers=list(one.layers) if one else [],
            hash=one.hash if one else "",
            spec=text,
            parameters=parameters,
        )
        self._asked[number] = event
        if number >= 0 and one:
            self._first.setdefault(one.hash, number)
        self.trials[number] = assemble(self.evaluations.ledger.folder, event)
        self.progress.trial_started(self.trials[number])

    def _place(self, number: int, values: Mapping[str, Any]) -> space.Candidate:
        """The layers for `values`, learnt from the rounds before this one alone."""
        round_start = number // self.setting.round * self.setting.round
        before_it = [trial for other, trial in sorted(self.trials.items()) if 0 <= other < round_start]
        outer = {trial.number: space.outer(self.setting.file, trial.params) for trial in before_it}
        history = [
            Seen(trial.layers, outer[trial.number], quality)
            for trial, quality in learnt(before_it, len(self.setting.rungs))
        ]
        timed = [
            Timed(trial.layers, outer[trial.number], {n: 1.0 + over for n, over in trial.constraints.items()})
            for trial in before_it
            if trial.constraints
        ]
        before = {event["hash"] for other, event in self._asked.items() if 0 <= other < number}
        return space.place(
            self.setting.file,
            values,
            history,
            before.__contains__,
            seed=self.setting.seed,
            number=number,
            timed=timed,
        )

    def _time(self, numbers: Sequence[int]) -> None:
        """Time every spec of the round at every budget's place, but those that are over a budget for certain."""
        self.enter("timing", f"{len(numbers)} specs")
        self.evaluations.time_all(request for number in numbers for request in self._timings(number).values())

    def _train(self, numbers: Sequence[int]) -> None:
        """Train the specs that keep the budgets, at every task."""
        feasible = self.ladder.climb(filter(self._may_train, numbers), self._candidates)
        self.enter("training", f"{len(feasible)} of {len(numbers)} specs")
        self.evaluations.train_all(
            request for number in feasible for request in self._trainings(number).values()
        )

    def _timings(self, number: int) -> dict[str, Request]:
        one = self._candidates.get(number)
        is_over = number != REFERENCE and self.setting.limits.rule_out(self._figures.get(number, {}))
        budgets = self.setting.timed if one and not is_over else ()
        return {budget.label: self.setting.timing(number, one, budget) for budget in budgets if one}

    def _trainings(self, number: int) -> dict[str, Request]:
        one = self._candidates.get(number)
        objectives = self.setting.objectives if one and not self.ladder.is_left(number) else ()
        return {each.info.name: self.setting.training(number, one, each) for each in objectives if one}

    def _entries(self, requests: Mapping[str, Request]) -> dict[str, Entry] | None:
        """The ledger's entries of `requests`; None while one of them is not finished."""
        found = {name: self.evaluations.get(request) for name, request in requests.items()}
        entries = {name: entry for name, entry in found.items() if entry is not None}
        return entries if len(entries) == len(found) else None

    def _may_train(self, number: int) -> bool:
        """Whether the spec keeps every budget, and was timed to know it; the reference is trained in any case."""
        timed = self._entries(self._timings(number))
        if number in self._illegal or timed is None or not all(entry.ok for entry in timed.values()):
            return False
        return number == REFERENCE or all(value <= 0 for value in self._violations(number, timed).values())

    def _violations(self, number: int, timed: Mapping[str, Entry]) -> dict[str, float]:
        rows = {label: Latency(**entry.result) for label, entry in timed.items() if entry.result}
        return pareto.violations(rows, self.setting.budgets, self._figures.get(number, {}))

    def _tell(self, number: int) -> None:
        """End a trial whose evaluations are all in: first in the record, then in Optuna. Others stay
        running."""
        timed = self._entries(self._timings(number))
        scored = self._entries(self._trainings(number)) if self._may_train(number) else {}
        if timed is None or scored is None or self.ladder.is_open(number):
            return
        outcome = self._outcome(number, timed, scored)
        event = self._ended[number] = self.log.write("trial_finished", number=number, **outcome)
        self.trials[number] = trial = assemble(self.evaluations.ledger.folder, self._asked[number], event)
        if number != REFERENCE:
            self._front = pareto.front([*self._front, trial], self.setting.infos)
            self._tell_optuna(trial)
        # A spec takes tens of kilobytes, and nothing is asked about it any more.
        self._candidates.pop(number, None)
        self.tick()
        self.progress.trial_finished(trial)

    def _outcome(
        self, number: int, timed: Mapping[str, Entry], scored: Mapping[str, Entry]
    ) -> dict[str, Any]:
        """The fields of "trial_finished"."""
        rungs = self.ladder.entries(number)
        entries = {**timed, **rungs, **scored}
        failed = [
            f"{name}: {entry.reason['code']}: {entry.reason['message']}"
            for name, entry in entries.items()
            if entry.reason
        ]
        reasons = [self._illegal[number]] if number in self._illegal else failed
        constraints = {} if reasons else self._violations(number, timed)
        state = "failed" if reasons else "complete" if scored else "pruned" if rungs else "infeasible"
        first = self._first.get(self._asked[number]["hash"], number)
        return {
            "state": state,
            "scores": {name: entry.key for name, entry in scored.items()},
            "latency": {label: entry.key for label, entry in timed.items()},
            "figures": {label: asdict(one) for label, one in self._figures.get(number, {}).items()},
            "constraints": constraints,
            "reason": "; ".join(reasons) or None,
            "attempts": max((entry.attempts for entry in entries.values()), default=0),
            "wall_s": round(sum(entry.wall_s for entry in entries.values()), 3),
            "duplicate_of": first if first < number else None,
            **self.ladder.fields(number),
        }

    def _tell_optuna(self, trial: Trial) -> None:
        before = [one for number, one in self.trials.items() if 0 <= number < trial.number]
        constraints = self.setting.limits.all_constraints(trial, before)
        if trial.state == "failed":
            self.study.tell_failed(trial.number, str(trial.reason))
        elif trial.state == "pruned":
            self.study.tell_pruned(trial.number, constraints, len(trial.rungs), trial.quality_at(-1))
        elif trial.state == "infeasible":
            neutral = [info.chance for info in self.setting.infos]
            self.study.tell_infeasible(trial.number, constraints, neutral)
        else:
            values = [trial.scores[info.name].value for info in self.setting.infos]
            self.study.tell_complete(trial.number, values, constraints)

    def events_of(self, number: int) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """The events with which a trial was asked for and told."""
        return self._asked[number], self._ended.get(number)

    def update_front(self, best: int | None = None) -> int | None:
        """Record the Pareto front, and its best, which is given back; weights of specs that left it are
        deleted then.

        `best` overrides the choice: the one that kept its budgets when it was timed again.
        """
        trials = [trial for number, trial in self.trials.items() if number >= 0]
        front = [self.trials[trial.number] for trial in self._front]
        if best is None and (chosen := pareto.best(front)) is not None:
            best = chosen.number
        least = pareto.least_violating(trials)
        self.log.write(
            "front",
            front=[trial.number for trial in front],
            best=best,
            least_violating=[trial.number for trial in least],
        )
        kept = {weights_path(self.setting.folder, trial.hash) for trial in front}
        running = {trial.hash for trial in trials if trial.state == "running"}
        kept |= {weights_path(self.setting.folder, spec) for spec in running if spec}
        if REFERENCE in self.trials:
            # A later trial may be this very model, and is not trained twice.
            kept.add(weights_path(self.setting.folder, self.trials[REFERENCE].hash))
        for path in (self.setting.folder / WEIGHTS_FOLDER).glob("*.safetensors"):
            if path not in kept:
                path.unlink()
        return best
