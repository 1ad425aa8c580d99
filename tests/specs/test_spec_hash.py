"""Two spellings of a model have one hash; a change of what it computes has another; specs survive being written."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from heddle.compose.plan import plan
from heddle.specs import MIXERS, ModelSpec, canonical, expand_layers, loads, spec_hash, to_yaml
from heddle.specs.pattern import fold_layers

quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])

HIDDEN = 48
maybe = st.booleans()


@st.composite
def attentions(draw: Any) -> dict[str, Any]:
    heads = draw(st.sampled_from([1, 2, 4, 6]))
    made: dict[str, Any] = {"kind": "attention", "heads": heads}
    if draw(maybe):
        made["kv_heads"] = draw(st.sampled_from([one for one in (1, 2, 3, 6) if heads % one == 0]))
    if draw(maybe):
        made["head_dim"] = draw(st.sampled_from([4, 8, 10]))
    rope = st.none() | st.builds(lambda theta: {"theta": theta}, st.sampled_from([500.0, 1e4, 1e6]))
    if draw(maybe):
        made["rope"] = draw(rope)
    if draw(maybe):
        made["qk_norm"] = draw(st.sampled_from([False, True, "full"]))
    if draw(maybe):
        made["gate"] = draw(maybe)
    if draw(maybe):
        made["window"] = draw(st.none() | st.integers(1, 99))
    return made


@st.composite
def deltanets(draw: Any) -> dict[str, Any]:
    heads = draw(st.sampled_from([1, 2, 4]))
    made: dict[str, Any] = {"kind": "gated_deltanet", "heads": heads}
    if draw(maybe):
        made["value_heads"] = heads * draw(st.integers(1, 3))
    for name in ("head_dim", "value_dim"):
        if draw(maybe):
            made[name] = draw(st.integers(1, 20))
    if draw(maybe):
        made["short_conv"] = draw(st.integers(2, 6))
    return made


@st.composite
def decays(draw: Any) -> dict[str, Any]:
    made: dict[str, Any] = {"kind": "decay_attention", "heads": draw(st.sampled_from([1, 2, 4]))}
    if draw(maybe):
        made["form"] = draw(st.sampled_from(["lightning", "retnet"]))
    if draw(maybe):
        made["short_conv"] = draw(st.none() | st.integers(2, 6))
    return made


EXPERTS = {"kind": "moe", "experts": 4, "active": 2, "shared_width": 8, "scale": 2}
channels = st.sampled_from(
    [
        {"kind": "swiglu"},
        {"kind": "swiglu", "ratio": 1.5},
        {"kind": "gelu", "width": 20},
        {"kind": "none"},
        EXPERTS,
    ]
)


@st.composite
def models(draw: Any) -> dict[str, Any]:
    count = draw(st.integers(1, 3))
    blocks = {
        f"block{index}": {
            "mixer": draw(st.one_of(attentions(), deltanets(), decays())),
            "channel": draw(channels),
            "norm": draw(st.sampled_from(["rmsnorm", "layernorm"])),
        }
        for index in range(count)
    }
    layers = draw(st.lists(st.sampled_from(sorted(blocks)), min_size=1, max_size=9))
    made = {
        "vocab_size": draw(st.integers(2, 300)),
        "hidden_size": HIDDEN,
        "blocks": blocks,
        "layers": layers,
    }
    if draw(maybe):
        made["norm_eps"] = draw(st.sampled_from([1e-6, 1e-5]))
    if draw(maybe):
        made["tie_embeddings"] = draw(maybe)
    return made


def spec_of(model: dict[str, Any]) -> dict[str, Any]:
    return {"version": 1, "name": "a", "model": model, "tokenizer": "path/to/one"}


def hash_of(model: dict[str, Any]) -> str:
    return spec_hash(ModelSpec.model_validate(model))


@quick
@given(models())
def test_a_written_spec_loads_to_the_same_spec_and_hash(model: dict[str, Any]) -> None:
    file = loads(json.dumps(spec_of(model)))
    again = loads(to_yaml(file.spec))
    assert spec_hash(again.spec.model) == spec_hash(file.spec.model)
    assert canonical(again.spec.model) == canonical(file.spec.model)
    assert expand_layers(again.spec.model) == expand_layers(file.spec.model)
    assert plan(again.spec.model).runtime() == plan(file.spec.model).runtime()
    assert again.warnings == ()


@quick
@given(models(), st.randoms())
def test_names_order_defaults_and_repeats_do_not_matter(model: dict[str, Any], random: Any) -> None:
    spec = ModelSpec.model_validate(model)
    names = {
        name: f"x{index}"
        for index, name in enumerate(random.sample(sorted(model["blocks"]), len(model["blocks"])))
    }
    # Every default written, every block renamed, a block nobody uses, and the layers folded.
    other = spec.model_dump()
    blocks = [(names[name], block) for name, block in other["blocks"].items()]
    random.shuffle(blocks)
    other["blocks"] = {
        **dict(blocks),
        "unused": {"mixer": {"kind": "attention", "heads": 1}, "channel": {"kind": "none"}},
    }
    other["layers"] = fold_layers([names[name] for name in expand_layers(spec)])
    shuffled = list(other.items())
    random.shuffle(shuffled)
    assert hash_of(dict(shuffled)) == spec_hash(spec)


@quick
@given(models())
def test_sizes_written_out_are_the_sizes_that_follow(model: dict[str, Any]) -> None:
    made = plan(ModelSpec.model_validate(model))
    blocks = {
        f"layer{layer.index}": {
            "mixer": dict(layer.mixer),
            "channel": dict(layer.channel),
            "norm": layer.norm,
        }
        for layer in made.layers
    }
    assert hash_of({**model, "blocks": blocks, "layers": list(blocks)}) == spec_hash(made.model)


@quick
@given(models(), models())
def test_one_hash_means_one_runtime(one: dict[str, Any], other: dict[str, Any]) -> None:
    first, second = (plan(ModelSpec.model_validate(model)) for model in (one, other))
    assert (spec_hash(first.model) == spec_hash(second.model)) == (first.runtime() == second.runtime())


BASE: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 48,
    "blocks": {
        "a": {
            "mixer": {"kind": "attention", "heads": 4, "kv_heads": 2},
            "channel": {"kind": "swiglu", "width": 40},
        },
        "g": {"mixer": {"kind": "gated_deltanet", "heads": 2}, "channel": {"kind": "gelu", "width": 40}},
        "d": {"mixer": {"kind": "decay_attention", "heads": 2}, "channel": {"kind": "none"}},
    },
    "layers": ["a", "g", "d", "a"],
}
SOFTMAX, DECAY = {"kind": "attention", "heads": 2}, {"kind": "decay_attention", "heads": 2}
FOUR = {"kind": "attention", "heads": 4}
CHANGES: list[tuple[str, Any]] = [
    ("vocab_size", 257),
    ("hidden_size", 96),
    ("context_length", 100),
    ("tie_embeddings", False),
    ("norm_eps", 1e-5),
    ("embedding_multiplier", 2.0),
    ("logit_multiplier", 0.5),
    ("logit_softcap", 30.0),
    ("kind", "encoder"),
    ("readout", {"kind": "last", "classes": 3}),
    ("readout", {"kind": "last", "classes": 4}),
    ("readout", {"kind": "mean", "classes": 3}),
    ("readout", {"kind": "cls", "classes": 3}),
    ("readout", {"kind": "ep", "classes": 3}),
    ("readout", {"kind": "ep", "classes": 3, "queries": 8}),
    ("readout", {"kind": "ep", "classes": 3, "reduction": 3}),
    ("layers", ["a", "g", "d"]),
    ("layers", ["a", "g", "d", {"block": "a", "override": {"mixer": {"window": 9}}}]),
    ("blocks.a.norm_placement", "post"),
    ("blocks.a.norm_placement", "sandwich"),
    ("blocks.a.residual", {"branch": 0.5}),
    ("blocks.a.residual", {"of": "normed"}),
    ("blocks.a.channel_residual", {"stream": 2.0}),
    ("blocks.g.skip", {"source": "a"}),
    ("blocks.g.skip", {"source": "embedding"}),
    ("blocks.a.shared", True),
    (
        "blocks.d.mixer",
        {
            "kind": "parallel",
            "mixers": [{"kind": "attention", "heads": 2}, {"kind": "decay_attention", "heads": 2}],
        },
    ),
    (
        "blocks.d.mixer",
        {
            "kind": "parallel",
            "mixers": [{"kind": "decay_attention", "heads": 2}, {"kind": "attention", "heads": 2}],
        },
    ),
    ("blocks.d.mixer", {"kind": "token_router", "mixers": [SOFTMAX, DECAY]}),
    ("blocks.d.mixer", {"kind": "token_router", "mixers": [DECAY, SOFTMAX]}),
    ("blocks.d.mixer", {"kind": "token_router", "mixers": [SOFTMAX, DECAY], "chunk": 2}),
    ("blocks.d.mixer", {"kind": "token_router", "mixers": [SOFTMAX, DECAY], "merge": "mean"}),
    ("blocks.d.mixer", {"kind": "token_router", "mixers": [SOFTMAX, DECAY], "merge": "gate"}),
    ("blocks.d.mixer", {"kind": "token_router", "mixers": [SOFTMAX, DECAY], "norm": True}),
    ("blocks.d.mixer", {"kind": "token_router", "mixers": [SOFTMAX, DECAY], "budget": 0.0}),
    (
        "blocks.d.mixer",
        {"kind": "token_router", "mixers": [SOFTMAX, DECAY], "budget": 0.0, "budget_factor": 0.1},
    ),
    ("blocks.d.mixer", {"kind": "layer_router", "mixers": [SOFTMAX, DECAY]}),
    ("blocks.d.mixer", {"kind": "layer_router", "mixers": [DECAY, SOFTMAX]}),
    ("blocks.d.mixer", {"kind": "layer_router", "mixers": [SOFTMAX, DECAY], "router_dim": 64}),
    ("blocks.d.mixer", {"kind": "layer_router", "mixers": [SOFTMAX, DECAY], "pool": 10}),
    ("blocks.d.mixer", {"kind": "layer_router", "mixers": [SOFTMAX, DECAY], "temperature": 2.0}),
    ("blocks.d.mixer", {"kind": "layer_router", "mixers": [SOFTMAX, DECAY], "target": 0.0}),
    (
        "blocks.d.mixer",
        {"kind": "layer_router", "mixers": [SOFTMAX, DECAY], "target": 0.0, "target_factor": 0.5},
    ),
    ("blocks.d.mixer", {"kind": "sequential", "mixers": [SOFTMAX, DECAY]}),
    ("blocks.d.mixer", {"kind": "sequential", "mixers": [DECAY, SOFTMAX]}),
    ("blocks.d.mixer", {"kind": "sequential", "mixers": [SOFTMAX, DECAY], "residual": False}),
    ("blocks.d.mixer", {"kind": "head_split", "mixers": [SOFTMAX, DECAY], "share": 0.5}),
    ("blocks.d.mixer", {"kind": "head_split", "mixers": [DECAY, SOFTMAX], "share": 0.5}),
    ("blocks.d.mixer", {"kind": "head_split", "mixers": [FOUR, FOUR | {"window": 9}], "share": 0.25}),
    ("blocks.d.mixer", {"kind": "head_split", "mixers": [FOUR, FOUR | {"window": 9}], "share": 0.75}),
    ("blocks.d.mixer", {"kind": "moh", "mixer": FOUR, "shared_heads": 1, "active": 2}),
    ("blocks.d.mixer", {"kind": "moh", "mixer": FOUR | {"window": 9}, "shared_heads": 1, "active": 2}),
    ("blocks.d.mixer", {"kind": "moh", "mixer": FOUR, "shared_heads": 2, "active": 2}),
    ("blocks.d.mixer", {"kind": "moh", "mixer": FOUR, "shared_heads": 1, "active": 1}),
    ("blocks.d.mixer", {"kind": "moh", "mixer": FOUR, "shared_heads": 1, "active": 2, "balance": 0.0}),
    ("blocks.d.mixer", {"kind": "moh", "mixer": FOUR, "shared_heads": 1, "active": 2, "router": "norms"}),
    ("layers", ["a", "d", "g", "a"]),
    ("blocks.a.norm", "layernorm"),
    ("blocks.a.channel", {"kind": "gelu", "width": 40}),
    ("blocks.a.channel.width", 41),
    ("blocks.d.channel", {"kind": "gelu"}),
    ("blocks.d.channel", {"kind": "moe", "experts": 4, "active": 2}),
    ("blocks.d.channel", {"kind": "moe", "experts": 4, "active": 2, "width": 40}),
    ("blocks.d.channel", {"kind": "moe", "experts": 4, "active": 2, "shared_width": 40}),
    ("blocks.d.channel", {"kind": "moe", "experts": 4, "active": 2, "shared_width": 40, "shared_gate": True}),
    ("blocks.d.channel", {"kind": "moe", "experts": 4, "active": 2, "normalise": False}),
    ("blocks.d.channel", {"kind": "moe", "experts": 4, "active": 2, "score": "sigmoid"}),
    ("blocks.d.channel", {"kind": "moe", "experts": 4, "active": 2, "scale": 2.0}),
    ("blocks.d.channel", {"kind": "moe", "experts": 4, "active": 2, "correction_bias": True}),
    ("blocks.d.channel", {"kind": "moe", "experts": 4, "active": 2, "balance": 0.02}),
    ("blocks.d.channel", {"kind": "moe", "experts": 5, "active": 2}),
    ("blocks.d.channel", {"kind": "moe", "experts": 4, "active": 3}),
    ("blocks.a.mixer.heads", 2),
    ("blocks.a.mixer.kv_heads", 4),
    ("blocks.a.mixer.head_dim", 10),
    ("blocks.a.mixer.rope", None),
    ("blocks.a.mixer.rope", {"theta": 10001.0}),
    ("blocks.a.mixer.rope", {"fraction": 0.5}),
    ("blocks.a.mixer.qk_norm", True),
    ("blocks.a.mixer.gate", True),
    ("blocks.a.mixer.window", 8),
    ("blocks.a.mixer.sink_tokens", 3),
    ("blocks.a.mixer.qk_norm", "full"),
    ("blocks.a.mixer.causal", False),
    ("blocks.a.mixer.boundary", "inward"),
    ("blocks.a.mixer.grid", {"width": 8}),
    ("blocks.a.mixer.grid", {"width": 8, "height": 4}),
    ("blocks.a.mixer.grid", {"width": 8, "row_window": 2}),
    ("blocks.a.mixer.grid", {"width": 8, "column_window": 2}),
    ("blocks.a.mixer.grid", {"width": 8, "height": 4, "frame_window": 2}),
    ("blocks.a.mixer.scale", 0.1),
    ("blocks.a.mixer.key_multiplier", 2.0),
    ("blocks.a.mixer.softcap", 50.0),
    ("blocks.a.mixer.sinks", True),
    ("blocks.a.mixer.bias", "qkv"),
    ("blocks.a.mixer.bias", "all"),
    ("blocks.a.mixer.keys_from", "a"),
    ("blocks.a.mixer.values_from", "a"),
    ("blocks.a.mixer.qk_source", "embedding"),
    ("blocks.a.mixer.qk_source", "position"),
    ("blocks.a.mixer.qk_source", "constant"),
    ("blocks.a.mixer.selection", {}),
    ("blocks.a.mixer.selection", {"block": 32}),
    ("blocks.a.mixer.selection", {"count": 8}),
    ("blocks.a.mixer.selection", {"sink": 2}),
    ("blocks.a.mixer.selection", {"recent": 3}),
    ("blocks.a.mixer.selection", {"source": "a"}),
    ("blocks.a.mixer.selection", {"scores": "kernels"}),
    ("blocks.a.mixer.selection", {"dense_length": 8192}),
    ("blocks.a.mixer.rope", {"scaling": {"kind": "linear", "factor": 2.0}}),
    ("blocks.a.mixer.rope", {"scaling": {"kind": "linear", "factor": 3.0}}),
    ("blocks.a.mixer.rope", {"scaling": {"kind": "llama3", "factor": 2.0}}),
    ("blocks.a.mixer.rope", {"scaling": {"kind": "llama3", "factor": 2.0, "low_frequency_factor": 2.0}}),
    ("blocks.a.mixer.rope", {"scaling": {"kind": "llama3", "factor": 2.0, "high_frequency_factor": 8.0}}),
    ("blocks.a.mixer.rope", {"scaling": {"kind": "llama3", "factor": 2.0, "original_length": 4096}}),
    ("blocks.a.mixer.rope", {"scaling": {"kind": "yarn", "factor": 2.0, "original_length": 4096}}),
    ("blocks.a.mixer.rope", {"scaling": {"kind": "yarn", "factor": 2.0, "original_length": 64}}),
    (
        "blocks.a.mixer.rope",
        {"scaling": {"kind": "yarn", "factor": 2.0, "original_length": 64, "beta_fast": 16.0}},
    ),
    (
        "blocks.a.mixer.rope",
        {"scaling": {"kind": "yarn", "factor": 2.0, "original_length": 64, "beta_slow": 2.0}},
    ),
    (
        "blocks.a.mixer.rope",
        {"scaling": {"kind": "yarn", "factor": 2.0, "original_length": 64, "attention_factor": 1.0}},
    ),
    ("blocks.g.mixer.heads", 4),
    ("blocks.g.mixer.value_heads", 4),
    ("blocks.g.mixer.head_dim", 16),
    ("blocks.g.mixer.value_dim", 16),
    ("blocks.g.mixer.short_conv", 3),
    ("blocks.g.mixer.negative_eigenvalues", True),
    ("blocks.g.mixer.norm_eps", 1e-5),
    ("blocks.d.mixer.heads", 4),
    ("blocks.d.mixer.head_dim", 16),
    ("blocks.d.mixer.form", "retnet"),
    ("blocks.d.mixer.short_conv", 4),
]


def changed(path: str, value: Any) -> dict[str, Any]:
    model = json.loads(json.dumps(BASE))
    *steps, last = path.split(".")
    part = model
    for step in steps:
        part = part[step]
    part[last] = value
    return dict(model)


def test_every_change_of_the_computation_changes_the_hash() -> None:
    hashes = [hash_of(BASE), *(hash_of(changed(path, value)) for path, value in CHANGES)]
    assert len(set(hashes)) == len(hashes)


def test_every_field_of_a_model_is_among_the_changes() -> None:
    fields = set()
    for name, block in ModelSpec.model_validate(BASE).blocks.items():
        fields |= {
            f"blocks.{name}.mixer.{field}" for field in type(block.mixer).model_fields if field != "kind"
        }
    # Tokens of the constant stream count where it is read: tests/compose/test_constant_stream.py.
    fields |= {name for name in ModelSpec.model_fields if name not in ("blocks", "constant_tokens")}
    assert fields <= {path for path, _ in CHANGES}


TOLD = {kind: schema.cases for kind, schema in MIXERS.items() if "cases" in vars(schema)}


@pytest.mark.parametrize("kind", TOLD)
def test_every_field_of_a_kind_that_tells_its_cases_counts(kind: str) -> None:
    def hash_with(fields: dict[str, Any]) -> str:
        return hash_of(changed("blocks.d.mixer", {"kind": kind, **fields}))

    cases = [dict(case) for case in TOLD[kind]]
    assert len({hash_with(case) for case in cases}) == len(cases)
    assert {name for case in cases for name in case} == set(MIXERS[kind].model_fields) - {"kind"}
    required = {name for name, info in MIXERS[kind].model_fields.items() if info.is_required()}
    for case in cases:
        for name in set(case) - required:
            without = {field: value for field, value in case.items() if field != name}
            assert hash_with(without) != hash_with(case), name


SAME: list[tuple[str, Any]] = [
    ("kind", "causal_lm"),
    ("readout", None),
    ("context_length", 32_768),
    ("norm_eps", 0.000001),
    ("layers", ["a", {"repeat": 1, "pattern": ["g", "d"]}, "a"]),
    (
        "layers",
        ["a", "g", {"block": "d", "name": "third"}, {"block": "a", "override": {"mixer": {"kv_heads": 2}}}],
    ),
    ("blocks.a.residual", {"of": "stream", "branch": 1.0}),
    ("blocks.g.shared", True),
    ("blocks.g.mixer.norm_eps", 1e-6),
    ("blocks.a.mixer.head_dim", 12),
    ("blocks.a.mixer.rope", {"theta": 10_000, "fraction": 1}),
    ("blocks.a.mixer.window", None),
    ("blocks.a.mixer.scale", 12**-0.5),
    ("blocks.a.mixer.bias", "none"),
    ("blocks.a.mixer.rope", {"scaling": {"kind": "linear", "factor": 1.0}}),
    ("blocks.g.mixer.value_heads", 2),
    ("blocks.g.mixer.head_dim", 24),
    ("blocks.g.mixer.value_dim", 24),
    ("blocks.g.mixer.short_conv", 4),
    ("blocks.d.mixer.form", "lightning"),
]


@pytest.mark.parametrize(("path", "value"), SAME)
def test_another_spelling_of_the_same_model_has_the_same_hash(path: str, value: Any) -> None:
    assert hash_of(changed(path, value)) == hash_of(BASE)


SPLIT = {"kind": "head_split", "mixers": [FOUR, {"kind": "decay_attention", "heads": 4}], "share": 0.5}
ROUTED = {"kind": "moh", "mixer": FOUR, "shared_heads": 1, "active": 2}
ALIKE: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (SPLIT, SPLIT | {"share": 0.4}),
    (
        SPLIT,
        {
            "kind": "parallel",
            "mixers": [
                {"kind": "attention", "heads": 2, "head_dim": 12},
                {"kind": "decay_attention", "heads": 2, "head_dim": 12},
            ],
        },
    ),
    (ROUTED, ROUTED | {"balance": 0.01}),
    (ROUTED, ROUTED | {"router": "learned"}),
    (ROUTED, ROUTED | {"mixer": FOUR | {"kv_heads": 4}}),
    (
        {"kind": "sequential", "mixers": [FOUR, FOUR]},
        {"kind": "sequential", "mixers": [FOUR, FOUR], "residual": True},
    ),
]


@pytest.mark.parametrize(("one", "other"), ALIKE)
def test_two_spellings_of_a_composite_mixer_have_one_hash(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert hash_of(changed("blocks.d.mixer", one)) == hash_of(changed("blocks.d.mixer", other))


def test_fractions_that_turn_the_same_dimensions_are_one_model() -> None:
    halves = [changed("blocks.a.mixer.rope", {"fraction": fraction}) for fraction in (0.5, 0.501)]
    assert hash_of(halves[0]) == hash_of(halves[1])


def test_a_norm_over_all_heads_is_that_of_each_where_there_is_one() -> None:
    def hash_at(heads: int, norm: bool | str) -> str:
        mixer = {"kind": "attention", "heads": heads, "head_dim": 12, "qk_norm": norm}
        return hash_of(changed("blocks.d.mixer", mixer))

    assert hash_at(1, "full") == hash_at(1, True) != hash_at(1, False)
    assert len({hash_at(2, "full"), hash_at(2, True), hash_at(2, False)}) == 3
    # A part that is left with one head is one of them.
    parts = [FOUR | {"qk_norm": norm} for norm in ("full", True)]
    splits = [SPLIT | {"mixers": [part, SPLIT["mixers"][1]], "share": 0.25} for part in parts]
    assert len({hash_of(changed("blocks.d.mixer", split)) for split in splits}) == 1


def test_a_factor_of_yarn_written_out_is_the_one_that_follows() -> None:
    scaling = {"kind": "yarn", "factor": 4.0, "original_length": 64}
    written = scaling | {"attention_factor": 0.1 * math.log(4.0) + 1.0}
    one, other = (hash_of(changed("blocks.a.mixer.rope", {"scaling": way})) for way in (scaling, written))
    assert one == other


def test_who_takes_blocks_chooses_none() -> None:
    ways = ({"source": "a"}, {"source": "a", "sink": 3, "recent": 4})
    assert len({hash_of(changed("blocks.a.mixer.selection", way)) for way in ways}) == 1


def test_yaml_json_and_three_spellings_of_a_number_are_one_model() -> None:
    text = to_yaml(loads(json.dumps(spec_of(changed("blocks.a.mixer.rope", {"theta": 500.0})))).spec)
    texts = [text.replace("500.0", spelled) for spelled in ("500", "5e2", "5.0e+2", "500.")]
    assert len({spec_hash(loads(one).spec.model) for one in [text, *texts]}) == 1


def test_the_hash_of_today_stays() -> None:
    # Results in ledgers are found by it: a change of this line throws all of them away.
    assert hash_of(BASE) == "7f0ed0617a83f30b"


def test_folded_layers_unfold_and_are_never_longer() -> None:
    def unfold(items: list[Any]) -> list[str]:
        return [
            name
            for item in items
            for name in ([item] if isinstance(item, str) else item["pattern"] * item["repeat"])
        ]

    @settings(max_examples=150, deadline=None)
    @given(st.lists(st.sampled_from("ab"), max_size=40) | st.lists(st.sampled_from("abc"), max_size=12))
    def check(names: list[str]) -> None:
        folded = fold_layers(names)
        assert unfold(folded) == names
        assert sum(1 if isinstance(item, str) else 2 + len(item["pattern"]) for item in folded) <= max(
            len(names), 1
        )

    check()
    assert fold_layers(["a", "a", "a", "b"] * 6) == [{"repeat": 6, "pattern": ["a", "a", "a", "b"]}]
    assert fold_layers(["a", "b"]) == ["a", "b"]
    assert fold_layers(["b", *["a"] * 30]) == ["b", {"repeat": 30, "pattern": ["a"]}]


def test_a_written_spec_reads_well() -> None:
    text = """\
