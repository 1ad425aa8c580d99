"""What is wrong with a spec is told at its place, in words of a careful person, and all of it in one go."""

from __future__ import annotations

import pytest

from heddle.errors import HeddleErrors
from heddle.specs import CHANNELS, MIXERS, loads

GOOD = """\
version: 1
name: good
model:
  vocab_size: 256
  hidden_size: 256
  blocks:
    linear:
      mixer: {kind: gated_deltanet, heads: 4}
      channel: {kind: swiglu}
    full:
      mixer:
        kind: attention
        heads: 4
      channel: {kind: gelu}
  layers: [linear, full]
tokenizer: bytes
data: {source: python-stdlib}
train: {tokens: 20M}
"""
SEARCH = """\
search:
  tasks: [text]
  budgets: [{decode_ms: {at_most: 0.5, context: 64}}]
"""
PLACEMENT = "{placement: {length: 4, of: [linear, full], count: {full: {int: [1, 2]}}}}"
SEARCHABLE = GOOD.replace("[linear, full]\ntok", f"{PLACEMENT}\ntok") + SEARCH


def told(text: str) -> str:
    """Everything the file's author is told."""
    with pytest.raises(HeddleErrors) as errors:
        loads(text, file="a.yaml")
    return str(errors.value)


def heads(text: str) -> list[str]:
    """The first line and the hint of each error."""
    with pytest.raises(HeddleErrors) as errors:
        loads(text, file="a.yaml")
    found = []
    for error in errors.value.errors:
        first = str(error).splitlines()[0]
        found.append(f"{first}  | {error.hint}" if error.hint else first)
    return found


def test_the_good_ones_are_good() -> None:
    loads(GOOD)
    loads(SEARCHABLE)


def test_an_error_shows_the_line_with_a_caret_and_a_hint() -> None:
    assert told(GOOD.replace("        heads: 4", "        heads: 6")) == (
        "a.yaml:13:16: blocks.full.mixer.heads: 6 does not divide hidden_size 256   [dims-not-divisible]\n"
        "   13 |         heads: 6\n"
        "      |                ^\n"
        "  hint: 4 or 8 do; or set head_dim"
    )


