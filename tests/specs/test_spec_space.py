"""What a spec leaves open: parameters, placements, sizes, and the plain specs they resolve to."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable

import pytest

from heddle.compose.plan import plan
from heddle.errors import HeddleErrors
from heddle.specs import (
    Parameter,
    Placement,
    Space,
    SpecFile,
    expand_layers,
    loads,
    spec_hash,
    to_yaml,
    uniform_layers,
)

Every = Callable[[Space], list[dict[str, object]]]

TEXT = """\
version: 1
name: open
model:
  vocab_size: 256
  hidden_size: {choice: [64, 128]}
  norm_eps: {float: [1.0e-6, 1.0e-4], log: true}
  blocks:
    linear:
      mixer:
        choice:
          - {kind: gated_deltanet, heads: 2}
          - {kind: decay_attention, heads: {int: [2, 8], step: 2}, form: {choice: [lightning, retnet]}}
          - kind: attention
            heads: 2
            window: {int: [16, 64], log: true}
      channel: {kind: swiglu}
    full:
      mixer: {kind: attention, heads: 2, rope: {choice: [null, {theta: 500.0}]}}
      channel: {kind: {choice: [gelu, swiglu]}, ratio: 2.0}
    local: {mixer: {kind: attention, heads: 2, window: 8}, channel: {kind: none}}
  layers:
    placement: {length: 6, of: [linear, local, full], count: {full: {int: [1, 3]}, local: 1}}
