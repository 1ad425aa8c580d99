"""Open values that depend on others: what `when` and `otherwise` mean, count and refuse."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from typing import Any

import pytest

from heddle.errors import HeddleErrors
from heddle.search import space as search_space
from heddle.specs import ModelSpec, Space, SpecFile, loads, spec_hash

Every = Callable[[Space], list[dict[str, object]]]

TEXT = """\
version: 1
name: when
model:
  vocab_size: 256
  hidden_size: {choice: [64, 128]}
  blocks:
    linear:
      mixer:
        choice:
          - {kind: attention, heads: 2}
          - {kind: decay_attention, heads: {choice: [2, 4]}}
      channel: {kind: swiglu}
      norm: {choice: [rmsnorm, layernorm], when: WHEN, otherwise: layernorm}
  layers: [linear, linear]
"""
MIXER = "blocks.linear.mixer"
NORM = "blocks.linear.norm"
DECAY = {"kind": "decay_attention", "heads": {"choice": [2, 4]}}


def opened(when: str, **changes: str) -> SpecFile:
    text = TEXT.replace("WHEN", when)
    for old, new in changes.items():
        text = text.replace(old, new)
    return loads(text, file="a.yaml")


def told(when: str) -> str:
    with pytest.raises(HeddleErrors) as errors:
        opened(when)
    (error,) = errors.value.errors
    return f"{str(error).splitlines()[0]}  | {error.hint}"


def norm(file: SpecFile, values: dict[str, object]) -> str:
    return file.resolve(values).model.blocks["linear"].norm


# A condition, how many settings the file has, and what the norm is at three settings if the search asks for rmsnorm.
CONDITIONS = [
    ("{hidden_size: 128}", 3 + 2 * 3, "layernorm", "rmsnorm", "layernorm"),
    ("{hidden_size: [64, 128]}", 2 * 3 * 2, "rmsnorm", "rmsnorm", "rmsnorm"),
    ("{blocks.linear.mixer.kind: attention}", 2 * (2 + 2), "rmsnorm", "rmsnorm", "layernorm"),
    ("{blocks.linear.mixer: {option: 1}}", 2 * (1 + 4), "layernorm", "layernorm", "rmsnorm"),
    ("{blocks.linear.mixer: {kind: attention, heads: 2}}", 2 * (2 + 2), "rmsnorm", "rmsnorm", "layernorm"),
    # A field that stands in every option, once as a value and once open.
    ("{blocks.linear.mixer.heads: 2}", 2 * (2 + 2 + 1), "rmsnorm", "rmsnorm", "layernorm"),
    ("{blocks.linear.mixer.heads: 4}", 2 * (1 + 1 + 2), "layernorm", "layernorm", "rmsnorm"),
    ("{blocks.linear.mixer.choice.1.heads: 4}", 2 * (1 + 1 + 2), "layernorm", "layernorm", "rmsnorm"),
    ("{blocks.linear.mixer.heads: 4, hidden_size: 64}", 3 + 1 + 3, "layernorm", "layernorm", "rmsnorm"),
]


@pytest.mark.parametrize(
    ("when", "size", "plain", "wide", "decay"), CONDITIONS, ids=[one[0] for one in CONDITIONS]
)
def test_a_value_is_open_where_its_condition_holds(
    every_setting: Every, when: str, size: int, plain: str, wide: str, decay: str
) -> None:
    file = opened(when)
    asked = {NORM: "rmsnorm"}
    assert file.space.size() == size == len(every_setting(file.space))
    assert norm(file, asked) == plain
    assert norm(file, {**asked, "hidden_size": 128}) == wide
    assert norm(file, {**asked, MIXER: DECAY, f"{MIXER}.choice.1.heads": 4}) == decay
    active = [one.name for one in file.space.active({**asked, "hidden_size": 128})]
    assert (NORM in active) == (wide == "rmsnorm")


def test_without_otherwise_the_field_is_the_first_option_or_the_low_end() -> None:
    text = TEXT.replace(", when: WHEN, otherwise: layernorm", ", when: {hidden_size: 128}")
    assert norm(loads(text), {NORM: "layernorm"}) == "rmsnorm"
    text = TEXT.replace(
        "{choice: [rmsnorm, layernorm], when: WHEN, otherwise: layernorm}", "rmsnorm"
    ).replace("kind: swiglu", "kind: swiglu, width: {int: [8, 64], step: 8, when: {hidden_size: 128}}")
    file = loads(text)
    assert (
        file.resolve({"blocks.linear.channel.width": 32}).model.blocks["linear"].channel.model_dump()["width"]
        == 8
    )
    assert file.space.size() == 3 + 3 * 8


def test_what_stands_in_an_option_is_closed_with_it(every_setting: Every) -> None:
    closed = "otherwise: {kind: attention, heads: 4}, when: {hidden_size: 128}"
    text = TEXT.replace(
        "{choice: [rmsnorm, layernorm], when: WHEN, otherwise: layernorm}", "rmsnorm"
    ).replace(
        """\
        choice:
          - {kind: attention, heads: 2}
          - {kind: decay_attention, heads: {choice: [2, 4]}}