# What is replaced in GOOD, by what, and everything that is told.
ONE: list[tuple[str, str, str]] = [
    # Names of fields.
    (
        "hidden_size",
        "hiden_size",
        "a.yaml:5:3: hiden_size: there is no field 'hiden_size' here   [unknown-field]  | did you mean hidden_size?",
    ),
    (
        "tokenizer: bytes",
        "tokeniser: bytes",
        "a.yaml:16:1: tokeniser: there is no field 'tokeniser' here   [unknown-field]  | did you mean tokenizer?",
    ),
    (
        "tokenizer: bytes",
        "norm_eps: 1.0e-5",
        "a.yaml:16:1: norm_eps: there is no field 'norm_eps' here   [unknown-field]  | it belongs in model",
    ),
    (
        "{tokens: 20M}",
        "{tokens: 20M, source: x}",
        "a.yaml:18:22: train.source: there is no field 'source' here   [unknown-field]  | known here: tokens,"
        " batch_tokens, optimizer, learning_rate, weight_decay, warmup, grad_clip, seed, precision",
    ),
    (
        "kind: gated_deltanet, heads: 4",
        "kind: gated_deltanet, heads: 4, window: 8",
        "a.yaml:8:47: blocks.linear.mixer.window: there is no field 'window' here   [unknown-field]  | window is a"
        " field of attention, liger, local_linear_attention, mla; known here: kind, heads, head_dim, value_heads, value_dim,"
        " short_conv,"
        " negative_eigenvalues, norm_eps",
    ),
    # Kinds.
    (
        "gated_deltanet",
        "gated_delta_net",
        "a.yaml:8:21: blocks.linear.mixer.kind: there is no mixer kind 'gated_delta_net'   [unknown-kind]"
        "  | did you mean gated_deltanet?",
    ),
    (
        "kind: gelu",
        "kind: mlp",
        "a.yaml:14:23: blocks.full.channel.kind: there is no channel kind 'mlp'   [unknown-kind]"
        f"  | known here: {', '.join(CHANNELS)}",
    ),
    (
        "        kind: attention\n",
        "",
        "a.yaml:11:7: blocks.full.mixer.kind: 'kind' is missing   [missing-field]"
        f"  | one of {', '.join(MIXERS)}",
    ),
    (
        "{kind: gelu}",
        "gelu",
        "a.yaml:14:16: blocks.full.channel: expected a mapping, got 'gelu'   [wrong-type]  | {kind: gelu, …}",
    ),
    # What is missing.
    (
        "  hidden_size: 256\n",
        "",
        "a.yaml:3:1: hidden_size: 'hidden_size' is missing   [missing-field]"
        "  | hidden_size: width of the residual stream, in features.",
    ),
    (
        "        heads: 4\n",
        "",
        "a.yaml:11:7: blocks.full.mixer.heads: 'heads' is missing   [missing-field]"
        "  | heads: query heads (a count).",
    ),
    (
        "      channel: {kind: gelu}\n",
        "",
        "a.yaml:10:5: blocks.full.channel: 'channel' is missing   [missing-field]"
        "  | channel: what mixes features; `kind` says which.",
    ),
    ("name: good\n", "", "a.yaml:1:1: name: 'name' is missing   [missing-field]  | name: "),
    # Types.
    (
        "vocab_size: 256",
        "vocab_size: 256.0",
        "a.yaml:4:15: vocab_size: expected a whole number, got 256.0   [wrong-type]",
    ),
    (
        "vocab_size: 256",
        "vocab_size: '256'",
        "a.yaml:4:15: vocab_size: expected a whole number, got '256'   [wrong-type]"
        "  | a plain number, without quotes or units",
    ),
    (
        "vocab_size: 256",
        "vocab_size:",
        "a.yaml:4:3: vocab_size: expected a whole number, got null   [wrong-type]",
    ),
    (
        "heads: 4\n",
        "heads: 4\n        gate: yes\n",
        "a.yaml:14:15: blocks.full.mixer.gate: expected true or false, got 'yes'   [wrong-type]  | true",
    ),
    (
        "heads: 4\n",
        "heads: true\n",
        "a.yaml:13:16: blocks.full.mixer.heads: expected a whole number, got true   [wrong-type]",
    ),
    ("name: good", "name: [a]", "a.yaml:2:7: name: expected a text, got a list   [wrong-type]"),
    ("{tokens: 20M}", "7", "a.yaml:18:8: train: expected a mapping, got 7   [wrong-type]"),
    (
        "tokens: 20M",
        "tokens: 20 MB",
        "a.yaml:18:17: train.tokens: expected a whole number such as 4096, 400k, 20M or 1.5B   [wrong-type]",
    ),
    (
        "tokens: 20M",
        "tokens: 0.5",
        "a.yaml:18:17: train.tokens: expected a whole number, got 0.5   [wrong-type]",
    ),
    (
        "tokens: 20M",
        "tokens: 0.0001k",
        "a.yaml:18:17: train.tokens: 0.0001k is not a whole number   [wrong-type]",
    ),
    ("[linear, full]", "linear", "a.yaml:15:11: layers: expected a list, got 'linear'   [wrong-type]"),
    # Ranges.
    (
        "vocab_size: 256",
        "vocab_size: 5000000",
        "a.yaml:4:15: vocab_size: 5000000 is not at most 4,194,304   [out-of-range]",
    ),
    (
        "tokens: 20M",
        "learning_rate: 0",
        "a.yaml:18:24: train.learning_rate: 0 is not above 0   [out-of-range]",
    ),
    (
        "tokens: 20M",
        "precision: fp32",
        "a.yaml:18:20: train.precision: 'fp32' is not one of auto, float32, bfloat16   [out-of-range]",
    ),
    (
        "tokens: 20M",
        "precision: bfloat",
        "a.yaml:18:20: train.precision: 'bfloat' is not one of auto, float32, bfloat16   [out-of-range]"
        "  | did you mean bfloat16?",
    ),
    (
        "name: good",
        "name: ../good",
        "a.yaml:2:7: name: '../good' is not a name   [out-of-range]  | letters, digits, '.', '_' and '-', at most 64",
    ),
    ("[linear, full]", "[]", "a.yaml:15:11: layers: is empty   [out-of-range]"),
    (
        "[linear, full]",
        "[{repeat: 4096, pattern: [linear, full]}]",
        "a.yaml:15:11: layers: 8,192 layers; at most 4,096   [out-of-range]",
    ),
    # Sizes that must fit.
    (
        "heads: 4\n",
        "heads: 4\n        kv_heads: 3\n",
        "a.yaml:14:19: blocks.full.mixer.kv_heads: 3 does not divide heads 4   [dims-not-divisible]  | 2 or 4 do",
    ),
    (
        "heads: 4}",
        "heads: 4, value_heads: 6}",
        "a.yaml:8:60: blocks.linear.mixer.value_heads: 6 is not a multiple of heads 4   [dims-not-divisible]"
        "  | 4 or 8 are",
    ),
    (
        "heads: 4\n",
        "heads: 4\n        rope: {fraction: 0.27}\n",
        "a.yaml:14:26: blocks.full.mixer.rope.fraction: 0.27 of head_dim 64 is 17 dimensions, and RoPE turns pairs"
        "   [dims-not-divisible]  | an even number of dimensions of at least 2, or rope: null",
    ),
    (
        "heads: 4\n",
        "heads: 4\n        head_dim: 7\n",
        "a.yaml:14:19: blocks.full.mixer.head_dim: head_dim is 7, and RoPE turns pairs of dimensions"
        "   [dims-not-divisible]  | an even head_dim, or rope: null",
    ),
    (
        "{kind: gelu}",
        "{kind: gelu, ratio: 2.0, width: 8}",
        "a.yaml:14:36: blocks.full.channel.ratio: ratio and width are both given, and each sets the width"
        "   [conflicting-fields]  | leave one of them out",
    ),
    # Names of blocks.
    (
        "[linear, full]",
        "[linear, ful]",
        "a.yaml:15:20: layers.1: there is no block 'ful'   [unknown-block]  | did you mean full?",
    ),
    (
        "[linear, full]",
        "[full, {repeat: 2, pattern: [full, x]}]",
        "a.yaml:15:46: layers.1.pattern.1: there is no block 'x'   [unknown-block]  | the blocks are linear, full",
    ),
    (
        "    full:",
        "    fu ll:",
        "a.yaml:10:5: blocks.fu ll: 'fu ll' is not a block's name   [out-of-range]"
        "  | letters, digits, '_' and '-', at most 64; a letter or '_' first",
    ),
    (
        "    full:",
        "    int:",
        "a.yaml:10:5: blocks.int: int is a word of the language, not a block's name   [out-of-range]"
        "  | give the block another name",
    ),
    # Between the parts.
    (
        "vocab_size: 256",
        "vocab_size: 100",
        "a.yaml:4:15: vocab_size: 100 is too small for the bytes tokenizer, which has 256 tokens   [tokenizer-mismatch]"
        "  | vocab_size: 256",
    ),
    # Space forms.
    (
        "tokens: 20M",
        "learning_rate: {float: [1.0e-4, 1.0e-2]}",
        "a.yaml:18:24: train.learning_rate: a value may be left open (float) inside model only   [bad-space]"
        "  | write a number",
    ),
    (
        "heads: 4\n",
        "heads: {choise: [2, 4]}\n",
        "a.yaml:13:16: blocks.full.mixer.heads: expected a whole number, got a mapping   [wrong-type]"
        "  | did you mean choice?",
    ),
    (
        "heads: 4\n",
        "heads: {int: [4]}\n",
        "a.yaml:13:22: blocks.full.mixer.heads.int: int is [low, high], two whole numbers   [bad-space]"
        "  | {int: [1, 8]}",
    ),
    (
        "heads: 4\n",
        "heads: {int: [8, 4]}\n",
        "a.yaml:13:22: blocks.full.mixer.heads.int: low 8 is above high 4   [bad-space]  | [4, 8]",
    ),
    (
        "heads: 4\n",
        "heads: {int: [4, 8], stp: 2}\n",
        "a.yaml:13:30: blocks.full.mixer.heads.stp: there is no field 'stp' in {int: …}   [unknown-field]"
        "  | did you mean step?",
    ),
    (
        "heads: 4\n",
        "heads: {choice: [4, 8, 4]}\n",
        "a.yaml:13:32: blocks.full.mixer.heads.choice.2: option 3 repeats option 1   [bad-space]  | remove one",
    ),
    (
        "heads: 4\n",
        "heads: {choice: []}\n",
        "a.yaml:13:25: blocks.full.mixer.heads.choice: a choice is a list of options, got a list   [bad-space]"
        "  | {choice: [1, 2]}",
    ),
]


