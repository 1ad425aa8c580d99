"""The rounds of a search: ask a batch, time all of it, train what keeps the budgets, tell in number order.

A round is asked whole before any of it is told, so that what is asked depends on finished rounds alone. That
makes a search the same whether or not it was interrupted.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import inf
from typing import Any

from heddle.search import longer, pareto, rates
from heddle.search.asking import Asking
from heddle.search.durable import write_whole
from heddle.search.evaluations import SHARED_WEIGHTS, Evaluations, Request
from heddle.search.events import EventLog
from heddle.search.ledger import Entry
from heddle.search.lock import LockKeeper
from heddle.search.progress import Progress, Status
from heddle.search.record import (
    REFERENCE,
    WEIGHTS_FOLDER,
    Latency,
    Run,
    Trial,
    assemble,
    elapsed,
    read_meta,
    read_trials,
    run_from,
    trial_file,
)
from heddle.search.rungs import Ladder
from heddle.search.setting import Setting
from heddle.search.study import Study
from heddle.specs import to_yaml

BEFORE_FINISH = ("start", "ask", "timing", "training")
BEFORE_EXPORT = (*BEFORE_FINISH, "remeasure", "confirm", "longer")


class Driver:
    """Runs the rounds of one search. `stop` lets the evaluations in flight finish and begins no other."""

    def __init__(self, setting: Setting, study: Study, log: EventLog, progress: Progress) -> None:
        self.setting, self.study, self.log, self.progress = setting, study, log, progress
        self.stopping = False
        self.trials: dict[int, Trial] = read_trials(setting.folder, log.events)
        self._ended = {e["number"]: e for e in log.events if e["event"] == "trial_finished"}
        # How many ended in which way: to count thousands anew for each that ends takes as long as to make it.
        self._states = Counter(event["state"] for number, event in self._ended.items() if number >= 0)
        own = [trial for number, trial in self.trials.items() if number >= 0]
        self.asking = Asking(setting, study, log, progress, self.trials)
        # Kept as trials come, since to look through thousands of them for each new one takes longer than to make it.
        self._front = pareto.front(own, setting.infos)
        self._least = pareto.least_violating(own)
        self._spent_s = elapsed(log.events)
        self._told_before = self.told
        self._phase, self._trained_before = "start", 0
        self._ticked = 0.0
        self.evaluations: Evaluations
        self.keeper = LockKeeper(self.run_so_far)
        self.ladder = Ladder(self)

    @property
    def told(self) -> int:
        """Trials that have ended: complete, pruned, infeasible or failed."""
        return self._states.total()

    @property
    def elapsed_s(self) -> float:
        """Seconds the search has run, in this session and those before."""
        return self._spent_s + self.log.clock_s

    def run_so_far(self) -> Run:
        """What `read_run` would give now, without reading thousands of files again."""
        folder = self.setting.folder
        return run_from(folder, read_meta(folder), self.log.events, self.trials)

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
        self.tell(text, "warning")

    def tell(self, text: str, level: str) -> None:
        """Tell the user something; `level` is "info" or "warning"."""
        self.log.write("message", level=level, text=text)
        self.progress.message(text, level)

    def status(self) -> Status:
        return Status(
            phase=self._phase,
            done=self.told,
            running=self.evaluations.flying,
            failed=self._states["failed"],
            infeasible=self._states["infeasible"],
            pruned=self._states["pruned"],
            total=self.setting.trials,
            best=pareto.best(self._front),
            elapsed_s=self.elapsed_s,
            seconds_left=self._seconds_left(),
        )

    def _seconds_left(self) -> float | None:
        """Of the rounds, until the trials at the pace of this session's or the time are used up, and of the confirmation after
        them."""
        told, limit, rounds = self.told - self._told_before, self.setting.seconds, 0.0
        if self._phase in BEFORE_FINISH:
            if not told and limit is None:
                return None
            rounds = self.log.clock_s / told * max(0, self.setting.trials - self.told) if told else inf
            if limit is not None:
                rounds = min(rounds, max(0.0, limit - self.elapsed_s))
        confirming = 2 * self.setting.confirm_seeds * len(self.setting.objectives)
        done = self.evaluations.trained - self._trained_before
        if self._phase == "confirm":
            confirming = max(0, confirming - done)
        left = longer.cost(self.setting, done if self._phase == "longer" else 0)
        left += 0 if self._phase == "longer" else confirming
        return rounds + self.evaluations.seconds_for(left if self._phase in BEFORE_EXPORT else 0)

    # The rounds.

    def run(self) -> None:
        """Rounds until the trials, the time or the space are used up, or `stop` is called."""
        while not self.stopping:
            self.enter("ask")
            numbers = [*self.asking.next_round(self._is_late), *self.asking.baseline()]
            if not numbers:
                self._tell_of_time()
                return
            self._time(numbers)
            self._train(numbers)
            for number in numbers:
                self._tell(number)
            self.update_front()
            self.keeper.keep()

    def _tell_of_time(self) -> None:
        """Why there are fewer trials than asked for, where it was the time."""
        if self._is_late() and self.told < self.setting.trials:
            up = f"the time ({self.setting.seconds:g} s) was up after {self.told} of {self.setting.trials} trials"
            self.tell(f"{up}; --resume with a longer --time goes on", "info")

    def _is_late(self) -> bool:
        """No further trial is to be asked for: the time is up."""
        limit = self.setting.seconds
        return limit is not None and self.elapsed_s >= limit

    def _time(self, numbers: Sequence[int]) -> None:
        """Time every spec of the round at every budget's place, but those that are over a budget for certain."""
        self.enter("timing", f"{len(numbers)} specs")
        self.evaluations.time_all(request for number in numbers for request in self._timings(number).values())

    def _train(self, numbers: Sequence[int]) -> None:
        """Train the specs that keep the budgets, at every task."""
        feasible = self.ladder.climb(filter(self._may_train, numbers), self.asking.candidates)
        self.enter("training", f"{len(feasible)} of {len(numbers)} specs")
        self.evaluations.train_all(
            request for number in feasible for each in self._trainings(number).values() for request in each
        )

    def _timings(self, number: int) -> dict[str, Request]:
        one = self.asking.candidates.get(number)
        is_over = number != REFERENCE and self.setting.limits.rule_out(self.asking.figures.get(number, {}))
        budgets = self.setting.timed if one and not is_over else ()
        return {budget.timing: self.setting.timing(number, one, budget) for budget in budgets if one}

    def _trainings(self, number: int) -> dict[str, tuple[Request, ...]]:
        one = self.asking.candidates.get(number)
        if one is None or self.ladder.is_left(number):
            return {}
        return rates.requests(self.setting, number, one, self.setting.objectives)

    def _entries(self, requests: Mapping[str, Request]) -> dict[str, Entry] | None:
        """The ledger's entries of `requests`; None while one of them is not finished."""
        found = {name: self.evaluations.get(request) for name, request in requests.items()}
        entries = {name: entry for name, entry in found.items() if entry is not None}
        return entries if len(entries) == len(found) else None

    def _may_train(self, number: int) -> bool:
        """Whether the spec keeps every budget, and was timed to know it; the reference is trained in any case."""
        timed = self._entries(self._timings(number))
        if number in self.asking.illegal or timed is None or not all(entry.ok for entry in timed.values()):
            return False
        return number == REFERENCE or all(value <= 0 for value in self._violations(number, timed).values())

    def _violations(self, number: int, timed: Mapping[str, Entry]) -> dict[str, float]:
        rows = {label: Latency(**entry.result) for label, entry in timed.items() if entry.result}
        return pareto.violations(rows, self.setting.budgets, self.asking.figures.get(number, {}))

    def _tell(self, number: int) -> None:
        """End a trial whose evaluations are all in: first in the record, then in Optuna. Others stay
        running."""
        timed = self._entries(self._timings(number))
        asked = self._trainings(number) if self._may_train(number) else {}
        scored = rates.found(self.evaluations.get, self.setting.objectives, asked)
        if timed is None or scored is None or self.ladder.is_open(number):
            return
        outcome = self._outcome(number, timed, scored)
        # One that a driver recorded and died before it told Optuna is told again.
        is_new = number >= 0 and number not in self._ended
        event = self._ended[number] = self.log.write("trial_finished", number=number, **outcome)
        self.trials[number] = trial = assemble(
            self.evaluations.ledger.folder, self.asking.events[number], event
        )
        if number != REFERENCE:
            self._front = pareto.front([*self._front, trial], self.setting.infos)
            self._least = pareto.least_violating([*self._least, trial])
            self._tell_optuna(trial)
        self._states[trial.state] += is_new
        # A spec takes tens of kilobytes, and nothing is asked about it any more.
        self.asking.ended(number)
        self.progress.status(self.status())
        self.progress.trial_finished(trial)

    def _outcome(
        self, number: int, timed: Mapping[str, Entry], scored: Mapping[str, rates.Found]
    ) -> dict[str, Any]:
        """The fields of "trial_finished"."""
        rungs = self.ladder.found(number)
        trained = {**rungs, **scored}
        entries = {**timed, **{name: one.best for name, one in trained.items()}}
        spent = [*timed.values(), *(entry for one in trained.values() for entry in one.entries)]
        failed = [
            f"{name}: {entry.reason['code']}: {entry.reason['message']}"
            for name, entry in entries.items()
            if entry.reason
        ]
        reasons = [self.asking.illegal[number]] if number in self.asking.illegal else failed
        constraints = {} if reasons else self._violations(number, timed)
        state = "failed" if reasons else "complete" if scored else "pruned" if rungs else "infeasible"
        first = self.asking.first.get(self.asking.events[number]["hash"], number)
        return {
            "state": state,
            "scores": {name: one.best.key for name, one in scored.items()},
            "latency": {label: entry.key for label, entry in timed.items()},
            "figures": {label: asdict(one) for label, one in self.asking.figures.get(number, {}).items()},
            "constraints": constraints,
            "reason": "; ".join(reasons) or None,
            "attempts": max((entry.attempts for entry in spent), default=0),
            "wall_s": round(sum(entry.wall_s for entry in spent), 3),
            "duplicate_of": first if first < number else None,
            **self.ladder.fields(number),
            **rates.fields(trained.values()),
            **self._kept(number, scored),
        }

    def _kept(self, number: int, scored: Mapping[str, rates.Found]) -> dict[str, Any]:
        """Of several learning rates keeps the weights of the best, and gives the spec with that rate as its own."""
        kept, one = scored.get(self.setting.exported), self.asking.candidates.get(number)
        if kept is None or one is None or len(kept.entries) == 1:
            return {}
        self.evaluations.keep_weights(one.hash, kept.best.key)
        spec = to_yaml(self.setting.as_trained(one.spec, kept.best.inputs["recipe"]["learning_rate"]))
        if number != REFERENCE:
            write_whole(trial_file(self.setting.folder, number), spec.encode())
        return {"spec": spec}

    def _tell_optuna(self, trial: Trial) -> None:
        constraints = self.setting.limits.all_constraints(trial, self.trials)
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
        return self.asking.events[number], self._ended.get(number)

    def update_front(self, best: int | None = None) -> int | None:
        """Record the Pareto front, and its best, which is given back; weights of specs that left it are
        deleted then.

        `best` overrides the choice: the one that kept its budgets when it was timed again.
        """
        front = [self.trials[trial.number] for trial in self._front]
        if best is None and (chosen := pareto.best(front)) is not None:
            best = chosen.number
        self.log.write(
            "front",
            front=[trial.number for trial in front],
            best=best,
            least_violating=[trial.number for trial in self._least],
        )
        kept = {trial.hash for trial in front}
        kept |= {self.trials[number].hash for number in self.asking.running}
        if REFERENCE in self.trials:
            # A later trial may be this very model, and is not trained twice.
            kept.add(self.trials[REFERENCE].hash)
        for path in (self.setting.folder / WEIGHTS_FOLDER).glob("*.safetensors"):
            if path.name.partition(".")[0] not in kept and not path.name.startswith(SHARED_WEIGHTS):
                path.unlink()
        return best
