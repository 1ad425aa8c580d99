"""Mistakes in the forms that layers are composed of, each told at its place, in these words and in no others."""

from __future__ import annotations

import pytest
from toys import FORMS as GOOD

from heddle.compose.plan import plan
from heddle.errors import HeddleErrors
from heddle.specs import MIXERS, loads


def planned(text: str) -> None:
    file = loads(text, file="a.yaml")
    plan(file.spec.model, file.where)


def told(text: str) -> list[str]:
    """The first line and the hint of each error, of the file or of its plan."""
    with pytest.raises(HeddleErrors) as errors:
        planned(text)
    firsts = ((str(one).splitlines()[0], one.hint) for one in errors.value.errors)
    return [f"{first}  | {hint}" if hint else first for first, hint in firsts]


def test_the_good_one_is_good() -> None:
    file = loads(GOOD)
    assert len(plan(file.spec.model, file.where).layers) == 5


# What is replaced in GOOD, by what, and everything that is told.
MISTAKES: list[tuple[str, str, str]] = [
    (
        "{block: full, name: first}",
        "{block: ful, name: first}",
        "a.yaml:13:20: layers.0.block: there is no block 'ful'   [unknown-block]  | did you mean full?",
    ),
    (
        "{block: full, name: first}",
        "{blok: full, name: first}",
        "a.yaml:13:13: layers.0.blok: there is no field 'blok' here   [unknown-field]  | did you mean block?",
    ),
    (
        "{block: full, name: first}",
        "{block: full, nam: first}",
        "a.yaml:13:26: layers.0.nam: there is no field 'nam' here   [unknown-field]  | did you mean name?",
    ),
    (
        "{block: full, name: first}",
        "{name: first}",
        "a.yaml:13:12: layers.0.block: 'block' is missing   [missing-field]  | block: name of the block.",
    ),
    (
        "{block: full, name: first}",
        "{block: full, name: 'fi rst'}",
        "a.yaml:13:32: layers.0.name: 'fi rst' is not a name   [out-of-range]  | letters, digits, '_' and '-', at "
        "most 64; a letter or '_' first",
    ),
    (
        "{block: full, name: first}",
        "{block: full, name: both}",
        "a.yaml:13:32: layers.0.name: 'both' is the name of a block already   [duplicate-name]  | give the layer "
        "another name",
    ),
    (
        "{block: full, name: first}",
        "{block: full, name: embedding}",
        "a.yaml:13:32: layers.0.name: 'embedding' is the name of the embedded tokens already   [duplicate-name]  |"
        " give the layer another name",
    ),
    (
        "{block: full, name: first}, both",
        "{block: full, name: first}, {block: both, name: first}",
        "a.yaml:13:60: layers.1.name: 'first' is the name of layers.0 already   [duplicate-name]  | give the layer"
        " another name",
    ),
    (
        "{block: full, name: first}",
        "{block: full, name: first, override: 3}",
        "a.yaml:13:49: layers.0.override: expected a mapping, got 3   [wrong-type]",
    ),
    (
        "{block: full, name: first}",
        "3",
        "a.yaml:13:12: layers.0: a layer is a block's name, {block: …} or {repeat: …, pattern: […]}; this is 3   "
        "[wrong-type]",
    ),
    (
        "{block: full, name: first}",
        "[full]",
        "a.yaml:13:12: layers.0: a layer is a block's name, {block: …} or {repeat: …, pattern: […]}; this is a "
        "list   [wrong-type]",
    ),
    (
        "{block: full, name: first}",
        "{block: full, name: first, repeat: 3}",
        "a.yaml:13:39: layers.0.repeat: there is no field 'repeat' here   [unknown-field]  | known here: block, "
        "name, override",
    ),
    (
        "both, once",
        "both, {repeat: 0, pattern: [once]}",
        "a.yaml:13:55: layers.2.repeat: 0 is not at least 1   [out-of-range]",
    ),
    (
        "override: {mixer: {window: 8}}",
        "override: {mixer: {windw: 8}}",
        "a.yaml:13:91: layers.4.override.mixer.windw: there is no field 'windw' here   [unknown-field]  | did you "
        "mean window?",
    ),
    (
        "override: {mixer: {window: 8}}",
        "override: {mixr: {window: 8}}",
        "a.yaml:13:83: layers.4.override.mixr: there is no field 'mixr' here   [unknown-field]  | did you mean "
        "mixer?",
    ),
    (
        "override: {mixer: {window: 8}}",
        "override: {mixer: {window: 0}}",
        "a.yaml:13:99: layers.4.override.mixer.window: 0 is not at least 1   [out-of-range]",
    ),
    (
        "override: {mixer: {window: 8}}",
        "override: {mixer: {heads: 6}}",
        "a.yaml:13:98: layers.4.override.mixer.heads: 6 does not divide hidden_size 64   [dims-not-divisible]  | 4"
        " or 8 do; or set head_dim",
    ),
    (
        "override: {mixer: {window: 8}}",
        "override: {mixer: {kind: atention}}",
        "a.yaml:13:97: layers.4.override.mixer.kind: there is no mixer kind 'atention'   [unknown-kind]  | did you"
        " mean attention?",
    ),
    (
        "override: {mixer: {window: 8}}",
        "override: {mixer: {kind: decay_attention}}",
        "a.yaml:13:83: layers.4.override.mixer.heads: 'heads' is missing   [missing-field]  | heads: heads (a "
        "count).",
    ),
    (
        "override: {mixer: {window: 8}}",
        "override: {skip: {source: frst}}",
        "a.yaml:13:98: layers.4.skip.source: no layer and no block is called 'frst' (pass link_references)   "
        "[unknown-layer]  | did you mean first?",
    ),
    (
        "override: {mixer: {window: 8}}",
        "override: {norm_placement: post, residual: {of: normed}}",
        "a.yaml:13:120: layers.4.override.residual.of: there is no norm before the part when norms stand after it"
        "   [conflicting-fields]  | norm_placement: pre, or of: stream",
    ),
    (
        "override: {mixer: {window: 8}}",
        "override: {shared: true}",
        "a.yaml:13:72: layers.4.override: layers of a shared block have one set of weights, so none of them can "
        "differ   [conflicting-fields]  | a block of its own for this layer",
    ),
    (
        "once, late",
        "{block: once, override: {mixer: {window: 8}}}, late",
        "a.yaml:13:60: layers.2.override: layers of a shared block have one set of weights, so none of them can "
        "differ   [conflicting-fields]  | a block of its own for this layer",
    ),
    (
        "skip: {source: first}",
        "skip: {source: frist}",
        "a.yaml:12:86: layers.3.skip.source: no layer and no block is called 'frist' (pass link_references)   "
        "[unknown-layer]  | did you mean first?",
    ),
    (
        "skip: {source: first}",
        "skip: {sorce: first}",
        "a.yaml:12:78: blocks.late.skip.sorce: there is no field 'sorce' here   [unknown-field]  | did you mean "
        "source?",
    ),
    (
        "skip: {source: first}",
        "skip: first",
        "a.yaml:12:77: blocks.late.skip: expected a mapping, got 'first'   [wrong-type]  | {source: first}",
    ),
    (
        "skip: {source: first}",
        "skip: {source: late2}",
        "a.yaml:12:86: layers.3.skip.source: no layer and no block is called 'late2' (pass link_references)   "
        "[unknown-layer]  | did you mean late?",
    ),
    (
        "skip: {source: first}",
        "skip: {source: first, init: much}",
        "a.yaml:12:99: blocks.late.skip.init: expected a number, got 'much'   [wrong-type]",
    ),
    (
        "{block: full, name: first}, both, once, late",
        "late, {block: full, name: first}, both, once",
        "a.yaml:12:86: layers.0.skip.source: layer 0 takes stream from 'first', which stands before none of its "
        "layers (pass link_references)   [reference-direction]  | a layer takes from earlier ones only; put it "
        "first, or name another",
    ),
    (
        "skip: {source: first}",
        "residual: {branch: '0.5'}",
        "a.yaml:12:90: blocks.late.residual.branch: expected a number, got '0.5'   [wrong-type]  | a plain number,"
        " without quotes or units",
    ),
    (
        "skip: {source: first}",
        "residual: {of: norm}",
        "a.yaml:12:86: blocks.late.residual.of: 'norm' is not one of stream, normed   [out-of-range]  | did you "
        "mean normed?",
    ),
    (
        "skip: {source: first}",
        "residual: {of: normed}, norm_placement: post",
        "a.yaml:12:86: blocks.late.residual.of: there is no norm before the part when norms stand after it   "
        "[conflicting-fields]  | norm_placement: pre, or of: stream",
    ),
    (
        "skip: {source: first}",
        "channel_residual: {brnch: 2.0}",
        "a.yaml:12:90: blocks.late.channel_residual.brnch: there is no field 'brnch' here   [unknown-field]  | did"
        " you mean branch?",
    ),
    (
        "skip: {source: first}",
        "norm_placement: sandwhich",
        "a.yaml:12:87: blocks.late.norm_placement: 'sandwhich' is not one of pre, post, sandwich   [out-of-range]"
        "  | did you mean sandwich?",
    ),
    (
        "skip: {source: first}",
        "shared: yes",
        "a.yaml:12:79: blocks.late.shared: expected true or false, got 'yes'   [wrong-type]  | true",
    ),
    (
        "{kind: gated_deltanet, heads: 2}]}",
        "{kind: gated_deltnet, heads: 2}]}",
        "a.yaml:9:76: blocks.both.mixer.mixers.1.kind: there is no mixer kind 'gated_deltnet'   [unknown-kind]  | "
        "did you mean gated_deltanet?",
    ),
    (
        "{kind: gated_deltanet, heads: 2}]}",
        "{kind: gated_deltanet, head: 2}]}",
        "a.yaml:9:92: blocks.both.mixer.mixers.1.head: there is no field 'head' here   [unknown-field]  | did you "
        "mean heads?",
    ),
    (
        "{kind: gated_deltanet, heads: 2}]}",
        "{kind: gated_deltanet, heads: 3}]}",
        "a.yaml:9:99: blocks.both.mixer.mixers.1.heads: 3 does not divide hidden_size 64   [dims-not-divisible]  |"
        " 2 or 4 do; or set head_dim",
    ),
    (
        "{kind: gated_deltanet, heads: 2}]}",
        "{heads: 2}]}",
        "a.yaml:9:69: blocks.both.mixer.mixers.1.kind: 'kind' is missing   [missing-field]  | one of "
        f"{', '.join(MIXERS)}",
    ),
    (
        "{kind: gated_deltanet, heads: 2}]}",
        "gated_deltanet]}",
        "a.yaml:9:69: blocks.both.mixer.mixers.1: expected a mapping, got 'gated_deltanet'   [wrong-type]  | "
        "{kind: gated_deltanet, …}",
    ),
    (
        ", {kind: gated_deltanet, heads: 2}]}",
        "]}",
        "a.yaml:9:39: blocks.both.mixer.mixers: 1 item; at least 2 are needed   [out-of-range]",
    ),
    (
        "{kind: gated_deltanet, heads: 2}]}",
        "{kind: gated_deltanet, heads: 2}], merge: summ}",
        "a.yaml:9:111: blocks.both.mixer.merge: 'summ' is not one of sum, mean, gate, concat   [out-of-range]  | "
        "did you mean sum?",
    ),
    (
        "{kind: gated_deltanet, heads: 2}]}",
        "{kind: gated_deltanet, heads: 2}], weights: [1.0]}",
        "a.yaml:9:113: blocks.both.mixer.weights: 1 weights for 2 mixers   [out-of-range]  | one for each mixer",
    ),
    (
        "{kind: gated_deltanet, heads: 2}]}",
        "{kind: gated_deltanet, heads: 2}], mixer: {kind: attention}}",
        "a.yaml:9:104: blocks.both.mixer.mixer: there is no field 'mixer' here   [unknown-field]  | did you mean "
        "mixers?",
    ),
    (
        "mixers: [{kind: attention, heads: 4}, {kind: gated_deltanet, heads: 2}]",
        "mixers: {kind: attention, heads: 4}",
        "a.yaml:9:39: blocks.both.mixer.mixers: expected a list, got a mapping   [wrong-type]  | put it in a list,"
        " between [ and ]",
    ),
    (
        "{kind: gated_deltanet, heads: 2}]}",
        "{kind: parallel, mixers: [{kind: attention, heads: 5}, {kind: attention, heads: 4, windw: 2}]}]}",
        "a.yaml:9:152: blocks.both.mixer.mixers.1.mixers.1.windw: there is no field 'windw' here   [unknown-field]"
        "  | did you mean window?",
    ),
]


