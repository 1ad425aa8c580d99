"""The tasks of a search as its spec asks for them, of the last rung and of those before it, each with its recipe."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from heddle.compose.train import Recipe
from heddle.errors import HeddleError
from heddle.search.record import TaskInfo
from heddle.search.setting import Objective
from heddle.search.tasks import Task, recipes_for, task_of
from heddle.specs import Spec, SpecFile, TaskSpec

# Each task with a recipe for each of its learning rates.
Tasks = list[tuple[Task, tuple[Recipe, ...], TaskInfo]]
# The objectives of the last rung, and of each before it.
Trained = tuple[tuple[Objective, ...], tuple[tuple[Objective, ...], ...]]


@dataclass(frozen=True, slots=True)
class Asked:
    """What models are trained for: at the last rung `tasks`, at those before it `rungs`, of which the best 1 / `eta` go on."""

    tasks: Tasks
    rungs: tuple[Tasks, ...] = ()
    eta: float = 0.0

    @property
    def data(self) -> dict[str, str]:
        """The digest of each task's data by its name; a task of an earlier rung is named with it."""
        found = {info.name: task.digest for task, _, info in self.tasks}
        for index, rung in enumerate(self.rungs):
            found |= {f"rung {index + 1} {info.name}": task.digest for task, _, info in rung}
        return found

    @property
    def exported(self) -> str:
        """The name of the task whose trained weights are kept: the first of text, else the first."""
        names = [info.name for _, _, info in self.tasks if info.metric == "bits_per_byte"]
        return (names or [self.tasks[0][2].name])[0]

    @property
    def read(self) -> Task:
        """The task of that name, which models with routers read when they are timed."""
        (found,) = (task for task, _, info in self.tasks if info.name == self.exported)
        return found

    @property
    def recorded(self) -> dict[str, Any]:
        """What run.json says of the rungs; nothing where there are none."""
        if not self.rungs:
            return {}
        before = [
            {
                "tasks": [asdict(info) for _, _, info in rung],
                "tokens": [recipes[0].tokens for _, recipes, _ in rung],
            }
            for rung in self.rungs
        ]
        return {"rungs": {"eta": self.eta, "before": before}}

    def objectives(self, share: Callable[[Task], Any]) -> Trained:
        """What the workers train for; a task that comes twice is shared once."""
        shared: dict[str, Any] = {}

        def objective(
            task: Task, recipes: tuple[Recipe, ...], info: TaskInfo, rung: int | None = None
        ) -> Objective:
            if task.digest not in shared:
                shared[task.digest] = share(task)
            return Objective(task, shared[task.digest], recipes, info, rung)

        last = tuple(objective(*each) for each in self.tasks)
        before = (tuple(objective(*each, at) for each in rung) for at, rung in enumerate(self.rungs))
        return last, tuple(before)


def asked_of(file: SpecFile) -> Asked:
    """The tasks of the spec's `search`; each corpus is read once.

    Raises:
        HeddleError: "missing-field" without a `search`; what `make_task` raises.
    """
    spec = file.spec
    if spec.search is None:
        raise HeddleError(
            "missing-field",
            "there is no `search` section to search by",
            where=file.where(""),
            hint="heddle init shows one",
        )
    made: dict[str, Task] = {}
    tasks = _made(spec, spec.search.tasks, made)
    if spec.search.rungs is None:
        return Asked(tasks)
    rungs = [
        _made(spec, rung.tasks, made) if rung.share is None else _shorter(tasks, rung.share)
        for rung in spec.search.rungs.before
    ]
    return Asked(tasks, tuple(rungs), spec.search.rungs.eta)


def _made(spec: Spec, items: Iterable[TaskSpec], made: dict[str, Task]) -> Tasks:
    """Tasks with their recipes; a second task of a kind gets a number in its name."""
    names, found = Counter[str](), []
    for item in items:
        same = item.model_dump_json(exclude={"tokens", "learning_rate", "learning_rates"})
        if same not in made:
            made[same] = task_of(item, spec)
        task = made[same]
        names[task.name] += 1
        name = task.name if names[task.name] == 1 else f"{task.name}-{names[task.name]}"
        info = TaskInfo(name, task.metric, task.higher_is_better, task.chance, task.best)
        found.append((task, recipes_for(item, spec.train), info))
    return found


def _shorter(tasks: Tasks, share: float) -> Tasks:
    return [
        (
            task,
            tuple(replace(one, tokens=max(1, round(share * one.tokens))) for one in recipes),
            info,
        )
        for task, recipes, info in tasks
    ]


def without_unset(data: Any) -> Any:
    """`data` of a spec without the rates that no task names, as it was before a task could: its digest stays."""
    if isinstance(data, list):
        return [without_unset(one) for one in data]
    if not isinstance(data, dict):
        return data
    return {
        key: without_unset(one) for key, one in data.items() if key != "learning_rates" or one is not None
    }
