"""What servers take: the field that forbids a model, and a search that demands a server."""

from __future__ import annotations

import random
from typing import Any

import pytest
from native_specs import SPECS, model_spec
from target_spaces import HYBRID, WINDOWS, file_of

from heddle.compose.plan import plan
from heddle.compose.targets import cut
from heddle.compose.targets.catalogue import BY_NAME, TARGETS
from heddle.compose.targets.demand import DEMANDS, meeting
from heddle.compose.targets.report import target_rows
from heddle.compose.targets.servers import ALWAYS, LINEAR, VERSIONS, served
from heddle.errors import HeddleError
from heddle.specs import ModelSpec


def runtime(name: str, seed: int = 0, layers: list[str] | None = None, **fields: Any) -> dict[str, Any]:
    """A random spec of a target as plain data; `fields` are of the mixer of its first block."""
    data = SPECS[name](random.Random(f"{name} {seed}"))
    data["blocks"]["a"]["mixer"] |= fields
    return plan(ModelSpec.model_validate(data | ({"layers": layers} if layers else {}))).runtime()


def row(model: dict[str, Any], name: str) -> dict[str, Any]:
    return next(one for one in target_rows(model) if one["target"] == name)


def test_servers_are_asked_about_every_target() -> None:
    assert [*ALWAYS] == [target.name for target in TARGETS]
    assert {*LINEAR} <= {*ALWAYS}
    assert {*DEMANDS} == {*ALWAYS, *VERSIONS}


DENSE = {"kind": "swiglu", "width": 24}


@pytest.mark.parametrize(
    ("name", "layers", "server", "path", "told"),
    [
        ("qwen3", ["a", "b", "a"], "vllm", "layers.1.mixer.window", "no full and sliding layers in one model"),
        ("qwen3", ["a", "a", "b"], "sglang", "layers.2.mixer.window", "does not read windows"),
        ("qwen3_5_text", ["b", "a", "a"], "sglang", "layers.2.mixer.kind", "is attention; it takes layer 2 and every 2"),
        ("qwen3_5_text", ["a", "b", "b"], "sglang", "layers.1.mixer.kind", "is gated_deltanet; it takes layer 1"),
        ("bamba", ["b", "a"], "vllm", "", "removed after 0.23"),
        ("olmo_hybrid", ["b", "a"], "sglang", "", "no such class"),
        ("granitemoehybrid", ["a", "a"], "vllm", "", "not read for a model without a linear layer"),
    ],
)  # fmt: skip
def test_a_server_that_does_not_take_a_class_names_the_field(
    name: str, layers: list[str], server: str, path: str, told: str
) -> None:
    found = row(runtime(name, layers=layers), name)["servers"][server]
    assert not found["takes"]
    assert found["path"] == path
    assert told in found["note"]


def test_qwen3_next_without_experts_is_refused_by_its_channel() -> None:
    data = SPECS["qwen3_next"](random.Random(0))
    for block in data["blocks"].values():
        block["channel"] = DENSE
    model = plan(ModelSpec.model_validate(data)).runtime()
    found = row(model, "qwen3_next")["servers"]["vllm"]
    assert (found["takes"], found["path"]) == (False, "layers.0.channel.kind")
    # The same mixers are another class there.
    assert row(model, "vllm")["through"] == "qwen3_5_text"


def test_code_of_a_folder_is_refused_by_its_first_layer_that_is_no_attention() -> None:
    found = row(runtime("minimax", layers=["a", "b"]), "remote")["servers"]["vllm"]
    assert (found["takes"], found["path"]) == (False, "layers.1.mixer.kind")
    assert "lightning" in found["note"]


@pytest.mark.parametrize("server", VERSIONS)
def test_a_server_fits_as_a_class_or_names_what_the_nearest_class_has_otherwise(server: str) -> None:
    model = runtime("bamba", layers=["b", "a"])
    found = row(model, server)
    assert (found["fits"], found["through"]) == (False, None)
    assert found["refused"][0]["path"].endswith("mixer.rope.fraction")
    assert found["refused"][0]["why"].endswith("(as granitemoehybrid)")
    with pytest.raises(
        HeddleError, match=rf"{server} \(.*does not take this model exactly: .*rope.fraction"
    ) as error:
        DEMANDS[server].require(model)
    assert error.value.code == "target-mismatch"
    periodic = runtime("qwen3_5_text", layers=["b", "b", "a"])
    assert row(periodic, server)["through"] == "qwen3_5_text"
    DEMANDS[server].require(periodic)