@pytest.mark.parametrize(
    ("old", "new", "expected"), ONE, ids=[new.strip() or f"no {old.strip()}" for old, new, _ in ONE]
)
def test_one_mistake_is_told_once_and_in_these_words(old: str, new: str, expected: str) -> None:
    assert old in GOOD
    found = heads(GOOD.replace(old, new, 1))
    if expected.endswith("name: "):
        found = [one[: len(expected)] for one in found]
    # A block that is renamed or replaced is missed where it was used.
    assert [
        one for one in found if not one.startswith("a.yaml:15:20: layers.1: there is no block 'full'")
    ] == [expected]


SEARCH_MISTAKES: list[tuple[str, str, str]] = [
    (
        "[text]",
        "[txt]",
        "a.yaml:20:11: search.tasks.0: there is no task 'txt'   [unknown-kind]  | did you mean text?",
    ),
    (
        "[text]",
        "[{mqar: {pairs: 20, length: 64}}]",
        "a.yaml:20:26: search.tasks.0.mqar.pairs: 20 pairs need 80 tokens, and length is 64   [out-of-range]"
        "  | length: 80, or pairs: 16",
    ),
    (
        "[text]",
        "[{mqar: {pairs: 200, length: 800}}]",
        "a.yaml:4:15: vocab_size: 256 is too small for mqar with 200 pairs, which needs 402 tokens   [out-of-range]"
        "  | vocab_size: 402, or fewer pairs",
    ),
    (
        "[text]",
        "[{word_problem: {group: A5, moves: swaps}}]",
        "a.yaml:20:45: search.tasks.0.word_problem.moves: no element of A5 swaps two and leaves the rest   [out-of-range]"
        "  | moves: all, or group: S5",
    ),
    (
        "[text]",
        "[{memorization: {keys: 200, values: 60}}]",
        "a.yaml:4:15: vocab_size: 256 is too small for memorization, which needs 261 tokens   [out-of-range]"
        "  | vocab_size: 261, or fewer keys or values",
    ),
    (
        "[text]",
        "[{mqar: {pairs: 8, length: 32, overwritten: 3}}]",
        "a.yaml:20:26: search.tasks.0.mqar.pairs: 8 pairs and 3 told again need 38 tokens, and length is 32   [out-of-range]"
        "  | length: 38, or pairs: 6",
    ),
    (
        "[text]",
        "[{parity: {length: 16, test_lengths: [64, 16]}}]",
        "a.yaml:20:47: search.tasks.0.parity.test_lengths: they rise, and none is the length that is trained, 16"
        "   [out-of-range]  | test_lengths: [64]",
    ),
    (
        "[text]",
        "[{mqar: {pair: 4}}]",
        "a.yaml:20:19: search.tasks.0.mqar.pair: there is no field 'pair' here   [unknown-field]  | did you mean pairs?",
    ),
    (
        "[text]",
        "[{kind: mqar, pairs: 4}]",
        "a.yaml:20:11: search.tasks.0: a task is written mqar, or {mqar: {pairs: 8}}; this is a mapping of 2"
        "   [wrong-type]",
    ),
    (
        "at_most: 0.5",
        "at_most: 0.5, relative_to: full",
        "a.yaml:21:53: search.budgets.0.decode_ms.relative_to: 'full' names no model; it is all-, then a block, or a spec file"
        "   [unknown-block]  | did you mean all-full?",
    ),
    (
        "decode_ms",
        "decode",
        "a.yaml:21:14: search.budgets.0.decode: there is no budget 'decode'   [unknown-kind]"
        "  | did you mean decode_ms?",
    ),
    (
        ", context: 64",
        "",
        "a.yaml:21:14: search.budgets.0.decode_ms.context: 'context' is missing   [missing-field]"
        "  | context: tokens of a sequence: a count, or {cpu: …, cuda: …}.",
    ),
    (
        "context: 64",
        "context: {cpu: 64, gpu: 64}",
        "a.yaml:21:59: search.budgets.0.decode_ms.context.gpu: there is no field 'gpu' here   [unknown-field]"
        "  | did you mean cpu?",
    ),
    (
        "tasks: [text]",
        "tasks: [text]\n  time: 5 minutes",
        "a.yaml:21:9: search.time: expected seconds, or a duration such as 90s, 5m, 2h or 1d   [wrong-type]",
    ),
    (
        PLACEMENT,
        "[linear, full]",
        "a.yaml:19:1: search: there is nothing to search: the model leaves nothing open   [bad-space]"
        "  | put a choice, int, float or placement inside model; heddle train takes a plain model",
    ),
    # Placements.
    (
        "of: [linear, full]",
        "of: [linear, fill]",
        "a.yaml:15:48: layers.placement.of.1: there is no block 'fill'   [unknown-block]  | did you mean full?",
    ),
    (
        "{full: {int: [1, 2]}}",
        "{fall: {int: [1, 2]}}",
        "a.yaml:15:63: layers.placement.count.fall: 'fall' is not in `of`   [bad-placement]  | did you mean full?",
    ),
    (
        "{full: {int: [1, 2]}}",
        "{full: 1, linear: 3}",
        "a.yaml:15:62: layers.placement.count: one block of `of` has no count and takes the rest, but every block of"
        " it has one   [bad-placement]",
    ),
    (
        ", count: {full: {int: [1, 2]}}",
        "",
        "a.yaml:15:39: layers.placement.of: one block of `of` has no count and takes the rest, but linear, full have"
        " none   [bad-placement]",
    ),
    (
        "int: [1, 2]",
        "int: [1, 5]",
        "a.yaml:15:69: layers.placement.count.full: 'full' may stand 5 times, and there are 4 layers   [bad-placement]",
    ),
    (
        "int: [1, 2]",
        "float: [1, 2]",
        "a.yaml:15:69: layers.placement.count.full: a count is a whole number of at least 0, or a range of them"
        "   [bad-placement]  | 2, or {int: [1, 4]}",
    ),
    (
        "length: 4",
        "length: {int: [4, 8]}",
        "a.yaml:15:32: layers.placement.length: length is a whole number from 1 to 4,096, got a mapping"
        "   [bad-placement]  | search each depth by a file of its own",
    ),
    (
        "length: 4, ",
        "lenght: 4, ",
        "a.yaml:15:24: layers.placement.lenght: there is no field 'lenght' in a placement   [unknown-field]"
        "  | did you mean length?",
    ),
]


