"""Equal computations have one hash however they are spelled, and others have another."""

from __future__ import annotations

import json
import random
from copy import deepcopy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heddle.specs import CHANNELS, MIXERS, ModelSpec, expand_layers, loads, spec_hash, to_yaml

SMALL = settings(max_examples=60, deadline=None)


def _optional(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=fields)


def _kind(kind: str, needed: dict[str, Any], optional: dict[str, st.SearchStrategy[Any]]) -> Any:
    return _optional(**optional).map(lambda fields: {"kind": kind, **needed, **fields})


ROPE = st.none() | _optional(
    theta=st.sampled_from([100, 1e4, 10_000, 5e5, 1234.5]), fraction=st.sampled_from([0.5, 1, 1.0])
)
MIXER = st.one_of(
    _kind(
        "attention",
        {"heads": 4},
        {
            "kv_heads": st.sampled_from([None, 1, 2, 4]),
            "head_dim": st.sampled_from([None, 8, 16]),
            "rope": ROPE,
            "qk_norm": st.booleans(),
            "gate": st.booleans(),
            "window": st.none() | st.integers(1, 64),
        },
    ),
    _kind(
        "gated_deltanet",
        {"heads": 2},
        {
            "value_heads": st.sampled_from([None, 2, 4]),
            "head_dim": st.sampled_from([None, 16, 32]),
            "value_dim": st.sampled_from([None, 16, 32]),
            "short_conv": st.integers(2, 6),
            "negative_eigenvalues": st.booleans(),
        },
    ),
    _kind(
        "decay_attention",
        {"heads": 2},
        {
            "head_dim": st.sampled_from([None, 16]),
            "form": st.sampled_from(["lightning", "retnet"]),
            "short_conv": st.none() | st.integers(2, 6),
        },
    ),
)
CHANNEL = st.one_of(
    st.just({"kind": "none"}),
    st.sampled_from([2, 2.0, 2.5, 4]).map(lambda ratio: {"kind": "gelu", "ratio": ratio}),
    st.sampled_from([128, 160]).map(lambda width: {"kind": "swiglu", "width": width}),
    st.just({"kind": "swiglu"}),
)
BLOCK = st.fixed_dictionaries(
    {"mixer": MIXER, "channel": CHANNEL}, optional={"norm": st.sampled_from(["rmsnorm", "layernorm"])}
)
NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_-]{0,8}", fullmatch=True).filter(
    lambda name: name not in ("choice", "int", "float", "placement")
)


@st.composite
def models(draw: st.DrawFn) -> dict[str, Any]:
    names = draw(st.lists(NAMES, min_size=1, max_size=3, unique=True))
    layers = draw(st.lists(st.sampled_from(names), min_size=1, max_size=8))
    scalars = draw(
        _optional(
            context_length=st.sampled_from([128, 32_768]),
            tie_embeddings=st.booleans(),
            norm_eps=st.sampled_from([1e-6, 1e-5, 0.001]),
        )
    )
    blocks = {name: draw(BLOCK) for name in names}
    return {"vocab_size": 256, "hidden_size": 64, **scalars, "blocks": blocks, "layers": layers}


def model_of(data: dict[str, Any]) -> ModelSpec:
    return loads(json.dumps({"version": 1, "name": "m", "model": data})).spec.model


def respelled(data: dict[str, Any], seed: int) -> dict[str, Any]:
    """The same model in other words: other block names and order, defaults written out, layers folded."""
    chance = random.Random(seed)
    model = model_of(data)
    names = list(data["blocks"])
    chance.shuffle(names)
    renamed = {name: f"b{place}" for place, name in enumerate(names)}
    blocks = {}
    for name in names:
        block = model.blocks[name]
        channel = block.channel.model_dump()
        # Both would be a contradiction.
        channel.pop("ratio" if channel.get("width") else "width", None)
        blocks[renamed[name]] = {
            "norm": block.norm,
            "channel": _shuffled(channel, chance),
            "mixer": _shuffled(block.mixer.model_dump(), chance),
        }
    layers = [{"repeat": 1, "pattern": [renamed[name]]} for name in expand_layers(model)]
    scalars = model.model_dump(exclude={"blocks", "layers"})
    return {"layers": layers, "blocks": blocks, **_shuffled(scalars, chance)}