@pytest.mark.parametrize(
    ("old", "new", "expected"), MISTAKES, ids=[f"{old[:30]} -> {new[:50]}" for old, new, _ in MISTAKES]
)
def test_a_mistake_is_told_once_and_in_these_words(old: str, new: str, expected: str) -> None:
    assert old in GOOD
    assert told(GOOD.replace(old, new, 1)) == [expected]


def test_more_mixers_than_a_layer_has_room_for_are_counted() -> None:
    many = ", ".join(["{kind: attention, heads: 4}"] * 9)
    text = GOOD.replace("{kind: attention, heads: 4}, {kind: gated_deltanet, heads: 2}", many)
    assert told(text) == ["a.yaml:9:39: blocks.both.mixer.mixers: more than 8 items   [out-of-range]"]


@pytest.mark.parametrize("kind", ["parallel", "sequential"])
def test_mixers_are_nested_to_a_depth_and_no_deeper(kind: str) -> None:
    nested = "{kind: attention, heads: 4}"
    for depth in range(1, 25):
        nested = f"{{kind: {kind}, mixers: [{{kind: attention, heads: 4}}, {nested}]}}"
        text = GOOD.replace("{kind: gated_deltanet, heads: 2}", nested)
        # The one of the block is a level of its own, and the plain ones in the innermost are the last.
        if depth <= 2:
            loads(text)
            continue
        (error,) = told(text)
        assert (
            ": blocks.both.mixer.mixers.1.mixers.1.mixers.1.mixers.0: mixers nested deeper than 4 levels   [too-deep]"
            in error
        )
        assert error.startswith("a.yaml:9:")