@pytest.mark.parametrize(
    ("old", "new", "expected"), SEARCH_MISTAKES, ids=[new or f"no {old}" for old, new, _ in SEARCH_MISTAKES]
)
def test_a_mistake_of_a_search_is_told_in_these_words(old: str, new: str, expected: str) -> None:
    assert old in SEARCHABLE
    # A misspelled field is also missed, and a block that is nowhere placed is no error.
    found = [
        one
        for one in heads(SEARCHABLE.replace(old, new, 1))
        if "is missing" not in one or "is missing" in expected
    ]
    assert found == [expected]


def test_all_errors_are_told_in_one_go_from_top_to_bottom() -> None:
    text = SEARCHABLE
    for old, new in (
        ("name: good", "name: g/ood"),
        ("vocab_size: 256", "vocab_size: x"),
        ("heads: 4}", "heads: 3}"),
        ("{kind: gelu}", "{kind: gelu, ratio: -1}"),
        ("of: [linear, full]", "of: [linear, fuII]"),
        ("20M", "20X"),
        ("[text]", "[text, {mqar: {pairs: 9, length: 32}}]"),
        ("at_most: 0.5", "at_most: 0.5, relative_to: all-ful"),
    ):
        assert old in text
        text = text.replace(old, new, 1)
    with pytest.raises(HeddleErrors) as errors:
        loads(text)
    assert [(error.where.line, error.code) for error in errors.value.errors] == [
        (2, "out-of-range"),
        (4, "wrong-type"),
        (8, "dims-not-divisible"),
        (14, "out-of-range"),
        (15, "unknown-block"),
        (18, "wrong-type"),
        (20, "out-of-range"),
        (21, "unknown-block"),
    ]


