"""Random specs that no class of transformers holds: every kind of mixer, of channel block and of composition, and encoders.

Fields begin at the cases of a kind; those that have a few values are drawn anew. What the language forbids is drawn again.
"""

from __future__ import annotations

import random
from typing import Any, Literal, get_args, get_origin

import torch
from native_specs import rope
from toys import shaken

from heddle.compose.build import build
from heddle.compose.modules.prompt_router import PromptRouter
from heddle.compose.plan import plan
from heddle.compose.targets.verdict import verdicts
from heddle.errors import HeddleError
from heddle.specs import CHANNELS, MIXERS, ModelSpec, Site
from heddle.specs.kinds import HeadedMixer
from heddle.specs.mixers import Ttt
from heddle.specs.plugins import OPTIONAL

Data = dict[str, Any]
HIDDEN = 48
SITE = Site(HIDDEN, context_length=512)
# Those of other packages run on a GPU alone.
KINDS = sorted({*MIXERS} - {one.kind for one in OPTIONAL})
COMPOSED = ("head_split", "layer_router", "moh", "parallel", "sequential", "token_router")
PLAIN = [kind for kind in KINDS if kind not in COMPOSED]
# What no causal language model has.
SEES_LATER = [
    kind
    for kind in PLAIN
    if not any(MIXERS[kind].model_validate({"kind": kind, **case}).is_causal for case in MIXERS[kind].cases)
]
CAUSAL = [kind for kind in PLAIN if kind not in SEES_LATER]
HEADED = [kind for kind in CAUSAL if issubclass(MIXERS[kind], HeadedMixer)]
# Fields that take numbers, and a few of those that a tiny model has room for; None where the field allows it.
FEW: dict[str, tuple[Any, ...]] = {
    "heads": (2, 3, 4, 6), "kv_heads": (None, 1, 2), "head_dim": (None, 8, 12), "value_dim": (None, 8, 16),
    "window": (None, 3, 7, 30), "short_conv": (None, 2, 4), "scale": (None, 0.2), "softcap": (None, 5.0),
    "value_heads": (None, 4), "groups": (1, 2), "chunk": (1, 5, 16), "block": (4, 7), "top": (None, 1, 2), "keep": (1, 2),
    "norm_eps": (None, 1e-5), "static_taps": (None, 0, 2), "key_multiplier": (1.0, 0.4), "gate_rank": (4, 8), "branching": (2, 3),
    "clusters": (2, 3), "members": (2, 9), "sink_tokens": (0, 2, 5),
}  # fmt: skip
TRIES = 1000


def spec(seed: int) -> ModelSpec:
    """The random spec of a seed: its first mixer is of each kind in turn, and every fifth is an encoder."""
    some = random.Random(f"remote {seed}")
    for _ in range(TRIES):
        try:
            made = ModelSpec.model_validate(model(some, KINDS[seed % len(KINDS)], encodes=seed % 5 == 4))
            runtime = plan(made).runtime()
        except (HeddleError, ValueError):
            continue
        if not any(one.fits for one in verdicts(runtime)):
            return made
    raise AssertionError(f"no spec of seed {seed} in {TRIES} tries")


def model(some: random.Random, first: str, *, encodes: bool) -> Data:
    """A model of three to five layers; an encoder where a mixer of this kind sees both sides."""
    encodes = encodes or first in SEES_LATER
    other = mixer(some, encodes=encodes)
    if encodes and some.random() < 0.7:
        other = {"kind": "attention", "heads": 4, "window": some.choice([None, 5]), "causal": False}
    blocks = {"a": block(some, mixer(some, first, encodes=encodes)), "b": block(some, other)}
    layers: list[Any] = ["a", "b", *some.choices(["a", "b"], k=some.choice([0, 1]))]
    some.shuffle(layers)
    if some.random() < 0.4 and not encodes:
        pair = taking(some)
        blocks |= pair
        layers = [*pair, *layers] if some.random() < 0.5 else ["given", *layers, "taking"]
    if some.random() < 0.3:
        layers[0] = {"block": layers[0], "name": "start"}
        blocks["late"] = block(some, mixer(some, encodes=encodes)) | {"skip": skip(some)}
        layers += ["late"] * some.choice([1, 2])
    sizes = {
        "vocab_size": 256,
        "hidden_size": HIDDEN,
        "context_length": 512,
        "norm_eps": some.choice([1e-5, 1e-6]),
    }
    factors = {"embedding_multiplier": some.choice([1.0, 3.0]), "logit_multiplier": some.choice([1.0, 0.5])}
    ends = {"tie_embeddings": some.random() < 0.5, "logit_softcap": some.choice([None, None, 5.0])}
    kind = {"kind": "encoder", "readout": readout(some)} if encodes else {}
    return {**kind, **sizes, **factors, **ends, "blocks": blocks, "layers": layers}


