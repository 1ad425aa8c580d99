"""What a search asks for: the specs of the next round, their values from Optuna, their layers from the placement solver."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from heddle.compose.plan import plan
from heddle.compose.targets.demand import DEMANDS
from heddle.errors import HeddleError
from heddle.search import listing, space
from heddle.search.durable import write_whole
from heddle.search.events import EventLog
from heddle.search.learnt import Learnt
from heddle.search.placement.seeds import is_seeded
from heddle.search.progress import Progress
from heddle.search.record import LEDGER_FOLDER, REFERENCE, Figure, Trial, assemble, trial_file
from heddle.search.seeding import seeded
from heddle.search.setting import Setting
from heddle.search.study import Study
from heddle.specs import to_yaml

# Times that layers with some counts may come out as no model, and never as one, before the solver leaves those counts.
REFUSALS = 2
Layers = tuple[str, ...]
# Counts for Optuna, and layers.
Seed = tuple[dict[str, Any], Layers]


class Asking:
    """The trials that were asked for, and those of the next round. `trials` is the driver's own record, which grows with them.

    `events` are those with which trials were asked for; `first` the number of the first trial with a spec's hash, `_placed` with
    values and then layers, which are known without making a spec, and `_layers` with layers alone; `_refused` the trials in which
    layers of the solver with such counts were no model, and `_legal` the first in which layers with these were one; `candidates`
    and `figures` the specs of trials that are under way, and what is known of them without a measurement; `illegal` why a
    combination is no model; `running` the trials that have not ended.
    """

    def __init__(
        self, setting: Setting, study: Study, log: EventLog, progress: Progress, trials: dict[int, Trial]
    ) -> None:
        self.setting, self.study, self.log, self.progress, self.trials = setting, study, log, progress, trials
        search = setting.file.spec.search
        self._least_reach = None if search is None else search.min_reach
        self._learnt = Learnt(setting.file, len(setting.rungs))
        listed = search is not None and search.sampler in listing.SAMPLERS
        self._listing = listing.Listing(setting.file, search.sampler) if search and listed else None
        # Random trials stay random.
        self._takes_seeds = search is not None and search.sampler not in (*listing.SAMPLERS, "random")
        self._seeds = dict[int, Seed | None]()
        self.events = {e["number"]: e for e in log.events if e["event"] == "trial_started"}
        self.running = {number for number, trial in trials.items() if trial.state == "running"}
        self.first: dict[str, int] = {}
        self._placed: dict[str, dict[Layers, int]] = {}
        self._layers: dict[Layers, int] = {}
        self._refused: dict[tuple[str, ...], set[int]] = {}
        self._legal: dict[tuple[str, ...], int] = {}
        for _, event in sorted(self.events.items()):
            self._note(event)
        self.candidates: dict[int, space.Candidate] = {}
        self.illegal: dict[int, str] = {}
        self.figures: dict[int, dict[str, Figure]] = {}

    def ended(self, number: int) -> None:
        """Forget what no one asks for once a trial has ended: a spec takes tens of kilobytes."""
        self.candidates.pop(number, None)
        self.figures.pop(number, None)
        self.running.discard(number)

    def baseline(self) -> list[int]:
        """The reference model as a row of its own, timed and trained once, never told to Optuna."""
        if not self.setting.references:
            return []
        if REFERENCE in self.trials and self.trials[REFERENCE].state != "running":
            return []
        one = next(iter(self.setting.references.values()))
        self.candidates[REFERENCE] = one
        self.figures[REFERENCE] = self.setting.limits.figures(one.model)
        if REFERENCE not in self.trials:
            self._start(REFERENCE, {}, one, plan(one.model).parameters)
        return [REFERENCE]

    def next_round(self, is_over: Callable[[], bool]) -> list[int]:
        """The numbers of the next round, asked for; of an interrupted one, those that were never told."""
        pending, count = self.study.unfinished, self.study.count
        first = (pending[0] if pending else count) // self.setting.round * self.setting.round
        last = min(first + self.setting.round, self.setting.trials)
        # Once one of a round is told, the round was asked whole.
        was_told = bool(pending) and len(pending) < count - first
        for number in pending:
            self.study.adopt(number)
            self._settle(number)
        while not was_told and count < last and not is_over() and not self._is_exhausted():
            seed = self._seed(count)
            pending.append(self.study.ask(None if seed is None else seed[0]))
            self._settle(pending[-1])
            count += 1
        return pending

    def _is_exhausted(self) -> bool:
        """Whether every spec of the space was asked for, or all that the sampler goes through."""
        if self._listing is not None and self._listing.at(self.study.count) is None:
            return True
        return len(self.first) >= self.setting.file.space.size()

    def _settle(self, number: int) -> None:
        """Give trial `number` its values and its layers, and store both before anything is evaluated."""
        file, study = self.setting.file, self.study
        listed = None if self._listing is None else self._listing.at(number)
        if listed is not None:
            study.choose(number, space.suggested(file.space, listed.values))
        values = space.suggest_all(study, number, file.space)
        layers = study.attr(number, "layers") or (listed and listed.layers)
        try:
            one = space.candidate(file, values, layers) if layers else self._place(number, values)
            planned = plan(one.model)
            parameters = planned.parameters
            space.check_reach(one.model, self._least_reach)
            for name in self.setting.must_fit:
                DEMANDS[name].require(planned.runtime())
        except HeddleError as error:
            # A combination that the space allows and the model does not, such as heads that do not divide.
            self.illegal[number] = f"{error.code}: {error.what}"
            seed = self._seeds.get(number)
            self._start(number, values, refused=() if seed is None else seed[1])
            return
        self.candidates[number] = one
        self.figures[number] = self.setting.limits.figures(one.model)
        self._start(number, values, one, parameters)
        study.set_attr(number, "spec_hash", one.hash)
        study.set_attr(number, "layers", list(one.layers))

    def _start(
        self,
        number: int,
        values: dict[str, Any],
        one: space.Candidate | None = None,
        parameters: int = 0,
        *,
        refused: Sequence[str] = (),
    ) -> None:
        """Record what is asked in trial `number`; `one` is None where no legal model came of it, and of the layers `refused`."""
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
            **({"refused": list(refused)} if refused else {}),
        )
        self.events[number] = event
        self._note(event)
        self.trials[number] = assemble(self.setting.folder / LEDGER_FOLDER, event)
        self.running.add(number)
        self.progress.trial_started(self.trials[number])

    def _note(self, event: Mapping[str, Any]) -> None:
        """Remember what the trial of "trial_started" is, for those after it."""
        number = event["number"]
        if refused := event.get("refused"):
            self._refused.setdefault(_counts(refused), set()).add(number)
        if number >= 0 and event["hash"]:
            self.first.setdefault(event["hash"], number)
            placed = self._placed.setdefault(_spelled(event["params"]), {})
            placed.setdefault(tuple(event["layers"]), number)
            self._layers.setdefault(tuple(event["layers"]), number)
            self._legal.setdefault(_counts(event["layers"]), number)

    def _place(self, number: int, values: Mapping[str, Any]) -> space.Candidate:
        """The layers for `values`."""
        seed = self._seed(number)
        return space.place(
            self.setting.file,
            values,
            self._known(number),
            seed=self.setting.seed,
            number=number,
            start=None if seed is None else seed[1],
        )

    def _seed(self, number: int) -> Seed | None:
        """The counts and the layers of a trial for which the solver says them."""
        if number not in self._seeds:
            takes = self._takes_seeds and is_seeded(number)
            self._seeds = {number: self._solved(number) if takes else None}
        return self._seeds[number]

    def _solved(self, number: int) -> Seed | None:
        best = self._learnt_for(number).best or self.setting.file.space.defaults()
        known = self._known(number)

        def is_barred(layers: Layers) -> bool:
            counts = _counts(layers)
            refused = sum(one < number for one in self._refused.get(counts, ()))
            return refused >= REFUSALS and self._legal.get(counts, number) >= number

        def tried(values: Mapping[str, Any]) -> Callable[[Layers], bool]:
            is_tried = known.tried(values)
            return lambda layers: is_tried(layers) or is_barred(layers)

        try:
            return seeded(self.setting.file, best, replace(known, tried=tried))
        except HeddleError:
            # No counts that can be looked at, such as those with too large a table: they are Optuna's.
            return None

    def _known(self, number: int) -> space.Known:
        """What trial `number` may learn from: the rounds before its own, and what was asked for in its own before it."""
        learnt, limits = self._learnt_for(number), self.setting.limits
        first = number // self.setting.round * self.setting.round
        mine = [self.trials[each] for each in range(first, number) if each in self.trials]
        return space.Known(
            learnt.history,
            lambda spec: self.first.get(spec, number) < number,
            learnt.timed,
            [(one.layers, space.outer(self.setting.file, one.params)) for one in mine if one.layers],
            lambda values: self._tried(values, number),
            limits.of_placements if limits.has_model else None,
            lambda layers: self._layers.get(layers, number) < number,
        )

    def _tried(self, values: Mapping[str, Any], number: int) -> Callable[[Layers], bool]:
        """Whether layers were asked for with these values before trial `number`."""
        mine = self._placed.get(_spelled(values), {})
        return lambda layers: mine.get(layers, number) < number

    def _learnt_for(self, number: int) -> Learnt:
        """What the rounds before the trial's own say, and they alone."""
        return self._learnt.until(number // self.setting.round * self.setting.round, self.trials)


def _spelled(values: Mapping[str, Any]) -> str:
    return repr(sorted(values.items()))


def _counts(layers: Sequence[str]) -> tuple[str, ...]:
    """The layers in an order of their own, which tells how many there are of each."""
    return tuple(sorted(layers))