def test_every_option_of_a_choice_is_checked_and_told_at_its_line() -> None:
    text = GOOD.replace(
        """\
      mixer:
        kind: attention
        heads: 4
""",
        """\
      mixer:
        choice:
          - {kind: attention, heads: 4}
          - {kind: attention, heads: 4, windw: 8}
          - {kind: attention, heads: 5}
          - kind: gated_deltanet
            heads: 4
            short_conv: {choice: [4, 1]}
          - {kind: decay_attention, heads: 4, form: {choice: [lightning, retnett]}}
          - {kind: attention, heads: {choice: [2, 7]}, window: {int: [1, 64]}}
          - {kind: attention, heads: 4, window: {int: [0, 64]}}
""",
    )
    assert heads(text) == [
        "a.yaml:14:41: blocks.full.mixer.choice.1.windw: there is no field 'windw' here   [unknown-field]"
        "  | did you mean window?",
        "a.yaml:15:38: blocks.full.mixer.choice.2.heads: 5 does not divide hidden_size 256   [dims-not-divisible]"
        "  | 4 or 8 do; or set head_dim",
        "a.yaml:18:38: blocks.full.mixer.choice.3.short_conv.choice.1: 1 is not at least 2   [out-of-range]",
        "a.yaml:19:74: blocks.full.mixer.choice.4.form.choice.1: 'retnett' is not one of lightning, retnet"
        "   [out-of-range]  | did you mean retnet?",
        "a.yaml:20:51: blocks.full.mixer.choice.5.heads.choice.1: 7 does not divide hidden_size 256"
        "   [dims-not-divisible]  | 4 or 8 do; or set head_dim",
        "a.yaml:21:56: blocks.full.mixer.choice.6.window.int.0: 0 is not at least 1   [out-of-range]",
    ]


