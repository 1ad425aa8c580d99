"""Kinds of models in a spec: encoders and their readouts, and what a causal language model refuses, at its line."""

from __future__ import annotations

import json
from typing import Any

import pytest

from heddle.compose.plan import plan
from heddle.errors import HeddleErrors
from heddle.specs import ModelSpec, SpecFile, differences, expand_layers, loads, spec_hash, to_yaml

TEXT = """\
version: 1
name: a
model:
  kind: encoder
  vocab_size: 256
  hidden_size: 64
  readout: {kind: ep, classes: 10, queries: 16}
  blocks:
    linear: {mixer: {kind: gated_deltanet, heads: 2}, channel: {kind: swiglu}}
    both: {mixer: {kind: attention, heads: 4, causal: false}, channel: {kind: swiglu}}
  layers: [linear, both]
"""
READOUT = "{kind: ep, classes: 10, queries: 16}"
BOTH = "{kind: attention, heads: 4, causal: false}"
CAUSAL = TEXT.replace("kind: encoder", "kind: causal_lm").replace(f"  readout: {READOUT}\n", "")
SEES = "attention lets tokens see later ones, and this is a causal language model"


def planned(text: str) -> SpecFile:
    file = loads(text, file="a.yaml")
    plan(file.spec.model, file.where)
    return file


def refused(text: str) -> list[tuple[str, int | None, str, str]]:
    """Code, line, path and words of every error."""
    with pytest.raises(HeddleErrors) as told:
        planned(text)
    return [(one.code, one.where.line, one.where.path, one.what) for one in told.value.errors]


def changed(old: str, new: str, text: str = TEXT) -> str:
    assert old in text
    return text.replace(old, new)


@pytest.mark.parametrize(
    "readout",
    [
        "{kind: last, classes: 2}",
        "{kind: mean, classes: 3}",
        "{kind: cls, classes: 1000}",
        "{kind: ep, classes: 10}",
        "{kind: ep, classes: 10, queries: 8, reduction: 4}",
        "null",
    ],
)
def test_a_spec_of_an_encoder_is_read_written_and_planned(readout: str) -> None:
    file = planned(changed(READOUT, readout))
    assert file.spec.model.kind == "encoder"
    assert file.warnings == ()
    again = loads(to_yaml(file.spec)).spec
    assert again.model == file.spec.model
    assert spec_hash(again.model) == spec_hash(file.spec.model)
    assert plan(again.model).runtime() == plan(file.spec.model).runtime()
    assert plan(again.model).runtime()["kind"] == "encoder"


def test_the_default_is_a_causal_language_model_and_is_not_written() -> None:
    causal = changed(BOTH, "{kind: attention, heads: 4}", CAUSAL)
    plain = changed("  kind: causal_lm\n", "", causal)
    files = [planned(text).spec for text in (causal, plain)]
    assert "kind: causal_lm" not in to_yaml(files[0])
    assert to_yaml(files[0]) == to_yaml(files[1])
    assert spec_hash(files[0].model) == spec_hash(files[1].model)
    assert not {"kind", "readout"} & set(plan(files[0].model).runtime())


def test_with_a_readout_there_is_no_head_to_tie() -> None:
    tied, untied = (
        planned(changed("  hidden_size: 64\n", f"  hidden_size: 64\n  tie_embeddings: {word}\n")).spec.model
        for word in ("true", "false")
    )
    assert spec_hash(tied) == spec_hash(untied)
    assert plan(tied).runtime() == plan(untied).runtime()
    masked = [one.model_copy(update={"readout": None}) for one in (tied, untied)]
    assert spec_hash(masked[0]) != spec_hash(masked[1])


def test_kinds_and_readouts_are_told_apart_by_the_hash_and_by_a_diff() -> None:
    ep = planned(TEXT).spec
    mean = planned(changed(READOUT, "{kind: mean, classes: 10}")).spec
    masked = planned(changed(f"  readout: {READOUT}\n", "")).spec
    assert len({spec_hash(one.model) for one in (ep, mean, masked)}) == 3
    assert {one.path for one in differences(ep, mean)} == {
        "readout.kind",
        "readout.queries",
        "readout.reduction",
    }
    assert ("readout", None) in {(one.path, one.right) for one in differences(ep, masked)}


def test_a_causal_model_refuses_a_mixer_that_sees_later_tokens() -> None:
    assert refused(CAUSAL) == [("not-causal", 9, "blocks.both.mixer.causal", SEES)]
    unsaid = changed("  kind: causal_lm\n", "", CAUSAL)
    assert refused(unsaid) == [("not-causal", 8, "blocks.both.mixer.causal", SEES)]
    planned(changed("causal_lm", "encoder", CAUSAL))