def test_of_several_demands_the_class_that_meets_most_is_exported_to() -> None:
    free = runtime("qwen3_5_text", layers=["b", "a", "a"])
    chosen = meeting(["vllm", "qwen3_next"], free)
    assert chosen is not None
    # vLLM takes it as the first, and no class meets both.
    assert chosen.name == "qwen3_5_text"
    periodic = runtime("qwen3_5_text", layers=["b", "b", "a"])
    found = meeting(["sglang", "qwen3_next"], periodic)
    assert found is not None
    assert found.name == "qwen3_next"
    assert meeting([], periodic) is None


def test_a_space_is_cut_to_what_a_server_takes() -> None:
    found = cut.cut_to_targets(file_of(HYBRID, "vllm"))
    left = {one.name: list(one.values()) for one in found.file.space.parameters}
    assert all(option["kind"] != "retnet" for option in left["blocks.linear.mixer"])
    assert any("retnet" in one for one in found.removed), found.removed
    # A window that SGLang would ignore is cut from every block; vLLM takes one where all layers have it.
    windows = WINDOWS.replace("{int: [1, 90]}", "{choice: [null, 4]}").replace("WINDOW", "null")
    left = {
        one.name: [*one.values()]
        for one in cut.cut_to_targets(file_of(windows, "sglang")).file.space.parameters
    }
    assert left == {"blocks.near.mixer.window": [None]}
    with pytest.raises(HeddleError, match=r"nothing of this space fits sglang: .*mixer\.window") as error:
        cut.cut_to_targets(file_of(windows.replace("[null, 4]", "[5, 4]"), "sglang"))
    assert error.value.where.line is not None


def test_layers_that_are_placed_are_not_cut_for_their_order() -> None:
    model = """
  blocks:
    full:
      mixer: {kind: attention, heads: 2, qk_norm: true, gate: true, head_dim: {choice: [8, 16]}}
      channel: {kind: swiglu, ratio: 1.0}
    linear: {mixer: {kind: gated_deltanet, heads: 2}, channel: {kind: swiglu, ratio: 1.0}}
  layers: {placement: {length: 3, of: [full, linear], count: {full: {int: [1, 2]}}}}
"""
    found = cut.cut_to_targets(file_of(model, "sglang"))
    left = {one.name: [*one.values()] for one in found.file.space.parameters}
    assert left["blocks.full.mixer.head_dim"] == [8, 16]
    assert left["layers.placement.count.full"] == [1, 2]


def mixed(some: random.Random) -> dict[str, Any]:
    """A random spec of a target with parts of another's, and numbers that may be none of its own."""
    data, other = (SPECS[some.choice([*SPECS])](some) for _ in range(2))
    for _ in range(some.choice([1, 2])):
        block, given = (some.choice([*one["blocks"].values()]) for one in (data, other))
        part = some.choice(["mixer", "channel", "residual", "norm_placement", "field"])
        if part == "field":
            field = some.choice([name for name in block["mixer"] if name != "kind"])
            block["mixer"][field] = some.choice([1, 2, 3, None, True, 0.5, "full"])
        elif part in given:
            block[part] = given[part]
    return data


def test_whatever_a_spec_is_every_target_fits_or_names_what_forbids_it() -> None:
    some, seen = random.Random(0), 0
    for _ in range(60):
        try:
            model = plan(ModelSpec.model_validate(mixed(some))).runtime()
        except (HeddleError, ValueError):
            continue
        seen += 1
        assert all(one["fits"] != bool(one["refused"]) for one in target_rows(model))
    assert seen > 20


@pytest.mark.parametrize("name", SPECS)
def test_a_server_that_takes_a_class_fits_its_models(name: str) -> None:
    for seed in range(4):
        model = plan(model_spec(name, seed)).runtime()
        for server, answer in served(name, model).items():
            if answer.takes:
                assert DEMANDS[server].holds(BY_NAME[name], model)
                assert not DEMANDS[server].refusals(model)