def test_a_misspelled_field_that_is_left_open_is_told_once() -> None:
    text = GOOD.replace(
        "        heads: 4\n      channel: {kind: gelu}",
        "        heads: 4\n        windw: {int: [8, 64]}\n        gates: {choice: [null, sigmoid, tanh]}\n"
        "      channel: {kind: gelu, ratoi: {float: [1.0, 4.0]}}",
    )
    assert [one.partition("  | known")[0] for one in heads(text)] == [
        "a.yaml:14:9: blocks.full.mixer.windw: there is no field 'windw' here   [unknown-field]"
        "  | did you mean window?",
        "a.yaml:15:9: blocks.full.mixer.gates: there is no field 'gates' here   [unknown-field]"
        "  | did you mean gate?",
        "a.yaml:16:29: blocks.full.channel.ratoi: there is no field 'ratoi' here   [unknown-field]"
        "  | did you mean ratio?",
    ]


def test_a_mistake_that_two_options_make_is_told_at_both() -> None:
    text = GOOD.replace(
        """\
      mixer:
        kind: attention
        heads: 4
""",
        """\
      mixer:
        choice:
          - {kind: attention, heads: 5}
          - {kind: gated_deltanet, heads: 5}
          - {kind: attention, heads: 4}
""",
    )
    assert heads(text) == [
        f"a.yaml:{line}:{column}: blocks.full.mixer.choice.{index}.heads: 5 does not divide hidden_size 256"
        "   [dims-not-divisible]  | 4 or 8 do; or set head_dim"
        for index, (line, column) in enumerate([(13, 38), (14, 43)])
    ]


def test_an_option_is_told_where_it_stands_when_another_field_suffers() -> None:
    text = GOOD.replace(
        "heads: 4\n", "heads: 4\n        head_dim: {choice: [64, 20]}\n        rope: {fraction: 0.25}\n"
    )
    assert heads(text) == [
        "a.yaml:14:33: blocks.full.mixer.head_dim.choice.1: with this option mixer.rope.fraction: 0.25 of head_dim 20"
        " is 5 dimensions, and RoPE turns pairs   [dims-not-divisible]"
        "  | an even number of dimensions of at least 2, or rope: null"
    ]


def test_an_option_that_fits_some_other_choice_is_let_through() -> None:
    text = GOOD.replace("hidden_size: 256", "hidden_size: {choice: [256, 96]}").replace(
        "heads: 4\n", "heads: {choice: [4, 3]}\n"
    )
    assert loads(text).space.size() == 4
    assert heads(text.replace("[4, 3]", "[4, 5]")) == [
        "a.yaml:13:29: blocks.full.mixer.heads.choice.1: 5 does not divide hidden_size 256   [dims-not-divisible]"
        "  | 4 or 8 do; or set head_dim"
    ]


def test_a_hidden_size_that_no_setting_fits_is_told_at_its_option() -> None:
    text = GOOD.replace("hidden_size: 256", "hidden_size: {choice: [256, 90]}")
    assert [one.split("   [")[0] for one in heads(text)] == [
        "a.yaml:5:31: hidden_size.choice.1: blocks.linear.mixer.heads: 4 does not divide hidden_size 90",
        "a.yaml:5:31: hidden_size.choice.1: blocks.full.mixer.heads: 4 does not divide hidden_size 90",
    ]


