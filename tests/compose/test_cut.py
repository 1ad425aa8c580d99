"""The space of a search that demands a class of transformers loses what does not fit, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from native_specs import SPECS, model_spec
from target_spaces import HYBRID, WINDOWS, file_of

from heddle import api, terminal
from heddle.compose.plan import plan
from heddle.compose.targets import cut
from heddle.compose.targets.catalogue import BY_NAME
from heddle.compose.targets.part_verdict import part_refusals
from heddle.compose.targets.verdict import verdict
from heddle.errors import HeddleError
from heddle.specs import SpecFile, spec_hash
from heddle.specs.space_cut import Walk, cut_space


def fitting(file: SpecFile, targets: str) -> set[str]:
    """The hashes of the models of a space that all targets hold, evenly placed."""
    found, known = set(), set()
    placement = file.space.placement
    for values in Walk(file.space, [one.name for one in file.space.parameters]):
        if placement is not None and min(placement.count(file.space.held(values)).values()) < 0:
            continue
        model = file.resolve(values).model
        if spec_hash(model) in known:
            continue
        known.add(spec_hash(model))
        runtime = plan(model).runtime()
        if all(verdict(BY_NAME[name.strip()], runtime).fits for name in targets.split(",")):
            found.add(spec_hash(model))
    return found


@pytest.mark.parametrize("targets", ["qwen3_5_text", "qwen3_5_text, qwen3_next"])
def test_what_is_cut_fits_nowhere_and_the_rest_does(targets: str) -> None:
    file = file_of(HYBRID, targets)
    found = cut.cut_to_targets(file)
    left = {one.name: list(one.values()) for one in found.file.space.parameters}
    option = {"kind": "gated_deltanet", "heads": 2, "short_conv": {"int": [2, 2]}}
    assert left["blocks.linear.mixer"][0] == option
    assert left["blocks.full.mixer.qk_norm"] == [True]
    assert left["blocks.full.mixer.gate"] == [True]
    assert left["blocks.linear.channel.kind"] == ["swiglu"]
    # No layer of Mamba-2, so the other blocks fill the stack, and nothing of it is drawn.
    assert left["layers.placement.count.linear"] == [1, 2, 3]
    assert len(left["blocks.other.mixer"]) == 1
    assert fitting(found.file, targets) == fitting(file, targets)
    told = "\n".join(found.removed)
    assert "blocks.linear.mixer: not " in told
    assert "layers: none of block other (qwen3_5_text: blocks.other.mixer.kind: is mamba2" in told
    assert found.whole is file
    assert cut.cut_to_targets(file).file.space == found.file.space


def test_what_no_block_alone_can_know_is_cut_where_all_settings_are_few() -> None:
    few = WINDOWS.replace("{int: [1, 90]}", "{choice: [4, 8, 16]}").replace("WINDOW", "{int: [6, 16]}")
    found = cut.cut_to_targets(file_of(few, "qwen3"))
    left = {one.name: list(one.values()) for one in found.file.space.parameters}
    assert left == {"blocks.near.mixer.window": [8, 16], "blocks.far.mixer.window": [8, 16]}
    many = file_of(WINDOWS.replace("WINDOW", "{int: [1, 90]}"), "qwen3")
    assert cut.cut_to_targets(many).file.space == many.space


def test_of_too_many_settings_kinds_are_cut() -> None:
    sizes = "heads: {choice: [1, 2, 4]}, head_dim: {int: [2, 128]}, gate: {choice: [true, false]}"
    many = HYBRID.replace("heads: 2, qk_norm: true, gate: true", sizes)
    found = cut.cut_to_targets(file_of(many, "qwen3"))
    assert found.unjudged == ("linear",)
    left = {one.name: one for one in found.file.space.parameters}
    # One of three options stays, and what stands inside the others goes with them.
    assert [option["kind"] for option in left["blocks.linear.mixer"].choices] == ["attention"]
    inside = left["blocks.linear.mixer.choice.2.window"]
    assert inside.condition == ("blocks.linear.mixer", 0)
    assert "blocks.linear.mixer.choice.1.short_conv" not in left


@pytest.mark.parametrize(
    ("model", "target", "where", "told"),
    [
        (WINDOWS, "minimax", "blocks.near.channel.kind", "is swiglu; there it is moe"),
        (WINDOWS.replace("90", "9"), "qwen3", "layers.1.mixer.window", "its windows are equal"),
        (HYBRID, "bamba", "blocks.full.mixer", "is"),
    ],
)
def test_where_nothing_fits_the_field_is_told(model: str, target: str, where: str, told: str) -> None:
    with pytest.raises(HeddleError, match="nothing of this space fits") as error:
        cut.cut_to_targets(file_of(model.replace("WINDOW", "95"), target))
    assert error.value.code == "target-mismatch"
    assert f"{target}: {where}" in error.value.what
    assert told in error.value.what
    assert error.value.where.line is not None


@pytest.mark.parametrize("name", SPECS)
def test_a_block_of_a_model_that_fits_also_fits_alone(name: str) -> None:
    for seed in range(8):
        model = model_spec(name, seed)
        assert [part_refusals(BY_NAME[name], model, block) for block in model.blocks] == [()] * len(
            model.blocks
        )


def test_conditions_are_counted_anew() -> None:
    model = """
  blocks:
    full:
      mixer: {choice: [{kind: retnet, heads: 2}, {kind: attention, heads: 2}, {kind: gla, heads: 2}]}
      channel: {kind: swiglu, ratio: {choice: [1.0, 2.0], when: {blocks.full.mixer.kind: [attention, gla]}, otherwise: 1.0}}
  layers: [full]
"""
    file = file_of(model, "qwen3")
    kinds, ratio = file.space.parameters
    cut_ = cut_space(file.space, {kinds.name: kinds.choices[1:2]})
    assert cut_.size() == 2
    assert cut_.active({}) == list(cut_.parameters)
    never = cut_space(file.space, {kinds.name: kinds.choices[:1]})
    assert never.size() == 1
    assert never.held({}) == {kinds.name: kinds.choices[0], ratio.name: 1.0}


def test_check_and_show_tell_what_is_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(file_of(HYBRID, "qwen3_5_text").text)
    found = api.cut(api.check(path))
    assert found.removed
    terminal.show_checked(found)
    told = capsys.readouterr().out
    assert "search.export.must_fit leaves " in told
    assert all(one in told for one in found.removed)
    shown = api.show(path)["space"]
    assert shown["cut"] == list(found.removed)
    assert shown["left"]["size"] < shown["size"]
    terminal.show_summary(api.show(path))
    assert "search.export.must_fit leaves " in capsys.readouterr().out
    path.write_text(file_of(WINDOWS.replace("WINDOW", "95"), "minimax").text)
    with pytest.raises(HeddleError, match="nothing of this space fits minimax") as error:
        api.show(path)
    assert error.value.where.file == str(path)
