"""Train the one model a spec describes on the spec's text (an encoder on masked text), score it, and keep it as a run folder.

    <run>/spec.yaml            the spec as trained, spaces resolved; loads again to the same hash
    <run>/model.safetensors    the weights, float32; a tied head is stored once
    <run>/train.json           recipe, loss curve, auxiliary losses, score, corpus, environment; written
                               last, so that it marks a whole run

Each file is written whole or not at all. A training that was stopped leaves no train.json and starts anew.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save
from torch import nn

from heddle.compose.build import build
from heddle.compose.hf.model import HeddlePreTrainedModel
from heddle.compose.memory import memory_told
from heddle.compose.train import MEMORY_HINT, Fit, OnStep, Recipe, fit
from heddle.errors import HeddleError
from heddle.search import environment
from heddle.search.durable import write_json, write_whole
from heddle.search.model_kinds import text_task_of
from heddle.search.tasks import Score, Task, batches, recipe_for, task_of
from heddle.specs import Spec, SpecFile, load, spec_hash, to_yaml

SPEC_FILE = "spec.yaml"
WEIGHTS_FILE = "model.safetensors"
TRAIN_FILE = "train.json"
FORMAT = 1
# A router that sends more than this share to one side has stopped to choose.
COLLAPSED = 0.95
# What is said of a share that is above it at the end of a training.
BUSIEST = {
    "busiest_experts": "the experts' router has collapsed: {:.0%} of the choices fall on as many experts as one token "
    "is sent to; a larger channel.balance evens the load",
    "busiest_heads": "a router of heads has collapsed: {:.0%} of the choices fall on as many heads as one token "
    "turns on; a larger mixer.balance evens the load",
    "largest_cluster": "the clusters of routing have collapsed: {:.0%} of the tokens of a head fall on one of them",
}
# Likewise of the share of one of two sides: the name, by what square it misses what was asked for, if anything was (that of an
# older version behind it), the side, the other one, and what is said.
TOKENS = (
    "a token router has collapsed: {:.0%} of the tokens go to the {} mixer; mixer.budget asks for a share"
)
CHUNKS = "the router of nats_l has collapsed: {:.0%} of the chunks go to {}; mixer.budget asks for a share"
PROMPTS = (
    "a layer router has collapsed: {:.0%} of the prompts go to the {} mixer; mixer.target asks for a share"
)
SIDES = (
    ("router_share", ("router_budget",), ("first", "second"), TOKENS),
    ("nats_l_share", ("nats_l_budget",), ("softmax attention", "the recurrence"), CHUNKS),
    ("layer_router_share", ("layer_router_missed", "layer_router"), ("second", "first"), PROMPTS),
)


@dataclass(frozen=True, slots=True)
class TrainRun:
    """A training as its folder tells it; `record` is train.json."""

    path: Path
    record: Mapping[str, Any]

    @property
    def name(self) -> str:
        return str(self.record["name"])

    @property
    def hash(self) -> str:
        return str(self.record["spec_hash"])

    @property
    def score(self) -> Score:
        return Score(**self.record["score"])

    @property
    def losses(self) -> tuple[float, ...]:
        return tuple(self.record["losses"])

    @property
    def aux(self) -> dict[str, tuple[float, ...]]:
        """The auxiliary losses of each step by name, without their factors; none in a run of an older version."""
        return {name: tuple(values) for name, values in self.record.get("aux", {}).items()}

    @property
    def warnings(self) -> list[str]:
        """What a user should know of the training: routers that have collapsed."""
        return collapsed_routers(self.aux)

    def spec_file(self) -> SpecFile:
        return load(self.path / SPEC_FILE)

    def model(self, *, device: str = "cpu") -> HeddlePreTrainedModel:
        """The trained model, float32, in eval mode.

        Raises `no-weights` if the weights are gone, damaged or of another spec.
        """
        model = build(self.spec_file().spec.model, device=device)
        path = self.path / WEIGHTS_FILE
        try:
            load_model(model, path, device=device)
        except (OSError, RuntimeError, SafetensorError) as error:
            hint = f"train it again: heddle train {self.path / SPEC_FILE}"
            raise HeddleError("no-weights", f"cannot load {path}: {error}", hint=hint) from error
        model.eval()
        return model


def train(
    file: SpecFile,
    out: Path,
    *,
    seed: int | None = None,
    device: str | None = None,
    on_step: OnStep | None = None,
) -> TrainRun:
    """Trains the spec's model on its `data` with its `train` recipe, scores it on the validation split,
    writes `out`.

    A causal language model is trained at the task `text`, an encoder at `masked_bytes`. A spec with a search space is trained as
    it stands with the first choice of each. `seed` overrides `train.seed` and decides weights and batches; `device` is CUDA where
    there is one. `on_step` is as for `heddle.compose.train.fit`.

    Raises `conflicting-fields` for a readout of fewer classes than there are tokens, `run-exists`, `disk-full`, and what the
    task, the build and the training raise.
    """
    wanted = text_task_of(file)
    device = device or environment.pick_device()
    spec = file.spec
    _open_folder(out, spec)
    task = task_of(wanted, spec)
    recipe = recipe_for(wanted, spec.train, seed=seed)
    with memory_told("no memory for the model and its evaluation", MEMORY_HINT):
        model = build(spec.model, seed=recipe.seed, device=device)
        result = fit(model, batches(task, recipe, device), recipe, on_step=on_step)
        score = task.evaluate(model, device=device)
    write_whole(out / WEIGHTS_FILE, save(weights_of(model), metadata={"format": "pt"}))
    write_json(out / TRAIN_FILE, _record(spec, task, recipe, result, score=score, device=device))
    return load_run(out)


def load_run(path: Path | str) -> TrainRun:
    """The training in folder `path`. Raises `run-not-found` if there is none or it never finished."""
    folder = Path(path)
    try:
        record = json.loads((folder / TRAIN_FILE).read_bytes())
    except FileNotFoundError:
        raise HeddleError(
            "run-not-found",
            f"{folder} is not a finished training run: it has no {TRAIN_FILE}",
            hint="heddle train SPEC --out DIR makes one",
        ) from None
    except ValueError as error:
        raise HeddleError("run-not-found", f"{folder / TRAIN_FILE} is damaged: {error}") from None
    return TrainRun(folder, record)


def is_train_run(path: Path | str) -> bool:
    """Whether folder `path` holds a finished training."""
    return (Path(path) / TRAIN_FILE).is_file()


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's tensors on the CPU by name, one that has two names once: what safetensors can store."""
    seen: set[int] = set()
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            weights[name] = tensor.detach().cpu().contiguous()
    return weights