def test_the_ends_of_a_range_are_checked() -> None:
    assert heads(GOOD.replace("heads: 4\n", "heads: {int: [4, 5000]}\n")) == [
        "a.yaml:13:26: blocks.full.mixer.heads.int.1: 5000 is not at most 4,096   [out-of-range]"
    ]
    assert heads(GOOD.replace("vocab_size: 256", "vocab_size: {choice: [256, 128]}")) == [
        "a.yaml:4:30: vocab_size.choice.1: 128 is too small for the bytes tokenizer, which has 256 tokens"
        "   [tokenizer-mismatch]  | vocab_size: 256"
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "",
            "a.yaml:1:1: a spec is a mapping, and the file is empty   [wrong-type]  | heddle init writes one",
        ),
        (
            "- a",
            "a.yaml:1:1: a spec is a mapping, and this is a list   [wrong-type]  | heddle init writes one",
        ),
        (".inf", "a.yaml:1:1: .inf is not a finite number   [out-of-range]"),
    ],
)
def test_what_is_no_mapping_is_told_that_and_no_more(text: str, expected: str) -> None:
    assert heads(text) == [expected]


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("", "a.yaml:1:1: version: 'version' is missing   [missing-field]  | begin the file with version: 1"),
        (
            "version: 2\n",
            "a.yaml:1:10: version: version 2 is newer than this heddle; this heddle reads version 1"
            "   [version-not-supported]  | pip install --upgrade heddle-lm, or version: 1",
        ),
        (
            "version: 0\n",
            "a.yaml:1:10: version: version 0 is not known; this heddle reads version 1   [version-not-supported]"
            "  | version: 1",
        ),
        (
            "version: '1'\n",
            "a.yaml:1:10: version: version '1' is not known; this heddle reads version 1   [version-not-supported]"
            "  | version: 1",
        ),
        (
            "version: true\n",
            "a.yaml:1:10: version: version true is not known; this heddle reads version 1   [version-not-supported]"
            "  | version: 1",
        ),
        ("version: .nan\n", "a.yaml:1:10: version: .nan is not a finite number   [out-of-range]"),
    ],
)
def test_an_unknown_version_hides_no_other_error(version: str, expected: str) -> None:
    text = GOOD.replace("version: 1\n", version).replace("[linear, full]", "[linear, ful]")
    line = 15 if version else 14
    other = f"a.yaml:{line}:20: layers.1: there is no block 'ful'   [unknown-block]  | did you mean full?"
    assert heads(text) == [expected, other]


def test_a_key_that_stands_twice_and_an_impossible_number_hide_no_other_error() -> None:
    text = GOOD.replace("name: good", "name: good\nname: g/ood").replace("heads: 4\n", "heads: .inf\n")
    text = text.replace("tokens: 20M", "tokens: 123456789012345678901234").replace(
        "[linear, full]", "[linear, ful]"
    )
    assert heads(text) == [
        "a.yaml:3:1: name: 'name' stands here twice, first in line 2   [duplicate-key]",
        "a.yaml:14:16: blocks.full.mixer.heads: .inf is not a finite number   [out-of-range]",
        "a.yaml:16:20: layers.1: there is no block 'ful'   [unknown-block]  | did you mean full?",
        "a.yaml:19:17: train.tokens: a number of 24 digits   [out-of-range]",
    ]


HOLES = [
    ("[linear, full]", "[linear, .inf]", "layers.1"),
    ("[linear, full]", "{placement: .nan}", "layers.placement"),
    (
        "[linear, full]",
        "{placement: {length: .nan, of: [linear, full], count: {full: 1}}}",
        "layers.placement.length",
    ),
    (
        "[linear, full]",
        "{placement: {length: 4, of: [linear, .nan], count: {full: 1}}}",
        "layers.placement.of.1",
    ),
    ("[linear, full]", "{placement: {length: 4, of: [linear, full], count: .nan}}", "layers.placement.count"),
    (
        "[linear, full]",
        "{placement: {length: 4, of: [linear, full], count: {full: .nan}}}",
        "layers.placement.count.full",
    ),
    ("hidden_size: 256", "hidden_size: {choice: [256, .inf]}", "hidden_size.choice.1"),
    ("hidden_size: 256", "hidden_size: {int: [256, .inf]}", "hidden_size.int.1"),
    ("hidden_size: 256", "hidden_size: {int: [256, 512], step: .inf}", "hidden_size.step"),
    ("hidden_size: 256", "hidden_size: {int: [256, 512], log: .inf}", "hidden_size.log"),
    ("hidden_size: 256", "hidden_size: {choice: .inf}", "hidden_size.choice"),
    ("train: {tokens: 20M}", "search: {tasks: [text, .inf], trials: 1}", "search.tasks.1"),
    ("train: {tokens: 20M}", "search: {tasks: [text, mqar: .inf], trials: 1}", "search.tasks.1.mqar"),
]


@pytest.mark.parametrize(("old", "new", "path"), HOLES, ids=[new for _, new, _ in HOLES])
def test_an_impossible_number_is_told_once_wherever_it_stands(old: str, new: str, path: str) -> None:
    with pytest.raises(HeddleErrors) as errors:
        loads(GOOD.replace(old, new), file="a.yaml")
    assert [(error.code, error.where.path) for error in errors.value.errors] == [("out-of-range", path)]