@pytest.mark.parametrize(
    ("mixer", "path"),
    [
        (f"{{kind: parallel, mixers: [{{kind: attention, heads: 2}}, {BOTH}]}}", "mixers.1.causal"),
        (
            "{kind: parallel, mixers: [{kind: attention, heads: 2}, "
            f"{{kind: parallel, mixers: [{BOTH}, {{kind: gated_deltanet, heads: 2}}]}}]}}",
            "mixers.1.mixers.0.causal",
        ),
    ],
)
def test_the_part_of_a_composite_mixer_is_named(mixer: str, path: str) -> None:
    text = changed(BOTH, mixer, CAUSAL)
    assert refused(text) == [("not-causal", 9, f"blocks.both.mixer.{path}", SEES)]
    model = ModelSpec.model_validate({**json.loads(json.dumps(_model(text))), "kind": "causal_lm"})
    with pytest.raises(HeddleErrors) as told:
        plan(model)
    assert [(one.code, one.where.path) for one in told.value.errors] == [
        ("not-causal", f"layers.1.mixer.{path}")
    ]


def _model(text: str) -> dict[str, Any]:
    """The model of a spec that is an encoder's but for its kind, as data."""
    return loads(changed("causal_lm", "encoder", text)).spec.model.model_dump()


def test_an_override_that_sees_later_tokens_is_refused_where_it_stands() -> None:
    text = changed(BOTH, "{kind: attention, heads: 4}", CAUSAL)
    text = changed(
        "layers: [linear, both]", "layers: [{block: both, override: {mixer: {causal: false}}}]", text
    )
    assert refused(text) == [("not-causal", 10, "layers.0.override.mixer.causal", SEES)]


def test_an_option_that_sees_later_tokens_is_refused_before_the_search() -> None:
    text = changed(BOTH, f"{{choice: [{{kind: attention, heads: 4}}, {BOTH}]}}", CAUSAL)
    assert refused(text) == [("not-causal", 9, "blocks.both.mixer.choice.1.causal", SEES)]
    text = changed(BOTH, "{kind: attention, heads: 4, causal: {choice: [true, false]}}", CAUSAL)
    assert [one[:3] for one in refused(text)] == [("not-causal", 9, "blocks.both.mixer.causal.choice.1")]
    planned(changed("causal_lm", "encoder", text))


def test_the_pass_tells_each_block_once() -> None:
    text = changed("[linear, both]", "[both, linear, both]", CAUSAL)
    model = ModelSpec.model_validate({**_model(text), "kind": "causal_lm"})
    with pytest.raises(HeddleErrors) as told:
        plan(model)
    assert [str(one).splitlines()[0] for one in told.value.errors] == [
        f"layers.0.mixer.causal: {SEES} (pass check_kind)   [not-causal]"
    ]
    assert expand_layers(model) == ["both", "linear", "both"]


@pytest.mark.parametrize("kind", ["causal_lm", None])
def test_a_causal_model_has_no_readout(kind: str | None) -> None:
    line = "" if kind is None else f"  kind: {kind}\n"
    text = changed("  kind: encoder\n", line, changed(BOTH, "{kind: attention, heads: 4}"))
    what = "a causal language model gives logits for every token and has no readout"
    assert refused(text) == [("conflicting-fields", 7 if kind else 6, "readout", what)]
    data = planned(changed(BOTH, "{kind: attention, heads: 4}")).spec.model.model_dump()
    with pytest.raises(HeddleErrors, match="pass check_kind") as told:
        plan(ModelSpec.model_validate({**data, "kind": "causal_lm"}))
    assert told.value.where.path == "readout"


@pytest.mark.parametrize(
    ("readout", "code", "path"),
    [
        ("{kind: ep, classes: 10, queries: 24}", "dims-not-divisible", "readout.queries"),
        ("{kind: ep, classes: 10, reduction: 3}", "dims-not-divisible", "readout.reduction"),
        ("{kind: ep, classes: 10, reduction: 4}", "dims-not-divisible", "readout.queries"),
        ("{kind: ep, classes: 1}", "out-of-range", "readout.classes"),
        ("{kind: ep}", "missing-field", "readout.classes"),
        ("{kind: epp, classes: 3}", "unknown-kind", "readout.kind"),
        ("{kind: mean, classes: 3, queries: 2}", "unknown-field", "readout.queries"),
        ("{classes: 3}", "missing-field", "readout.kind"),
        ("ep", "wrong-type", "readout"),
        (
            "{choice: [{kind: mean, classes: 3}, {kind: ep, classes: 3, queries: 7}]}",
            "dims-not-divisible",
            None,
        ),
    ],
)
def test_a_readout_that_cannot_be_built_is_refused(readout: str, code: str, path: str | None) -> None:
    found = refused(changed(READOUT, readout))
    assert [one[:3] for one in found] == [(code, 7, path or "readout.choice.1")]


def test_sizes_of_a_readout_are_checked_in_a_plan_as_well() -> None:
    data = planned(TEXT).spec.model.model_dump()
    data["readout"]["queries"] = 24
    with pytest.raises(HeddleErrors) as told:
        plan(ModelSpec.model_validate(data))
    assert str(told.value).splitlines() == [
        "readout.queries: 24 does not divide hidden_size 64 (pass check_shapes)   [dims-not-divisible]",
        "  hint: 16 or 32 do",
    ]