def block(some: random.Random, inner: Data) -> Data:
    data: Data = {"mixer": inner, "channel": channel(some), "norm": some.choice(["rmsnorm", "layernorm"])}
    data["norm_placement"] = some.choice(["pre", "pre", "post", "sandwich"])
    for name in ("residual", "channel_residual"):
        if some.random() < 0.2:
            past = "normed" if data["norm_placement"] != "post" and some.random() < 0.5 else "stream"
            data[name] = {"of": past, "stream": some.choice([1.0, 0.7]), "branch": some.choice([1.0, 0.4])}
    return data | {"shared": some.random() < 0.2}


def skip(some: random.Random) -> Data:
    return {"source": some.choice(["embedding", "start"]), "init": some.choice([0.25, 0.5])}


def readout(some: random.Random) -> Data | None:
    kind = some.choice([None, "last", "mean", "cls", "ep"])
    more = {"queries": some.choice([2, 4]), "reduction": some.choice([1, 2])} if kind == "ep" else {}
    return None if kind is None else {"kind": kind, "classes": some.choice([2, 5]), **more}


def channel(some: random.Random) -> Data:
    kind = some.choice([*CHANNELS])
    if kind == "none":
        return {"kind": kind}
    if kind != "moe":
        return {"kind": kind, "width": some.choice([24, 40])}
    experts: Data = {"kind": kind, "experts": some.choice([3, 4]), "active": some.choice([1, 2]), "width": 12}
    experts |= {"score": some.choice(["softmax", "sigmoid"]), "normalise": some.random() < 0.5}
    shared = {"shared_width": 16, "shared_gate": some.random() < 0.5} if some.random() < 0.5 else {}
    return experts | shared | {"correction_bias": some.random() < 0.3, "scale": some.choice([1.0, 2.5])}


def taking(some: random.Random) -> dict[str, Data]:
    """A layer, and one that takes its keys and values, its values, or its choice of blocks."""
    what = some.choice(["keys_from", "values_from", "selection"])
    given: Data = {
        "kind": "attention",
        "heads": 4,
        "kv_heads": some.choice([1, 2, 4]),
        "qk_norm": some.random() < 0.5,
    }
    chosen = {"block": some.choice([4, 8]), "count": 3}
    first = given | ({"selection": chosen} if what == "selection" else {"window": some.choice([None, 9])})
    later = {"selection": {**chosen, "source": "given"}} if what == "selection" else {what: "given"}
    window = {} if what == "selection" else {"window": first["window"]}
    return {"given": block(some, first) | {"shared": False}, "taking": block(some, given | window | later)}


def mixer(some: random.Random, kind: str = "", *, encodes: bool = False, depth: int = 1) -> Data:
    """A mixer that can be built, of this kind or of any; one that sees later tokens only in an encoder."""
    for _ in range(TRIES):
        chosen = kind or some.choice([*(PLAIN if encodes else CAUSAL), *COMPOSED])
        made = (
            composed(some, chosen, depth, encodes=encodes)
            if chosen in COMPOSED
            else plain(some, chosen, encodes=encodes)
        )
        try:
            found = MIXERS[chosen].model_validate(made)
        except ValueError:
            continue
        if not found.problems(SITE) and (encodes or found.is_causal):
            return made
    raise AssertionError(f"no {kind or 'mixer'} in {TRIES} tries")


