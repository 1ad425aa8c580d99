"""The plan of a model: what it prints, counts and hands to the runtime."""

from __future__ import annotations

import pytest

from heddle.compose.diagram import mermaid
from heddle.compose.passes.graph import edges_of
from heddle.compose.plan import PASSES, Plan, plan
from heddle.errors import HeddleErrors
from heddle.specs import ModelSpec, loads

TEXT = """\
version: 1
name: planned
model:
  vocab_size: 256
  hidden_size: 32
  context_length: 128
  blocks:
    linear: {mixer: {kind: gated_deltanet, heads: 2, value_heads: 4}, channel: {kind: swiglu}}
    full: {mixer: {kind: attention, heads: 4, kv_heads: 2, window: 16}, channel: {kind: none}, norm: layernorm}
    decay:
      mixer: {kind: decay_attention, heads: 2, form: retnet, short_conv: 3}
      channel: {kind: gelu, ratio: 2.0}
  layers: [{repeat: 2, pattern: [linear, full]}, decay]
"""


def planned(text: str = TEXT) -> Plan:
    file = loads(text, file="a.yaml")
    return plan(file.spec.model, file.where)


def test_a_plan_prints_as_text() -> None:
    lines = str(planned()).splitlines()
    assert lines[0] == "5 layers, 59,072 parameters"
    assert lines[1] == "embedding           ids -> 32  8,192 parameters"
    assert lines[2] == (
        "layers.0.mixer      linear: rmsnorm, gated_deltanet(heads=2, head_dim=16, value_heads=4, value_dim=16, "
        "short_conv=4, negative_eigenvalues=False)  memory[4, 16, 16]  conv[128, 3]  9,016 parameters"
    )
    assert lines[3] == "layers.0.channel    linear: rmsnorm, swiglu(width=88)  8,480 parameters"
    assert lines[4].startswith(
        "layers.1.mixer      full: layernorm, attention(heads=4, head_dim=8, kv_heads=2, "
    )
    assert lines[4].endswith("keys[2, 8] per token  values[2, 8] per token  3,136 parameters")
    assert [line.split()[0] for line in lines[5:]] == [
        "layers.2.mixer",
        "layers.2.channel",
        "layers.3.mixer",
        "layers.4.mixer",
        "layers.4.channel",
        "norm",
        "head",
    ]
    assert lines[-1] == "head                32 -> logits  uses embedding's weight  0 parameters"


def test_layers_are_plain_resolved_data() -> None:
    full = planned().layers[3]
    assert (full.index, full.block, full.norm) == (3, "full", "layernorm")
    assert full.mixer == {
        "kind": "attention",
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
        "rope": {"theta": 10000.0, "fraction": 1.0},
        "qk_norm": False,
        "gate": False,
        "window": 16,
    }
    assert full.channel == {"kind": "none"}
    assert planned().layers[4].channel == {"kind": "gelu", "width": 64}


def test_the_runtime_form_holds_nothing_but_plain_data() -> None:
    runtime = planned().runtime()
    assert {key: value for key, value in runtime.items() if key != "layers"} == {
        "vocab_size": 256,
        "hidden_size": 32,
        "context_length": 128,
        "norm_eps": 1e-6,
        "tie_embeddings": True,
        "embedding_multiplier": 1.0,
        "logit_multiplier": 1.0,
        "logit_softcap": None,
    }
    assert [layer["mixer"]["kind"] for layer in runtime["layers"]] == [
        "gated_deltanet",
        "attention",
        "gated_deltanet",
        "attention",
        "decay_attention",
    ]
    assert set(runtime["layers"][0]) == {"mixer", "channel", "norm"}


def test_costs_add_up_and_split_into_what_grows_and_what_does_not() -> None:
    made = planned()
    for context, batch in ((1, 1), (100, 3)):
        cost, layers = made.cost(context, batch), [layer.cost(context, batch) for layer in made.layers]
        head = 2 * 32 * 256
        for name in cost:
            # Weight and norm of the head, and one row of the embedding each; or the stream there, and at the end.
            extra = {
                "prefill_flops_per_token": head,
                "decode_flops_per_token": head,
                "train_flops_per_token": 3 * head,
                "decode_bytes": 2 * (32 * 256 + 32 + batch * 32),
                "prefill_bytes": 2 * (32 * 256 + 32 + 3 * batch * context * 32),
            }.get(name, 0)
            assert cost[name] == pytest.approx(extra + sum(layer[name] for layer in layers))
    # Two windowed layers keep 15 of 100 tokens: keys and values of two heads with 8 dimensions, in 2 bytes.
    assert made.cost(100, 3)["cache_bytes"] == 3 * 2 * 15 * 2 * 2 * 8 * 2
    assert made.cost(100, 3)["cache_bytes_per_token"] == 2 * 2 * 2 * 8 * 2
    # float32 memories; convolutions in the model's dtype.
    states = 2 * (4 * 16 * 16 * 4 + 128 * 3 * 2) + 2 * 16 * 16 * 4 + 96 * 2 * 2
    assert made.cost(100, 3)["state_bytes"] == 3 * states
    assert made.cost(100, element=4)["cache_bytes"] == 2 * made.cost(100)["cache_bytes"]
    assert made.cost(0)["cache_bytes"] == made.cost(0)["state_bytes"] == 0