def collapsed_routers(aux: Mapping[str, Sequence[float]]) -> list[str]:
    """A line for each kind of router that had stopped to choose in the last tenth of a training."""
    tails = {name: held[len(held) * 9 // 10 :] for name, held in aux.items()}
    last = {name: sum(tail) / len(tail) for name, tail in tails.items()}
    found = [line.format(last[name]) for name, line in BUSIEST.items() if last.get(name, 0.0) > COLLAPSED]
    for name, squares, (side, other), line in SIDES:
        share = last.get(name, 0.5)
        missed = next((last[one] for one in squares if one in last), math.inf)
        # What was asked for is no collapse, as long as it is what came.
        if max(share, 1.0 - share) > COLLAPSED and missed > (1.0 - COLLAPSED) ** 2:
            found.append(line.format(max(share, 1.0 - share), side if share > COLLAPSED else other))
    return found


def _open_folder(out: Path, spec: Spec) -> None:
    """Makes the folder and writes the spec: a disk that is full says so before the training, not after."""
    if out.exists() and not out.is_dir():
        raise HeddleError("run-exists", f"{out} is a file", hint="name a new folder with --out")
    if is_train_run(out) or (out.exists() and any(p.name != SPEC_FILE for p in out.iterdir())):
        raise HeddleError("run-exists", f"{out} is there already", hint="name a new folder with --out")
    write_whole(out / SPEC_FILE, to_yaml(spec).encode())


def _record(
    spec: Spec, task: Task, recipe: Recipe, result: Fit, *, score: Score, device: str
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "kind": "train",
        "name": spec.name,
        "spec_hash": spec_hash(spec.model),
        "task": {"name": task.name, "metric": task.metric, "chance": task.chance, "digest": task.digest},
        "score": asdict(score),
        "normalised": task.normalised(score),
        "recipe": asdict(recipe),
        "steps": result.steps,
        "tokens": result.tokens,
        "wall_s": result.wall_s,
        "losses": list(result.losses),
        "aux": {name: list(values) for name, values in result.aux.items()},
        "environment": environment.describe(device),
    }