def plain(some: random.Random, kind: str, *, encodes: bool = False) -> Data:
    """A case of a kind, some of its fields drawn anew."""
    schema = MIXERS[kind]
    data = {"kind": kind, **some.choice(schema.cases)}
    for name, field in schema.model_fields.items():
        if name == "kind" or some.random() < 0.6:
            continue
        values = [rope(some), None] if name == "rope" else few(name, field.annotation)
        if values and (name != "causal" or encodes):
            data[name] = some.choice(values)
    if kind == "attention" and some.random() < 0.2:
        data |= {
            "window": None,
            "selection": {"block": 4, "count": 3, "scores": some.choice(["mean", "kernels"])},
        }
    return data | (within_float32(data) if kind == "ttt" else {})


def within_float32(data: Data) -> Data:
    """What a drawn `ttt` takes instead, so that its weights stay within float32 for the tokens of a test.

    Gradients are taken at weights that only `normalise: after` has brought back to their first norm. Otherwise those of an MLP
    grow with a power of the weights, whose exponent doubles with every chunk, in float64 too; those of a linear memory and the
    loss `l2` multiply them by a factor a chunk, of which a test of few chunks holds enough. Those of `dot` see no weights there.
    """
    held = Ttt.model_validate(data)
    if held.normalise == "after" or (held.memory, held.loss) == ("linear", "dot"):
        return {}
    return {"normalise": "after"} if held.memory == "mlp" else {"chunk": max(held.chunk, 16)}


def few(name: str, annotation: Any) -> list[Any]:
    """Values that a field may be drawn from; none for one that stays as it is."""
    if annotation is bool:
        return [False, True]
    if get_origin(annotation) is Literal:
        return [*get_args(annotation)]
    return [value for value in FEW.get(name, ()) if value is not None or type(None) in get_args(annotation)]


def composed(some: random.Random, kind: str, depth: int, *, encodes: bool) -> Data:
    """A mixer of mixers, which are of any kind where that is not too deep."""

    def inner() -> Data:
        deep = some.choice(PLAIN if encodes else CAUSAL) if depth > 1 else ""
        return mixer(some, deep, encodes=encodes, depth=depth + 1)

    merge = {"merge": some.choice(["sum", "mean", "gate"]), "norm": some.random() < 0.5}
    if kind == "moh":
        return {
            "kind": kind, "mixer": plain(some, some.choice(HEADED)), "shared_heads": some.choice([0, 1, 2]),
            "active": some.choice([1, 2]), "router": some.choice(["learned", "norms"]),
        }  # fmt: skip
    if kind == "head_split":
        both = [plain(some, some.choice(HEADED)) | {"heads": 4} for _ in range(2)]
        return {"kind": kind, "mixers": both, "share": some.choice([0.25, 0.5, 0.75])}
    pair = [inner(), inner()]
    if kind == "layer_router":
        return {"kind": kind, "mixers": pair, "router_dim": 4, "pool": some.choice([3, 100])}
    if kind == "token_router":
        return {
            "kind": kind,
            "mixers": pair,
            **merge,
            "chunk": some.choice([1, 5]),
            "budget": some.choice([None, 0.25]),
        }
    parts = pair + [inner()] * (some.random() < 0.2)
    if kind == "sequential":
        return {"kind": kind, "mixers": parts, "residual": some.random() < 0.5}
    weights = some.choice([None, [some.choice([0.5, 1.0, 2.0]) for _ in parts]])
    merge["merge"] = some.choice(["sum", "mean", "gate", "concat"])
    return {"kind": kind, "mixers": parts, **merge, "weights": weights}


@torch.no_grad()
def ready(made: ModelSpec, seed: int = 0) -> Any:
    """The model in float32, every weight of which counts. Which mixer a prompt picks is drawn for each layer: with it given the
    kinds that pick keep what they are exempt from."""
    found = shaken(build(made, seed=seed)).float()
    some = random.Random(seed)
    for part in found.modules():
        if isinstance(part, PromptRouter):
            part.last_weight.zero_()
            part.last_bias.copy_(torch.tensor(some.choice([[1.0, 0.0], [0.0, 1.0]])))
    return found