search: {tasks: [text]}
"""
MIXER = "blocks.linear.mixer"


@pytest.fixture(scope="module")
def file() -> SpecFile:
    return loads(TEXT, file="open.yaml")


def option(file: SpecFile, name: str, index: int) -> object:
    return next(one for one in file.space.parameters if one.name == name).choices[index]


def test_parameters_are_named_by_their_place_and_stand_in_order(file: SpecFile) -> None:
    assert [(one.name, one.kind, one.condition) for one in file.space.parameters] == [
        ("hidden_size", "choice", None),
        ("norm_eps", "float", None),
        (MIXER, "choice", None),
        (f"{MIXER}.choice.1.heads", "int", (MIXER, 1)),
        (f"{MIXER}.choice.1.form", "choice", (MIXER, 1)),
        (f"{MIXER}.choice.2.window", "int", (MIXER, 2)),
        ("blocks.full.mixer.rope", "choice", None),
        ("blocks.full.channel.kind", "choice", None),
        ("layers.placement.count.full", "int", None),
    ]
    by_name = {one.name: one for one in file.space.parameters}
    heads, eps = by_name[f"{MIXER}.choice.1.heads"], by_name["norm_eps"]
    assert (heads.low, heads.high, heads.step, heads.log, list(heads.values())) == (
        2,
        8,
        2,
        False,
        [2, 4, 6, 8],
    )
    assert (eps.low, eps.high, eps.log) == (1e-6, 1e-4, True)


def test_the_spec_of_a_file_is_the_one_at_the_defaults(file: SpecFile) -> None:
    assert file.spec == file.resolve()
    assert file.spec.model.hidden_size == 64
    assert file.spec.model.norm_eps == 1e-6
    assert file.spec.model.blocks["linear"].mixer.kind == "gated_deltanet"
    assert expand_layers(file.spec.model) == ["linear", "linear", "local", "linear", "linear", "full"]


def test_values_and_layers_make_a_plain_spec(file: SpecFile) -> None:
    values = {
        "hidden_size": 128,
        "norm_eps": 3e-5,
        MIXER: option(file, MIXER, 2),
        f"{MIXER}.choice.2.window": 40,
        "blocks.full.mixer.rope": option(file, "blocks.full.mixer.rope", 1),
        "blocks.full.channel.kind": "swiglu",
        "layers.placement.count.full": 3,
    }
    layers = ["full", "full", "full", "local", "linear", "linear"]
    model = file.resolve(values, layers).model
    assert (model.hidden_size, model.norm_eps) == (128, 3e-5)
    assert model.blocks["linear"].mixer.model_dump()["window"] == 40
    assert model.blocks["full"].mixer.written()["rope"] == {"theta": 500.0}
    assert model.blocks["full"].channel.kind == "swiglu"
    assert expand_layers(model) == layers
    # Values may come back from a record.
    assert file.resolve(json.loads(json.dumps(values)), layers).model == model


def test_values_of_options_that_are_not_chosen_mean_nothing(file: SpecFile) -> None:
    assert file.resolve({f"{MIXER}.choice.2.window": 33}) == file.spec
    names = [one.name for one in file.space.active({MIXER: option(file, MIXER, 1)})]
    assert f"{MIXER}.choice.1.form" in names
    assert f"{MIXER}.choice.2.window" not in names


REFUSED: list[tuple[dict[str, object], list[str] | None, str]] = [
    (
        {"hiden_size": 64},
        None,
        "hiden_size: no such parameter   [bad-space]\n  hint: did you mean hidden_size?",
    ),
    (
        {"hidden_size": 65},
        None,
        "open.yaml:5:16: hidden_size: 65 is not a value of this parameter   [bad-space]",
    ),
    (
        {"hidden_size": 64.5},
        None,
        "open.yaml:5:16: hidden_size: 64.5 is not a value of this parameter   [bad-space]",
    ),
    ({"norm_eps": 1.0}, None, "open.yaml:6:13: norm_eps: 1.0 is not a value of this parameter   [bad-space]"),
    (
        {f"{MIXER}.choice.1.heads": 3},
        None,
        f"open.yaml:12:44: {MIXER}.choice.1.heads: 3 is not a value of this parameter   [bad-space]",
    ),
    (
        {"layers.placement.count.full": True},
        None,
        "open.yaml:22:69: layers.placement.count.full: True is not a value of this parameter   [bad-space]",
    ),
    (
        {},
        ["linear"],
        "open.yaml:21:3: layers: 6 layers of linear, local, full are expected, got 1   [bad-placement]",
    ),
    (
        {},
        ["linear"] * 5 + ["x"],
        "open.yaml:21:3: layers: 6 layers of linear, local, full are expected, got x   [bad-placement]",
    ),
]


@pytest.mark.parametrize(("values", "layers", "expected"), REFUSED)
def test_what_is_outside_the_space_is_refused(
    file: SpecFile, values: dict[str, object], layers: list[str] | None, expected: str
) -> None:
    with pytest.raises(HeddleErrors) as told:
        file.resolve(values, layers)
    shown = str(told.value).splitlines()
    assert "\n".join([shown[0], *(["  " + shown[-1].strip()] if "hint" in expected else [])]) == expected


def test_a_setting_that_cannot_be_built_is_told_at_its_option() -> None:
    file = loads(
        TEXT.replace("{kind: gated_deltanet, heads: 2}", "{kind: gated_deltanet, heads: {choice: [2, 128]}}")
    )
    with pytest.raises(HeddleErrors) as told:
        file.resolve({f"{MIXER}.choice.0.heads": 128})
    (error,) = told.value.errors
    assert (error.code, error.what) == ("dims-not-divisible", "128 does not divide hidden_size 64")
    assert (error.where.line, error.where.column) == (11, 56)
    assert file.resolve({f"{MIXER}.choice.0.heads": 128, "hidden_size": 128}).model.hidden_size == 128


def test_counts_that_leave_no_room_are_refused_when_they_meet() -> None:
    text = TEXT.replace("{full: {int: [1, 3]}, local: 1}", "{full: {int: [1, 5]}, local: {int: [1, 5]}}")
    file = loads(text)
    with pytest.raises(HeddleErrors) as told:
        file.resolve({"layers.placement.count.full": 4, "layers.placement.count.local": 3})
    assert told.value.what == "the counts take 7 of 6 layers"


def test_layers_of_a_plain_spec_may_be_named_and_not_changed() -> None:
    text = (
        TEXT.split("  layers:")[0] + "  layers: [{repeat: {int: [1, 3]}, pattern: [linear, full, local]}]\n"
    )
    file = loads(text)
    name = "layers.0.repeat"
    assert expand_layers(file.resolve({name: 2}).model) == ["linear", "full", "local"] * 2
    assert file.resolve({name: 2}, ["linear", "full", "local"] * 2) == file.resolve({name: 2})
    with pytest.raises(HeddleErrors, match="this spec has no placement"):
        file.resolve({name: 2}, ["full"] * 6)


def is_felt(name: str, present: list[str]) -> bool:
    return not name.startswith("blocks.") or name.split(".")[1] in present


def placements(placement: Placement, setting: dict[str, object]) -> int:
    counts = placement.count(setting)
    if min(counts.values()) < 0:
        return 0
    ways = math.factorial(placement.length)
    for count in counts.values():
        ways //= math.factorial(count)
    return ways


@pytest.mark.parametrize(
    "counts",
    [
        "{full: {int: [1, 3]}, local: 1}",
        "{full: {int: [0, 4]}, local: {int: [1, 5]}}",
        "{full: {choice: [1, 4]}, local: 0}",
    ],
)
def test_the_size_of_a_space_counts_every_setting_and_placement(counts: str, every_setting: Every) -> None:
    text = TEXT.replace("{float: [1.0e-6, 1.0e-4], log: true}", "1.0e-6").replace("[16, 64]", "[16, 19]")
    space = loads(text.replace("{full: {int: [1, 3]}, local: 1}", counts)).space
    assert space.placement is not None
    # What lies in a block without layers has no effect, and such settings are one.
    found = {}
    for setting in every_setting(space):
        if ways := placements(space.placement, setting):
            present = [name for name, count in space.placement.count(setting).items() if count]
            felt = {name: value for name, value in setting.items() if is_felt(name, present)}
            found[repr(felt)] = ways
    assert space.size() == sum(found.values())


def test_a_float_or_more_than_can_be_counted_is_infinite() -> None:
    assert loads(TEXT).space.size() == math.inf
    big = TEXT.replace("length: 6", "length: 4096").replace("[1, 3]", "[1, 4000]")
    assert loads(big).space.size() == math.inf
    assert Space().size() == 1
    assert Space((Parameter("a", "float", low=1.0, high=1.0),)).size() == 1


def test_every_setting_resolves_or_says_why_not(every_setting: Every) -> None:
    text = TEXT.replace("{float: [1.0e-6, 1.0e-4], log: true}", "1.0e-6").replace("[16, 64]", "[16, 17]")
    file = loads(text)
    hashes, whats = set(), set()
    for setting in every_setting(file.space):
        try:
            spec = file.resolve(setting)
        except HeddleErrors as told:
            # Six heads divide neither hidden size.
            whats.update(error.what for error in told.errors)
            continue
        plan(spec.model)
        hashes.add(spec_hash(spec.model))
        assert spec_hash(loads(to_yaml(spec)).spec.model) == spec_hash(spec.model)
    assert whats == {"6 does not divide hidden_size 64", "6 does not divide hidden_size 128"}
    # RoPE or not, gelu or swiglu, three counts, two widths; mixers: 1 + 3 · 2 + 2 that can be built.
    assert len(hashes) == 2 * 2 * 3 * 2 * 9


@pytest.mark.parametrize("length", [1, 2, 5, 12, 24])
def test_uniform_layers_stand_last_in_groups_of_equal_size(length: int) -> None:
    for count in range(length + 1):
        layers = uniform_layers(length, "a", {"b": count})
        places = [index for index, name in enumerate(layers) if name == "b"]
        assert places == [(index + 1) * length // count - 1 for index in range(count)]


def test_uniform_layers_of_several_blocks_keep_their_counts() -> None:
    for counts in ({"b": 2, "c": 3}, {"b": 0, "c": 6}, {"b": 4, "c": 4}):
        layers = uniform_layers(8, "a", counts)
        assert {name: layers.count(name) for name in "abc"} == {"a": 8 - sum(counts.values()), **counts}


def test_a_file_travels_between_processes(file: SpecFile) -> None:
    copy = pickle.loads(pickle.dumps(file))
    assert copy == file
    assert copy.resolve({"hidden_size": 128}) == file.resolve({"hidden_size": 128})
    assert copy.where("layers.5.mixer.heads") == file.where("layers.5.mixer.heads")


PLACES = [
    ("", 1, 1),
    ("name", 2, 7),
    ("hidden_size", 5, 26),
    ("model.hidden_size", 5, 26),
    ("blocks.linear.mixer.heads", 11, 43),
    ("blocks.full.channel.kind", 19, 33),
    ("layers.5.mixer.heads", 18, 39),
    ("layers.0.mixer.heads", 11, 43),
    ("layers.0.mixer.nothing", 11, 13),
    ("layers.0.channel.width", 16, 7),
    ("layers.5", 22, 48),
    ("layers.77.mixer", 22, 5),
    ("search.tasks.0.pairs", 23, 18),
    ("nothing.at.all", 1, 1),
]


@pytest.mark.parametrize(("path", "line", "column"), PLACES)
def test_a_path_of_the_resolved_model_leads_back_to_the_file(
    file: SpecFile, path: str, line: int, column: int
) -> None:
    where = file.where(path)
    assert (where.path, where.file, where.line, where.column) == (path, "open.yaml", line, column)


def test_a_path_of_another_setting_leads_to_its_option(file: SpecFile) -> None:
    values = {MIXER: option(file, MIXER, 2), f"{MIXER}.choice.2.window": 64}
    assert file.where("layers.0.mixer.window", values).line == 15
    assert file.where("layers.0.mixer.heads", {}, ["full"] * 6).line == 18


def test_layers_in_repeats_lead_back_to_their_block() -> None:
    text = TEXT.split("  layers:")[0] + "  layers: [local, {repeat: 2, pattern: [linear, full]}]\n"
    file = loads(text)
    assert [file.where(f"layers.{index}.mixer.heads").line for index in range(5)] == [20, 11, 18, 11, 18]
    assert [file.where(f"layers.{index}").column for index in range(5)] == [12, 41, 49, 41, 49]
