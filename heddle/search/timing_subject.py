"""What is timed: a model, the tokens that it reads, and the weights that it has.

For most models neither tokens nor weights change how long they take, and both are random. Where a router chooses by what tokens
say, both decide what is computed: such a model reads what a task has held out, over and over up to the length asked for, and
has its trained weights where there are any. The cache of a decode step has random contents all the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load
from torch import Tensor

from heddle.compose.build import build
from heddle.compose.hf.model import HeddlePreTrainedModel
from heddle.search.learned_share import learned_shares
from heddle.search.tasks import Task
from heddle.specs import ModelSpec
from heddle.specs.pattern import layers_of

Ids = NDArray[np.int32]
# Tokens of a task that travel to a worker.
MOST_TOKENS = 2**16


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to be timed. `ids` are sequences of a task, [sequences, T], `weights` a safetensors file's bytes; None: random."""

    spec: ModelSpec
    ids: Ids | None = None
    weights: bytes | None = None

    @property
    def inputs_told(self) -> str:
        """What it reads, as a row says it."""
        return "random" if self.ids is None else "task"

    @property
    def weights_told(self) -> str:
        """Which weights it has, as a row says it."""
        return "fresh" if self.weights is None else "trained"

    def built(self, device: str, dtype: torch.dtype) -> HeddlePreTrainedModel:
        """The model, in eval mode. Raises RuntimeError where the weights are not its own."""
        model = build(self.spec, seed=0, device=device, dtype=dtype, draw="device")
        model.eval()
        if self.weights is not None:
            _fill(model, load(self.weights))
        return model

    def tokens(self, batch: int, length: int) -> Tensor:
        """What it reads: each row begins with another sequence of the task, and goes on with those after it, then with the first.

        Shapes:  out: [batch, length], int64, on the CPU
        """
        if self.ids is None:
            generator = torch.Generator().manual_seed(0)
            return torch.randint(self.spec.vocab_size, (batch, length), generator=generator)
        starts = np.arange(batch)[:, None] * self.ids.shape[1]
        places = (starts + np.arange(length)) % self.ids.size
        return torch.from_numpy(self.ids.reshape(-1)[places].astype(np.int64))


def routes(model: ModelSpec) -> bool:
    """Whether a layer of it chooses by what tokens say."""
    blocks = {layer.block: layer.spec for layer in layers_of(model)}
    return any(block.mixer.is_routed() or block.channel.routes for block in blocks.values())


def subject_of(spec: ModelSpec, ids: Ids | None, weights: bytes | None = None) -> Subject:
    """`spec` with the tokens of a task and with weights, where it routes and knows those tokens."""
    known = ids is not None and routes(spec) and int(ids.max()) < spec.vocab_size
    return Subject(spec, ids if known else None, weights)


@lru_cache(maxsize=4)
def task_ids(task: Task) -> Ids:
    """The held-out sequences of a task, as many as MOST_TOKENS hold, one at least.  Shapes:  out: [sequences, T]"""
    ids = task.held_out("cpu")[0]
    return ids[: max(1, MOST_TOKENS // ids.shape[1])].numpy().astype(np.int32)


@torch.inference_mode()
def shares_of(model: HeddlePreTrainedModel, ids: Tensor, **call: object) -> list[list[float]]:
    """Of each router that tells it, [layer, share] in a pass over `ids`."""
    with learned_shares(model) as shares:
        model(input_ids=ids, logits_to_keep=1, **call)
    return [[float(layer), share] for layer, share in shares]


def _fill(model: HeddlePreTrainedModel, weights: Mapping[str, Tensor]) -> None:
    """Copies the tensors into those of the model; what has two names there is stored once."""
    ours: dict[int, dict[str, Tensor]] = {}
    for name, tensor in model.state_dict().items():
        ours.setdefault(tensor.data_ptr(), {})[name] = tensor
    for names in ours.values():
        stored = [name for name in names if name in weights]
        if not stored:
            raise RuntimeError(f"the weights to be timed have no {next(iter(names))}")
        names[stored[0]].copy_(weights[stored[0]])