def test_an_unused_block_is_a_warning() -> None:
    file = loads(GOOD.replace("[linear, full]", "[full]"), file="a.yaml")
    assert [str(warning) for warning in file.warnings] == [
        "a.yaml:7:5: blocks.linear: no layer uses the block 'linear'   [unused-block]\n"
        "    7 |     linear:\n"
        "      |     ^\n"
        "  hint: remove it, or use it"
    ]
    assert loads(SEARCHABLE).warnings == ()
    assert loads(GOOD.replace("[linear, full]", "[{choice: [linear, full]}]")).warnings == ()
    twin = "    twin: {mixer: {kind: attention, heads: 4}, channel: {kind: none}}\n    full:"
    kept = GOOD.replace("[linear, full]", "[{choice: [full, twin]}]").replace("    full:", twin)
    assert [one.where.path for one in loads(kept).warnings] == ["blocks.linear"]
    budget = SEARCH.replace("at_most", "relative_to: all-linear, at_most")
    assert loads(kept + budget).warnings == ()


TTT = "{kind: ttt, heads: 4, normalise: before}"
NEAR = "{kind: attention, heads: 4, window: 8}"


def mixed(mixer: str, layers: str = "[full]") -> str:
    return f"""\
version: 1
name: mixed
model:
  vocab_size: 256
  hidden_size: 32
  blocks:
    full: {{mixer: {NEAR}, channel: {{kind: none}}}}
    fast: {{mixer: {mixer}, channel: {{kind: none}}}}
  layers: {layers}
"""


def test_writes_of_an_mlp_that_no_norm_follows_are_a_warning() -> None:
    assert [
        str(one) for one in loads(mixed(TTT, "[fast]"), file="a.yaml").warnings if one.code == "runs-away"
    ] == [
        "a.yaml:8:52: blocks.fast.mixer.normalise: writes of an mlp with normalise: before may run away until outputs are no "
        "numbers, in every dtype   [runs-away]\n"
        "    8 |     fast: {mixer: {kind: ttt, heads: 4, normalise: before}, channel: {kind: none}}\n"
        "      |                                                    ^\n"
        "  hint: normalise: after, or memory: linear with loss: dot"
    ]


@pytest.mark.parametrize(
    ("mixer", "layers", "paths"),
    [
        (TTT, "[full, fast]", ["blocks.fast.mixer.normalise"]),
        (TTT.replace("before", "none"), "[full, fast]", ["blocks.fast.mixer.normalise"]),
        (TTT.replace("before", "after"), "[full, fast]", []),
        ("{kind: ttt, heads: 4}", "[full, fast]", []),
        (TTT.replace("heads", "memory: linear, heads"), "[full, fast]", []),
        # Inside another mixer, and as the first of what is open; of a block that no layer uses nothing is said but that.
        (f"{{kind: parallel, mixers: [{NEAR}, {TTT}]}}", "[full, fast]", ["blocks.fast.mixer.mixers.1.normalise"]),
        (f"{{choice: [{TTT}, {NEAR}]}}", "[full, fast]", ["blocks.fast.mixer.choice.0.normalise"]),
        (TTT.replace("before", "{choice: [none, after]}"), "[full, fast]", ["blocks.fast.mixer.normalise.choice.0"]),
        (TTT, "[full]", []),
    ],
)  # fmt: skip
def test_what_may_run_away_is_told_where_it_stands(mixer: str, layers: str, paths: list[str]) -> None:
    warnings = loads(mixed(mixer, layers)).warnings
    assert [one.where.path for one in warnings if one.code == "runs-away"] == paths
    assert all(one.where.line == 8 for one in warnings)


def test_hundreds_of_errors_are_told_as_the_first_hundred() -> None:
    text = GOOD + "".join(f"field{number}: 1\n" for number in range(3000))
    assert len(heads(text)) == 100


def test_a_name_that_is_in_neither_part_of_a_list_is_told_both() -> None:
    text = """\
version: 1
name: fits
model:
  vocab_size: 256
  hidden_size: 16
  blocks: {full: {mixer: {kind: attention, heads: {choice: [1, 2]}}, channel: {kind: swiglu}}}
  layers: [full]
search: {tasks: [text], export: {must_fit: [qwen4]}}
"""
    with pytest.raises(HeddleErrors, match=r"'qwen4' is not one of llama, qwen3, .*, vllm, sglang") as caught:
        loads(text)
    assert caught.value.hint == "did you mean qwen3?"


def test_a_step_of_null_is_refused_as_by_the_schema() -> None:
    text = """\
version: 1
name: steps
model:
  vocab_size: 256
  hidden_size: {int: [16, 32], step: null}
  blocks: {full: {mixer: {kind: attention, heads: 1}, channel: {kind: swiglu}}}
  layers: [full]
"""
    with pytest.raises(HeddleErrors, match="step is a whole number of at least 1, got null"):
        loads(text)