def test_a_first_token_that_hears_nothing_is_refused() -> None:
    text = changed(READOUT, "{kind: cls, classes: 10}", changed("[linear, both]", "[linear, linear]"))
    text = changed(
        "    both: {mixer: {kind: attention, heads: 4, causal: false}, channel: {kind: swiglu}}\n", "", text
    )
    assert [one[:3] for one in refused(text)] == [("conflicting-fields", 7, "readout.kind")]
    for kind in ("last", "mean", "ep"):
        planned(changed("kind: cls", f"kind: {kind}", text))


def test_the_kind_of_a_model_cannot_be_left_open() -> None:
    found = refused(changed("kind: encoder", "kind: {choice: [encoder, causal_lm]}"))
    assert ("bad-space", 4, "kind.choice.0") in [one[:3] for one in found]
    assert [one[0] for one in refused(changed("kind: encoder", "kind: encodr"))] == ["out-of-range"]


OPEN = "heads: {choice: [2, 4]}"
OPEN_CAUSAL = changed("heads: 4, causal: false", OPEN, CAUSAL)
SPACE = changed("heads: 4, causal: false", f"{OPEN}, causal: false")


def searching(text: str, fields: str) -> str:
    return f"{text}search: {{{fields}}}\n"


def test_an_encoder_and_its_tasks_are_searched() -> None:
    file = planned(
        searching(SPACE, "tasks: [paragraph_topic], budgets: [prefill_ms: {at_most: 1, context: 64}]")
    )
    assert file.spec.search is not None
    assert [one.kind for one in file.spec.search.tasks] == ["paragraph_topic"]
    planned(
        searching(changed("classes: 10", "classes: 256", SPACE), "tasks: [paragraph_topic, masked_bytes]")
    )
    planned(searching(changed(f"  readout: {READOUT}\n", "", SPACE), "tasks: [masked_bytes]"))


@pytest.mark.parametrize(
    ("text", "fields", "path", "told"),
    [
        (
            SPACE,
            "tasks: [paragraph_topic, text]",
            "tasks.1",
            "text is a task of causal language models, and model.kind is encoder",
        ),
        (
            OPEN_CAUSAL,
            "tasks: [masked_bytes]",
            "tasks.0",
            "masked_bytes is a task of encoders, and model.kind is causal_lm",
        ),
        (
            changed(f"  readout: {READOUT}\n", "", SPACE),
            "tasks: [paragraph_topic]",
            "tasks.0",
            "paragraph_topic asks for the class of a sequence, and the model has no readout",
        ),
        (
            SPACE,
            "tasks: [{paragraph_topic: {topics: 12}}]",
            "tasks.0.paragraph_topic",
            "paragraph_topic has 12 classes, and the readout tells 10 apart",
        ),
        (
            SPACE,
            "tasks: [masked_bytes]",
            "tasks.0",
            "masked_bytes has 256 classes, and the readout tells 10 apart",
        ),
        (
            SPACE,
            "tasks: [paragraph_topic], evaluator: reach",
            "evaluator",
            "reach scores causal language models, and model.kind is encoder",
        ),
        (
            SPACE,
            "tasks: [paragraph_topic], budgets: [decode_ms: {at_most: 1, context: 64}]",
            "budgets.0.decode_ms",
            "an encoder decodes nothing, and model.kind is encoder",
        ),
        (
            SPACE,
            "tasks: [paragraph_topic], budgets: [peak_bytes: {at_most: 1, context: 64, of: decode}]",
            "budgets.0.peak_bytes",
            "an encoder decodes nothing, and model.kind is encoder",
        ),
        (
            SPACE,
            "tasks: [paragraph_topic], budgets: [cache_bytes: {at_most: 1, context: 64}]",
            "budgets.0.cache_bytes",
            "an encoder keeps no cache, and model.kind is encoder",
        ),
    ],
)
def test_what_a_search_of_a_kind_cannot_do_is_refused_at_its_place(
    text: str, fields: str, path: str, told: str
) -> None:
    text = searching(text, fields)
    line = text.splitlines().index(text.splitlines()[-1]) + 1
    assert refused(text) == [("conflicting-fields", line, f"search.{path}", told)]


@pytest.mark.parametrize(
    "readout", [f"{{choice: [null, {READOUT}]}}", READOUT.replace("10", "{choice: [10, 12]}")]
)
def test_a_search_cannot_leave_the_classes_of_a_readout_open(readout: str) -> None:
    text = changed(READOUT, readout)
    planned(text)
    found = refused(searching(text, "tasks: [paragraph_topic]"))
    assert ("bad-space", 7) in [one[:2] for one in found]


def test_tasks_of_earlier_rungs_must_fit_the_model_too() -> None:
    rungs = "rungs: {before: [{tasks: [{text: {tokens: 1k}}]}]}"
    found = refused(searching(SPACE, f"tasks: [paragraph_topic], {rungs}"))
    assert [one[2] for one in found] == ["search.rungs.before.0.tasks.0.text"]