def _shuffled(data: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    items = list(data.items())
    chance.shuffle(items)
    return dict(items)


@SMALL
@given(models(), st.integers(0, 2**32))
def test_the_hash_does_not_depend_on_the_spelling(data: dict[str, Any], seed: int) -> None:
    assert spec_hash(model_of(respelled(data, seed))) == spec_hash(model_of(data))


@SMALL
@given(models(), st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True))
def test_yaml_loads_again_to_the_same_spec(data: dict[str, Any], name: str) -> None:
    train = {"tokens": "3k", "learning_rate": 1e-7}
    text = json.dumps({"version": 1, "name": name, "model": data, "train": train})
    spec = loads(text).spec
    again = loads(to_yaml(spec)).spec
    assert spec_hash(again.model) == spec_hash(spec.model)
    assert (again.name, again.train, again.data, again.tokenizer) == (name, spec.train, spec.data, "bytes")
    assert again.model.context_length == spec.model.context_length
    assert expand_layers(again.model) == expand_layers(spec.model)
    assert to_yaml(again) == to_yaml(spec)


def test_no_positions_stay_no_positions() -> None:
    text = to_yaml(loads(json.dumps({"version": 1, "name": "m", "model": _nope()})).spec)
    assert "rope: null" in text
    model = loads(text).spec.model
    assert model.blocks["a"].mixer.model_dump()["rope"] is None


def _nope() -> dict[str, Any]:
    mixer = {"kind": "attention", "heads": 4, "rope": None}
    blocks = {"a": {"mixer": mixer, "channel": {"kind": "none"}}}
    return {"vocab_size": 256, "hidden_size": 64, "blocks": blocks, "layers": ["a"]}


# Of every field of every kind a value and another one.
CHANGES: dict[str, dict[str, tuple[Any, Any]]] = {
    "attention": {
        "heads": (4, 2),
        "kv_heads": (4, 2),
        "head_dim": (16, 32),
        "rope": ({"theta": 1e4}, {"theta": 1e5}),
        "qk_norm": (False, True),
        "gate": (False, True),
        "window": (None, 8),
    },
    "gated_deltanet": {
        "heads": (4, 2),
        "value_heads": (4, 8),
        "head_dim": (16, 32),
        "value_dim": (16, 32),
        "short_conv": (4, 3),
        "negative_eigenvalues": (False, True),
    },
    "decay_attention": {
        "heads": (4, 2),
        "head_dim": (16, 32),
        "form": ("lightning", "retnet"),
        "short_conv": (None, 4),
    },
    "swiglu": {"ratio": (2.0, 3.0), "width": (128, 136)},
    "gelu": {"ratio": (2.0, 3.0), "width": (128, 136)},
    "none": {},
}
SCALARS: dict[str, tuple[Any, Any]] = {
    "vocab_size": (256, 257),
    "hidden_size": (64, 128),
    "tie_embeddings": (True, False),
    "norm_eps": (1e-6, 1e-5),
    "layers": (["a"], ["a", "a"]),
    "norm": ("rmsnorm", "layernorm"),
    "rope": (None, {"theta": 1e4}),
}
# What a model is meant for changes no output of it.
NOT_HASHED = {"context_length"}


def test_the_changes_cover_every_field() -> None:
    for kind, schema in {**MIXERS, **CHANNELS}.items():
        assert set(CHANGES[kind]) == set(schema.model_fields) - {"kind"}, kind
    assert set(SCALARS) - {"norm", "rope"} == set(ModelSpec.model_fields) - {"blocks"} - NOT_HASHED


@pytest.mark.parametrize(("kind", "field"), [(kind, field) for kind in CHANGES for field in CHANGES[kind]])
def test_a_changed_field_of_a_block_changes_the_hash(kind: str, field: str) -> None:
    hashes = set()
    for value in CHANGES[kind][field]:
        data = _nope()
        part = "channel" if kind in CHANNELS else "mixer"
        data["blocks"]["a"][part] = {"kind": kind, **({"heads": 4} if part == "mixer" else {}), field: value}
        hashes.add(spec_hash(model_of(data)))
    assert len(hashes) == 2


@pytest.mark.parametrize("field", SCALARS)
def test_a_changed_field_of_the_model_changes_the_hash(field: str) -> None:
    hashes = set()
    for value in SCALARS[field]:
        data = deepcopy(_nope())
        where = {"norm": data["blocks"]["a"], "rope": data["blocks"]["a"]["mixer"]}.get(field, data)
        where[field] = value
        hashes.add(spec_hash(model_of(data)))
    assert len(hashes) == 2


def test_what_changes_no_output_changes_no_hash() -> None:
    data = _nope()
    whole = spec_hash(model_of(data))
    assert spec_hash(model_of({**data, "context_length": 64})) == whole
    spare = {"mixer": {"kind": "decay_attention", "heads": 2}, "channel": {"kind": "gelu"}}
    assert spec_hash(model_of({**data, "blocks": {"spare": spare, **data["blocks"]}})) == whole
    assert len(whole) == 16
    assert int(whole, 16) >= 0