def test_a_summary_names_the_layer_and_its_costs() -> None:
    summary = planned().layers[1].summary(100, 2)
    assert {key: summary[key] for key in ("index", "block", "mixer", "channel", "norm", "parameters")} == {
        "index": 1,
        "block": "full",
        "mixer": "attention",
        "channel": "none",
        "norm": "layernorm",
        "parameters": 3136,
    }
    assert summary["cache_bytes"] == 2 * 15 * 2 * 2 * 8 * 2


def test_an_untied_head_has_its_own_weight() -> None:
    untied = planned(TEXT.replace("context_length: 128", "tie_embeddings: false"))
    assert untied.parameters == planned().parameters + 256 * 32
    assert "share" not in {edge.kind for *_, edge in edges_of(untied.graph)}


def test_plans_are_equal_when_their_graphs_are() -> None:
    assert planned() == planned()
    assert hash(planned()) == hash(planned())
    assert planned() != planned(TEXT.replace("window: 16", "window: 8"))
    assert planned() != "a plan"


def test_the_passes_stand_in_one_visible_list() -> None:
    assert [one.__name__ for one in PASSES] == [
        "resolve_layers",
        "resolve_dims",
        "link_references",
        "plan_sharing",
        "check_kind",
        "lay_constant_stream",
        "check_shapes",
        "assign_caches",
        "choose_kernels",
        "count_costs",
    ]


def test_an_error_of_a_pass_names_the_pass_the_node_and_the_line() -> None:
    file = loads(TEXT, file="a.yaml")
    data = file.spec.model.model_dump()
    data["blocks"]["full"]["mixer"]["kv_heads"] = 3
    with pytest.raises(HeddleErrors) as told:
        plan(ModelSpec.model_validate(data), file.where)
    # The block stands in two layers and is told once.
    shown = str(told.value).splitlines()
    assert shown[0] == (
        "a.yaml:9:57: layers.1.mixer.kv_heads: 3 does not divide heads 4 (pass check_shapes)   [dims-not-divisible]"
    )
    assert shown[1].startswith("    9 |     full: {mixer: {kind: attention, heads: 4, kv_heads: 2, ")
    assert shown[2].index("^") == shown[1].index("2, window")
    assert shown[3:] == ["  hint: 2 or 4 do"]


def test_a_plan_without_a_file_names_the_node() -> None:
    model = loads(TEXT).spec.model
    data = {**model.model_dump(), "layers": ["linear", "ful", "x"]}
    with pytest.raises(HeddleErrors) as told:
        plan(ModelSpec.model_validate(data))
    assert [str(error) for error in told.value.errors] == [
        "layers.1: there is no block 'ful' (pass resolve_layers)   [unknown-block]\n  hint: did you mean full?",
        "layers.2: there is no block 'x' (pass resolve_layers)   [unknown-block]\n"
        "  hint: the blocks are linear, full, decay",
    ]


def test_a_thousand_layers_are_planned_at_once() -> None:
    text = TEXT.replace("{repeat: 2, pattern: [linear, full]}", "{repeat: 500, pattern: [linear, full]}")
    assert len(planned(text).layers) == 1001


def test_a_flowchart_has_every_node_and_every_edge() -> None:
    made = planned()
    lines = mermaid(made).splitlines()
    assert lines[0] == "flowchart TD"
    boxes = [line for line in lines if '["' in line]
    arrows = [line for line in lines if "-->" in line or "-. weight .->" in line]
    assert len(boxes) == made.graph.number_of_nodes()
    assert len(arrows) == made.graph.number_of_edges()
    assert len(lines) == 1 + len(boxes) + len(arrows)
    assert any("layers.0.mixer<br/>" in line and "parameters" in line for line in boxes)