""",
        f"        {{choice: [{{kind: decay_attention, heads: {{choice: [2, 4]}}}}, {{kind: attention, heads: 2}}], {closed}}}\n",
    )
    file = loads(text)
    assert file.spec.model.blocks["linear"].mixer.written() == {"kind": "attention", "heads": 4}
    assert file.space.size() == 1 + 3
    # One that hangs on the value of a closed choice sees what the file says, not what the search did not say.
    nested = text.replace(
        "norm: rmsnorm", f"norm: {{choice: [rmsnorm, layernorm], when: {{{MIXER}.heads: 4}}}}"
    )
    file = loads(nested)
    assert [one.name for one in file.space.active({})] == ["hidden_size", NORM]
    assert file.space.size() == 2 + (1 + 2 + 1) == len(every_setting(file.space))


def test_conditions_may_look_ahead_and_build_on_each_other(every_setting: Every) -> None:
    text = TEXT.replace(
        "hidden_size: {choice: [64, 128]}", f"hidden_size: {{choice: [64, 128], when: {{{NORM}: layernorm}}}}"
    )
    file = loads(text.replace("WHEN", "{blocks.linear.mixer.kind: decay_attention}"))
    assert [one.name for one in file.space.parameters] == [
        MIXER,
        NORM,
        "hidden_size",
        f"{MIXER}.choice.1.heads",
    ]
    # Attention: norm closed at layernorm, so two widths; decay: two heads, times one width, or two.
    assert file.space.size() == 2 + 2 * (1 + 2) == len(every_setting(file.space))


def test_a_condition_holds_for_counts_of_a_placement_and_for_layers() -> None:
    text = TEXT.replace("WHEN", "{hidden_size: 64}").replace(
        "layers: [linear, linear]",
        "layers: {placement: {length: 4, of: [linear, full], count: {full: {int: [1, 2], when: WIDE, otherwise: 3}}}}",
    )
    text = text.replace(
        "    linear:\n",
        "    full: {mixer: {kind: attention, heads: 2}, channel: {kind: none}}\n    linear:\n",
    )
    text = text.replace("WIDE", "{hidden_size: 128}")
    file = loads(text)
    count = "layers.placement.count.full"
    assert file.spec.model.layers.count("full") == 3
    assert file.resolve({"hidden_size": 128, count: 2}).model.layers.count("full") == 2
    # Narrow: three mixers, two norms, four places; wide: three mixers, 4 + 6 places.
    assert file.space.size() == 3 * 2 * 4 + 3 * (4 + 6)
    layer = "{choice: [linear, full], when: {hidden_size: 128}, otherwise: full}"
    several = loads(text[: text.index("  layers:")] + f"  layers: [linear, {layer}]\n")
    assert several.spec.model.layers == ["linear", "full"]
    assert several.resolve({"hidden_size": 128}).model.layers == ["linear", "linear"]


REFUSED = [
    (
        "{hidden_size: 65}",
        "a.yaml:13:64: blocks.linear.norm.when.hidden_size: 65 is no value of hidden_size   [bad-space]  | it may be 64, 128",
    ),
    (
        "{hidden_size: [64, 96]}",
        "a.yaml:13:69: blocks.linear.norm.when.hidden_size.1: 96 is no value of hidden_size   [bad-space]  | it may be 64, 128",
    ),
    (
        "{blocks.linear.mixer.kind: atention}",
        "a.yaml:13:77: blocks.linear.norm.when.blocks.linear.mixer.kind: 'atention' is no value of"
        " blocks.linear.mixer.kind   [bad-space]  | did you mean attention?",
    ),
    (
        "{blocks.linear.mixer: {option: 2}}",
        "a.yaml:13:72: blocks.linear.norm.when.blocks.linear.mixer: option 2 is no value of blocks.linear.mixer"
        "   [bad-space]  | it may be {option: 0} to {option: 1}",
    ),
    (
        "{blocks.linear.mixr.kind: attention}",
        "a.yaml:13:51: blocks.linear.norm.when.blocks.linear.mixr.kind: there is no field 'blocks.linear.mixr.kind' in the"
        " model   [bad-space]  | did you mean blocks.linear.mixer.kind?",
    ),
    (
        "{vocab_size: 256}",
        "a.yaml:13:51: blocks.linear.norm.when.vocab_size: 'vocab_size' is not left open, so nothing depends on it"
        "   [bad-space]  | open are hidden_size, blocks.linear.mixer, blocks.linear.mixer.choice.1.heads, blocks.linear.norm",
    ),
    (
        "{blocks.linear.norm: rmsnorm}",
        "a.yaml:13:44: blocks.linear.norm.when: the conditions go in a circle: blocks.linear.norm → blocks.linear.norm"
        "   [bad-space]  | remove one of them",
    ),
    (
        "{blocks.linear.mixer.heads: 4, blocks.linear.mixer.kind: attention}",
        "a.yaml:13:44: blocks.linear.norm.when: no setting fulfils this condition   [bad-space]"
        "  | remove it, or the open value",
    ),
    (
        "{}",
        "a.yaml:13:50: blocks.linear.norm.when: when is a mapping of open values to what they must be, got a mapping"
        "   [bad-space]  | when: {blocks.linear.mixer.kind: attention}",
    ),
    (
        "hidden_size",
        "a.yaml:13:50: blocks.linear.norm.when: when is a mapping of open values to what they must be, got 'hidden_size'"
        "   [bad-space]  | when: {blocks.linear.mixer.kind: attention}",
    ),
]


@pytest.mark.parametrize(("when", "expected"), REFUSED, ids=[when for when, _ in REFUSED])
def test_a_condition_that_means_nothing_is_refused_at_its_place(when: str, expected: str) -> None:
    assert told(when) == expected


def test_a_longer_circle_is_told_once_with_its_way() -> None:
    text = TEXT.replace("[64, 128]}", f"[64, 128], when: {{{NORM}: rmsnorm}}}}")
    with pytest.raises(HeddleErrors) as errors:
        loads(text.replace("WHEN", "{hidden_size: 64}"))
    (error,) = errors.value.errors
    assert error.what == f"the conditions go in a circle: hidden_size → {NORM} → hidden_size"
    assert (error.where.line, error.where.column) == (5, 36)


def test_a_float_is_no_condition() -> None:
    text = TEXT.replace("  blocks:", "  norm_eps: {float: [1.0e-6, 1.0e-4]}\n  blocks:")
    with pytest.raises(HeddleErrors) as errors:
        loads(text.replace("WHEN", "{norm_eps: 1.0e-5}"))
    assert errors.value.what == "'norm_eps' is a float, and no trial would meet one value of it"


@pytest.mark.parametrize(
    ("old", "new", "what", "column"),
    [
        (
            "when: WHEN, otherwise: layernorm",
            "otherwise: layernorm",
            "otherwise says what holds where `when` does not, and there is no when",
            44,
        ),
        (
            "otherwise: layernorm",
            "otherwise: {choice: [rmsnorm]}",
            "otherwise is a plain value, and this leaves one open",
            81,
        ),
        (
            "otherwise: layernorm",
            "otherwise: layrnorm",
            "'layrnorm' is not one of rmsnorm, layernorm",
            81,
        ),
        ("otherwise", "otherwse", "there is no field 'otherwse' in {choice: …}", 70),
    ],
)
def test_an_otherwise_that_is_no_value_is_refused(old: str, new: str, what: str, column: int) -> None:
    for when in ("{hidden_size: 128}", "{hidden_size: 64 }"):
        with pytest.raises(HeddleErrors) as errors:
            loads(TEXT.replace(old, new).replace("WHEN", when))
        (error,) = errors.value.errors
        assert (error.what, error.where.line, error.where.column) == (what, 13, column)


def test_options_that_only_a_condition_opens_are_checked() -> None:
    text = TEXT.replace("[rmsnorm, layernorm]", "[rmsnorm, batchnorm]").replace(
        "WHEN", f"{{{MIXER}.heads: 4}}"
    )
    with pytest.raises(HeddleErrors) as errors:
        loads(text)
    assert errors.value.what == "'batchnorm' is not one of rmsnorm, layernorm"
    assert (errors.value.where.line, errors.value.where.path) == (13, f"{NORM}.choice.1")


def test_the_hidden_size_that_an_option_needs_is_the_one_its_condition_gives() -> None:
    heads = "{kind: attention, rope: null, heads: {choice: [2, 128], when: {hidden_size: 128}}}"
    text = TEXT.replace("{kind: attention, heads: 2}", heads).replace("WHEN", "{hidden_size: 64}")
    assert loads(text).space.size() == 2 * (1 + 2) + (2 + 2)


def test_a_trial_asks_for_what_is_open_and_for_nothing_else() -> None:
    file = opened("{blocks.linear.mixer.heads: 4}")

    class Drawn:
        """As a study, with values by chance."""

        def __init__(self, seed: int) -> None:
            self.random, self.asked = random.Random(seed), []

        def suggest(self, _: int, name: str, draw: Any) -> Any:
            self.asked.append(name)
            parameter = draw.keywords["parameter"]
            return self.random.choice(parameter.values())

    hashes = set()
    for seed in range(200):
        study = Drawn(seed)
        values = search_space.suggest_all(study, 0, file.space)  # type: ignore[arg-type]
        assert list(values) == study.asked == [one.name for one in file.space.active(values)]
        hashes.add(spec_hash(file.resolve(values).model))
    assert len(hashes) == file.space.size()


def random_space(rng: random.Random) -> str:
    """Open values in a row, each perhaps hanging on earlier ones, some inside options of a choice."""
    fields: dict[str, Any] = {}
    names: list[tuple[str, list[Any]]] = []
    for name in rng.sample(
        ["vocab_size", "hidden_size", "context_length", "embedding_multiplier", "logit_softcap"], 4
    ):
        values = rng.sample([512, 1024, 2048, 4096], rng.randint(1, 3))
        if name in ("embedding_multiplier", "logit_softcap"):
            values = [float(value) for value in values]
        form: dict[str, Any] = {"choice": values}
        if name == "context_length" and rng.random() < 0.5:
            form, values = {"int": [512, 514]}, [512, 513, 514]
        if names and rng.random() < 0.7:
            picked = rng.sample(names, rng.randint(1, min(2, len(names))))
            form["when"] = {one: rng.sample(known, rng.randint(1, len(known))) for one, known in picked}
            if rng.random() < 0.5:
                form["otherwise"] = 8192.0 if name in ("embedding_multiplier", "logit_softcap") else 8192
        fields[name] = form
        names.append((name, values))
    mixers = [
        {"kind": "attention", "heads": {"choice": [2, 4]}},
        {"kind": "attention", "heads": 2, "window": 8},
    ]
    mixer: dict[str, Any] = {"choice": mixers}
    if rng.random() < 0.7:
        one, known = rng.choice(names)
        mixer["when"] = {one: rng.choice(known)}
    gate = {"choice": [True, False], "when": {"blocks.a.mixer.heads": rng.choice([2, 4])}}
    blocks = {
        "a": {"mixer": mixer, "channel": {"kind": "none"}},
        "b": {"mixer": {"kind": "attention", "heads": 2, "gate": gate}, "channel": {"kind": "none"}},
    }
    rest = {"vocab_size": 512, "hidden_size": 512}
    model = {**rest, **fields, "blocks": blocks, "layers": ["a", "b"]}
    return json.dumps({"version": 1, "name": "random", "tokenizer": "own", "model": model})


def test_sizes_of_random_spaces_are_those_of_all_listed(
    every_setting: Every, random_seed: int, full_counts: bool
) -> None:
    for number in range(1000 if full_counts else 60):
        text = random_space(random.Random(f"{random_seed}-{number}"))
        file = loads(text)
        listed = every_setting(file.space)
        assert file.space.size() == len(listed), text
        for setting in random.Random(number).sample(listed, min(8, len(listed))):
            model = file.resolve(setting).model
            assert isinstance(model, ModelSpec)
            held = file.space.held(setting)
            assert model.context_length == held.get("context_length", model.context_length)
            assert model.hidden_size == held.get("hidden_size", model.hidden_size)


def test_a_long_chain_of_conditions_is_counted_and_a_thicket_is_not() -> None:
    blocks: dict[str, Any] = {}
    for number in range(60):
        when = {} if number == 0 else {"when": {f"blocks.b{number - 1}.norm": "layernorm"}}
        blocks[f"b{number}"] = {
            "mixer": {"kind": "attention", "heads": 2},
            "channel": {"kind": "none"},
            "norm": {"choice": ["rmsnorm", "layernorm"], **when},
        }
    model = {"vocab_size": 256, "hidden_size": 64, "blocks": blocks, "layers": list(blocks)}
    data = {"version": 1, "name": "chain", "model": model}
    assert loads(json.dumps(data)).space.size() == 61
    for number in range(30, 60):
        blocks[f"b{number}"]["norm"]["when"] = {
            f"blocks.b{other}.norm": "rmsnorm" for other in range(number - 30, number)
        }
    for number in range(30):
        blocks[f"b{number}"]["norm"].pop("when", None)
    assert loads(json.dumps(data)).space.size() == math.inf
