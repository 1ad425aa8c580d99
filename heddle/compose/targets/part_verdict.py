"""Whether a block alone could be a layer of a target, whatever the other layers are. No torch.

A class takes its sizes from the first layer of each kind, so that a block that fits beside others also fits beside itself: what
does not fit here fits nowhere. Kinds that the class needs stand beside it as made-up layers, which are not judged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from heddle.compose.plan import plan
from heddle.compose.targets.target import Model, Refusal, Target
from heddle.compose.targets.verdict import verdict
from heddle.errors import HeddleError
from heddle.specs import ModelSpec

# The layer that is judged.
FIRST = "layers.0."
# Mixers that classes need, in their plainest form; sizes are taken from the block where it has them.
NEEDED: Mapping[str, Mapping[str, Any]] = {
    "attention": {"heads": 1, "head_dim": 8},
    "gated_deltanet": {"heads": 1, "head_dim": 8},
    "mla": {"heads": 1, "kv_lora_rank": 8, "qk_nope_head_dim": 8},
}


def part_refusals(target: Target, model: ModelSpec, block: str) -> tuple[Refusal, ...] | None:
    """What forbids the block in the class whatever the other layers are, and what forbids the model beside its layers.

    None where nobody can tell: the block is no model by itself.
    """
    alone = model.model_copy(update={"blocks": {block: model.blocks[block]}, "layers": [block, block]})
    try:
        runtime = plan(alone).runtime()
        return verdict(target, _with_needed(target, runtime), _concerns).refusals
    except (HeddleError, ValueError):
        return None


def kind_refusals(target: Target, model: ModelSpec, block: str) -> tuple[Refusal, ...] | None:
    """As `part_refusals`, by the kinds of its parts alone, which no size and no switch can change."""
    alone = model.model_copy(update={"blocks": {block: model.blocks[block]}, "layers": [block]})
    try:
        return tuple(filter(_concerns, target.kinds(plan(alone).runtime())))
    except (HeddleError, ValueError):
        return None


def _concerns(refusal: Refusal) -> bool:
    return refusal.path.startswith(FIRST) or refusal.path.partition(".")[0] != "layers"


def _with_needed(target: Target, runtime: Model) -> Model:
    """The first layer, and after it a copy of it with each mixer that the class needs and it is not."""
    first = runtime["layers"][0]
    own = first["mixer"]["kind"]
    if own not in target.mixers:
        return runtime
    made = [{**first, "mixer": _mixer(kind, runtime)} for kind in target.needs if kind != own]
    return {**runtime, "layers": [first, *(made or [first])]}


def _mixer(kind: str, runtime: Model) -> Any:
    mixer = runtime["layers"][0]["mixer"]
    sizes = {name: mixer[name] for name in NEEDED[kind] if name in mixer}
    data = {
        "vocab_size": 2,
        "hidden_size": runtime["hidden_size"],
        "context_length": runtime["context_length"],
        "blocks": {"needed": {"mixer": {"kind": kind, **NEEDED[kind], **sizes}, "channel": {"kind": "none"}}},
        "layers": ["needed"],
    }
    return plan(ModelSpec.model_validate(data)).runtime()["layers"][0]["mixer"]
