"""What stays the same over a search: its spec file, objectives, budgets, machine – and the requests they
make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from heddle.compose.train import Recipe
from heddle.search.evaluate import Evaluate, Training
from heddle.search.evaluations import LATENCY, Request
from heddle.search.latency import Effort, Place, measure
from heddle.search.ledger import key_of
from heddle.search.limits import Limits
from heddle.search.lock import NOW, Frozen, deterministically
from heddle.search.record import BudgetInfo, TaskInfo, rung_stage
from heddle.search.space import Candidate
from heddle.search.tasks import Task
from heddle.search.timing_subject import routes, task_ids
from heddle.specs import Spec, SpecFile


@dataclass(frozen=True, slots=True)
class Objective:
    """A task, how a model is trained for it with the search's seed, once a recipe, and how the record names it.

    `shared` stands for the task in the jobs of the workers.
    """

    task: Task
    shared: Any
    # Alike but for their learning rates.
    recipes: tuple[Recipe, ...]
    info: TaskInfo
    # Of the rungs before the last, counted from 0.
    rung: int | None = None
    # Trained for longer than the search does, at its end.
    is_longer: bool = False

    @property
    def recipe(self) -> Recipe:
        """The recipe of the first learning rate; nearly always there is one."""
        return self.recipes[0]

    @property
    def stage(self) -> str:
        """Where the ledger keeps its results."""
        if self.is_longer:
            return f"longer-{self.info.name}"
        return self.info.name if self.rung is None else rung_stage(self.rung, self.info.name)


@dataclass(frozen=True, slots=True)
class Setting:
    """All that stays the same over a search."""

    folder: Path
    file: SpecFile
    objectives: tuple[Objective, ...]
    # The task whose trained weights are kept and exported.
    exported: str
    budgets: tuple[BudgetInfo, ...]
    # Models the budgets are relative to, by name; the first is the run's baseline.
    references: Mapping[str, Candidate]
    device: str
    # What of the machine decides a result: part of every key of the ledger.
    environment: Mapping[str, Any]
    trials: int
    seconds: float | None
    round: int
    seed: int
    confirm_seeds: int
    effort: Effort
    evaluate: Evaluate
    # What is known of the budgets before anything is timed.
    limits: Limits
    # Trainings with deterministic kernels alone, and a winner that no second timing unseats.
    deterministic: bool = False
    # Where latencies are taken from rather than measured.
    frozen: Frozen | None = None
    # The shorter trainings before that of `objectives`; the best 1 / eta of each go on.
    rungs: tuple[tuple[Objective, ...], ...] = ()
    eta: float = 0.0

    @property
    def timed(self) -> tuple[BudgetInfo, ...]:
        """The budgets that a timing tells of, one of those that go by the same."""
        measured = [budget for budget in self.budgets if budget.is_measured]
        return tuple({budget.timing: budget for budget in measured}.values())

    @property
    def feeds_back(self) -> bool:
        """Whether the timings at the end decide who wins."""
        return not self.deterministic and (self.frozen is None or self.frozen.timed_again)

    @property
    def timeout(self) -> float | None:
        """Seconds an evaluation may take, where the spec says so."""
        return None if self.file.spec.search is None else self.file.spec.search.timeout

    @property
    def must_fit(self) -> tuple[str, ...]:
        """Classes of transformers that must hold whatever is tried, and servers that must take it."""
        search = self.file.spec.search
        return () if search is None or search.export is None else tuple(search.export.must_fit)

    @property
    def infos(self) -> tuple[TaskInfo, ...]:
        return tuple(objective.info for objective in self.objectives)

    @property
    def kept(self) -> Objective:
        """The objective whose trained weights are kept."""
        (kept,) = (each for each in self.objectives if each.info.name == self.exported)
        return kept

    def as_trained(self, spec: Spec, learning_rate: float | None = None) -> Spec:
        """`spec` with the tokens and the learning rate of the kept training as its own: `heddle train` repeats that one.

        Of several rates it is the first, unless `learning_rate` says which was best. `heddle train` knows text alone; a search
        without a text task leaves `train` as it stands.
        """
        kept = self.kept
        if kept.task.metric != "bits_per_byte":
            return spec
        own = {"tokens": kept.recipe.tokens, "learning_rate": learning_rate or kept.recipe.learning_rate}
        return spec.model_copy(update={"train": spec.train.model_copy(update=own)})

    def timing(
        self,
        number: int,
        one: Candidate,
        budget: BudgetInfo,
        *,
        purpose: str = "search",
        weights: Any = None,
    ) -> Request:
        """A request for the latency of `one` at the budget's place, beside the model the budget is relative
        to. A model with routers reads what the exported task has held out, and has `weights`, where they are given."""
        beside = self.references.get(budget.relative_to or "")
        inputs: dict[str, Any] = {
            "phase": budget.phase,
            "batch": budget.batch,
            "context": budget.context,
            "beside": None if beside is None else beside.hash,
            "purpose": purpose,
            "environment": self.environment,
        }
        routed = routes(one.model) or (beside is not None and routes(beside.model))
        reads = self.kept.task if routed else None
        inputs |= {} if reads is None else {"reads": reads.digest}
        inputs |= {} if weights is None else {"weights": "trained"}
        call = partial(
            measure,
            reference=None if beside is None else beside.model,
            reference_name=budget.relative_to,
            device=self.device,
            effort=self.effort,
            ids=None if reads is None else task_ids(reads),
        )
        place = Place(budget.phase, budget.batch, budget.context)
        known = None
        if self.frozen is not None and purpose != NOW:
            known = self.frozen.row(one.hash, inputs)
        if known is not None and known["key"] != key_of(inputs):
            # It was measured elsewhere, and the ledger says so.
            inputs["frozen"] = known["key"]
        return Request(number, one.hash, LATENCY, inputs, call, (one.model, place, weights), known)

    def training(
        self,
        number: int,
        one: Candidate,
        objective: Objective,
        *,
        recipe: Recipe | None = None,
        seed: int | None = None,
    ) -> Request:
        """A request for the score of `one` at a task; with the search's own seed the weights of a whole training are kept.

        `recipe` is one of the objective's; without it there is no other.
        """
        keep = seed is None and objective.stage == self.exported
        recipe = recipe or objective.recipe
        recipe = recipe if seed is None else replace(recipe, seed=seed)
        inputs = {
            "data": objective.task.digest,
            "recipe": asdict(recipe),
            "seed": recipe.seed,
            "environment": self.environment,
            **({"deterministic": True} if self.deterministic else {}),
        }
        evaluate = partial(deterministically, self.evaluate) if self.deterministic else self.evaluate
        training = Training(one.model, recipe, self.device, keep)
        arguments = (training, objective.shared)
        is_one_of_several = len(objective.recipes) > 1
        return Request(
            number,
            one.hash,
            objective.stage,
            inputs,
            evaluate,
            arguments,
            is_one_of_several=is_one_of_several,
        )