def test_an_override_may_nest_no_deeper_either() -> None:
    nested = "{kind: attention, heads: 4}"
    for _ in range(4):
        nested = f"{{kind: parallel, mixers: [{{kind: attention, heads: 4}}, {nested}]}}"
    (error,) = told(GOOD.replace("override: {mixer: {window: 8}}", f"override: {{mixer: {nested}}}"))
    assert "layers.4.override.mixer" in error
    assert "[too-deep]" in error


ALONE = """\
version: 1
name: alone
model:
  vocab_size: 256
  hidden_size: 16
  blocks:
    f: {mixer: {kind: attention, heads: 2}, channel: {kind: none}}
    a: {mixer: {kind: attention, heads: 2, keys_from: f}, channel: {kind: none}}
  layers: [f, {choice: [f, a]}]
search:
  tasks: [text]
  budgets: [decode_ms: {at_most: 0.9, relative_to: all-a, context: 128}]
"""


def test_a_budget_relative_to_a_block_that_takes_from_others_is_refused() -> None:
    with pytest.raises(HeddleErrors) as told:
        loads(ALONE, file="a.yaml")
    assert [str(error).splitlines()[0] for error in told.value.errors] == [
        "a.yaml:12:52: search.budgets.0.decode_ms.relative_to: a model of 'a' alone has no earlier layer to take keys from"
        "   [reference-direction]"
    ]
