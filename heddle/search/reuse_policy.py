"""A trained model whose attention reads chosen blocks of keys: which layers choose, and which take a choice over (HyLRA)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from heddle.compose.build import build_causal_lm
from heddle.compose.hf.model import HeddleForCausalLM
from heddle.compose.plan import plan
from heddle.errors import HeddleError
from heddle.search.evaluators.layer_profile import Blocks, LayerProfile, layer_profile
from heddle.search.export import BEST, trained_model
from heddle.search.placement.reuse import Policy, Profile, best_overlap, profiler_resets
from heddle.search.tasks import make_task
from heddle.specs import ModelSpec, TextTask
from heddle.specs.layer import OneLayer, Repeat
from heddle.specs.pattern import expand_layers, layers_of, overridden

# Queries of each sequence that are looked at, in its later half.
QUERIES = 16


@dataclass(frozen=True, slots=True)
class ReusePolicy:
    """What the layers `layers` of a model do by `policy`, in its order, from what `profile` told; `model` is the spec of that,
    `network` the same with the trained weights."""

    layers: tuple[int, ...]
    profile: LayerProfile
    policy: Policy
    model: ModelSpec
    network: HeddleForCausalLM


def reuse_policy(
    run: Path | str,
    inputs: Tensor | None = None,
    *,
    full: int = 1,
    resets: int | None = None,
    blocks: Blocks = Blocks(),  # noqa: B008 - frozen
    sequences: int = 4,
    trial: str | int = BEST,
) -> ReusePolicy:
    """Profiles the trained model in the folder `run`, of a search, a training or an import, and solves which of its layers of
    softmax attention are full, choose blocks, or take an earlier choice over (HyLRA, arXiv 2602.00777).

    The profile is of token ids `inputs` [B, T], or of `sequences` held-out ones of the spec's text. The `full` layers are those
    whose attention needs the largest share of blocks; at most `resets` layers after the first are full or choose, by default as
    many as the released profiler has. Layers with a window or a selection of their own stay as they are.

    Raises:
        HeddleError: "run-not-found", "no-weights"; "bad-argument" for a model without attention that reads all, or blocks that do
            not fit `selection`; "nothing-feasible" for too few resets; what the corpus raises.
    """
    spec, network = trained_model(run, trial)
    if inputs is None:
        task = make_task(TextTask(), spec.data, vocab_size=spec.model.vocab_size, tokenizer=spec.tokenizer)
        inputs = task.held_out("cpu")[0][:sequences]
    length = inputs.shape[1]
    profile = layer_profile(network, inputs, _queries(length), blocks)
    layers = _dense(spec.model, profile)
    at = [profile.layers.index(layer) for layer in layers]
    fragile = sorted(range(len(at)), key=lambda one: -profile.coverage[at[one]])[:full]
    overlap = np.array(profile.overlap)[np.ix_(at, at)]
    allowed = profiler_resets(len(at), full) if resets is None else resets
    policy = best_overlap(Profile(overlap, frozenset(fragile)), allowed)
    model = with_policy(spec.model, layers, policy, blocks)
    sparse = build_causal_lm(model)
    sparse.load_state_dict(network.state_dict())
    return ReusePolicy(layers, profile, policy, model, sparse.eval())


def _queries(length: int) -> list[int]:
    return [int(place) for place in np.linspace(length // 2, length - 1, min(QUERIES, length // 2 + 1))]


def _dense(model: ModelSpec, profile: LayerProfile) -> tuple[int, ...]:
    """The layers of plain attention that see all tokens before theirs."""
    specs: list[Any] = [layer.spec.mixer for layer in layers_of(model)]
    found = tuple(
        index
        for index in profile.layers
        if specs[index].kind == "attention" and specs[index].window is None and specs[index].selection is None
    )
    if not found:
        raise HeddleError(
            "bad-argument", "no layer of this model is attention without a window or a selection"
        )
    return found


def with_policy(model: ModelSpec, layers: Sequence[int], policy: Policy, blocks: Blocks) -> ModelSpec:
    """`model` with a `selection` in those of its layers that choose or take over; layer i of `policy` is the i-th of `layers`.

    Raises "bad-argument" for sink or recent tokens that are no whole blocks, and what planning the model raises.
    """
    if blocks.sink % blocks.size or blocks.recent % blocks.size:
        what = f"{blocks.sink} first and {blocks.recent} last tokens are not whole blocks of {blocks.size}"
        raise HeddleError("bad-argument", f"a selection always reads whole blocks, and {what}")
    chosen = {
        "block": blocks.size,
        "count": blocks.top,
        "sink": blocks.sink // blocks.size,
        "recent": max(1, blocks.recent // blocks.size),
    }
    items = _items(model)
    for index, role, source in zip(layers, policy.roles, policy.sources, strict=True):
        if role == "full":
            continue
        taken = {} if source < 0 else {"source": _named(items, layers[source])}
        new = {"mixer": {"selection": {**chosen, **taken}}}
        items[index] = items[index].model_copy(update={"override": overridden(items[index].override, new)})
    made = model.model_copy(update={"layers": items})
    plan(made)
    return made


def _named(items: list[OneLayer], index: int) -> str:
    """The name of a layer, which it is given if it has none."""
    if items[index].name is None:
        items[index] = items[index].model_copy(update={"name": f"select{index}"})
    return str(items[index].name)


def _items(model: ModelSpec) -> list[OneLayer]:
    """Each layer in full."""
    found: list[OneLayer] = []
    for item in model.layers:
        if isinstance(item, OneLayer):
            found.append(item)
        else:
            names = item.pattern * item.repeat if isinstance(item, Repeat) else [item]
            found += [OneLayer(block=name) for name in names]
    assert len(found) == len(expand_layers(model))
    return found