version: 1
name: "7b"
model:
  vocab_size: 512
  hidden_size: 256
  norm_eps: 1e-5
  blocks:
    unused: {mixer: {kind: attention, heads: 4}, channel: {kind: none}}
    linear: {mixer: {kind: gated_deltanet, heads: 4, short_conv: 4}, channel: {kind: swiglu, ratio: 2.67}}
    full:
      mixer: {kind: attention, heads: 8, kv_heads: 2, head_dim: 32, rope: {theta: 5e5}, gate: true, window: 1024}
      channel: {kind: gelu}
      norm: layernorm
  layers: [linear, linear, linear, full, linear, linear, linear, full, linear]
tokenizer: "my tokenizer/é"
train: {tokens: 20M, learning_rate: 1.0e-3}
"""
    assert (
        to_yaml(loads(text).spec)
        == """\
version: 1
name: "7b"
model:
  vocab_size: 512
  hidden_size: 256
  norm_eps: 1.0e-05
  blocks:
    linear: {mixer: {kind: gated_deltanet, heads: 4}, channel: {kind: swiglu}}
    full:
      mixer:
        kind: attention
        heads: 8
        head_dim: 32
        kv_heads: 2
        rope: {theta: 500000.0}
        gate: true
        window: 1024
      channel: {kind: gelu}
      norm: layernorm
  layers: [{repeat: 2, pattern: [linear, linear, linear, full]}, linear]
tokenizer: "my tokenizer/\\u00e9"
train: {tokens: 20000000, learning_rate: 0.001}
"""
    )
