"""What layers take from each other where values are open: each option is checked, and placements keep the order."""

from __future__ import annotations

import time

import pytest

from heddle import api
from heddle.compose.plan import plan
from heddle.errors import HeddleError, HeddleErrors
from heddle.specs import SpecFile, expand_layers, loads
from heddle.specs.order import Order, order_of

TEXT = """\
version: 1
name: takes
model:
  vocab_size: 256
  hidden_size: 64
  blocks:
    full: {mixer: {kind: attention, heads: 4, kv_heads: 2}, channel: {kind: none}}
    taker: {mixer: {kind: attention, heads: 4, kv_heads: 2, keys_from: full}, channel: {kind: none}}
    linear: {mixer: {kind: gated_deltanet, heads: 2}, channel: {kind: gelu}}
  layers: [full, linear, taker]
search: {tasks: [text]}
"""


def written(*changes: tuple[str, str]) -> str:
    text = TEXT
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    return text


def refused(*changes: tuple[str, str]) -> list[HeddleError]:
    with pytest.raises(HeddleErrors) as told:
        loads(written(*changes), file="a.yaml")
    return list(told.value.errors)


def at_text(error: HeddleError) -> str:
    """What stands in the file from the place of the error on."""
    assert error.where.line is not None
    assert error.where.column is not None
    return (error.where.text or "")[error.where.column - 1 :]


FULL, TAKER = "heads: 4, kv_heads: 2}", "heads: 4, kv_heads: 2, keys_from: full}"
KEYS = "the keys of full are 2 x 16 a token, and 4 x 16 are needed"
OPTIONS = [
    # Of the taker: a size, a source, a rotation, the mixer as a whole.
    (TAKER, "heads: 4, kv_heads: {choice: [2, 4]}, keys_from: full}", "4]}, keys", KEYS),
    (
        TAKER,
        "heads: 4, kv_heads: 2, keys_from: {choice: [full, linear]}}",
        "linear]}",
        "which has no keys to hand on",
    ),
    (TAKER, "heads: 4, kv_heads: 2, keys_from: {choice: [full, taker]}}", "taker]}", "stands before none"),
    (TAKER, "heads: 4, kv_heads: 2, keys_from: {choice: [full, fool]}}", "fool]}", "called 'fool'"),
    (
        TAKER,
        "heads: 4, kv_heads: 2, keys_from: full, rope: {theta: {float: [1.0e+4, 1.0e+5]}}}",
        "1.0e+5]",
        "turned otherwise",
    ),
    (
        "{kind: attention, heads: 4, kv_heads: 2, keys_from: full}",
        "{choice: [{kind: gated_deltanet, heads: 2}, {kind: attention, heads: 4, keys_from: full}]}",
        "full}]}",
        KEYS,
    ),
    # Of the source: what it offers no longer fits.
    (
        FULL,
        "heads: 4, kv_heads: {choice: [2, 4]}}",
        "4]}}",
        "the keys of full are 4 x 16 a token, and 2 x 16",
    ),
    (FULL, "heads: 4, kv_heads: 2, window: {choice: [null, 8]}}", "8]}", "keeps a window of 8"),
    (
        "{kind: attention, heads: 4, kv_heads: 2}",
        "{choice: [{kind: attention, heads: 4, kv_heads: 2}, {kind: gated_deltanet, heads: 2}]}",
        "{kind: gated_deltanet, heads: 2}]}, ch",
        "with this option blocks.taker.mixer.keys_from: full is gated_deltanet, which has no keys",
    ),
    # Of the layers: another order, an override.
    ("[full, linear, taker]", "[{choice: [full, linear]}, linear, taker]", "linear]}, lin", "called 'full'"),
    (
        "[full, linear, taker]",
        "[full, {block: taker, override: {mixer: {kv_heads: {choice: [2, 4]}}}}]",
        "4]}}}}]",
        KEYS,
    ),
]


@pytest.mark.parametrize(("old", "new", "place", "what"), OPTIONS)
def test_an_option_that_breaks_a_reference_is_told_at_its_place(
    old: str, new: str, place: str, what: str
) -> None:
    (error,) = refused((old, new))
    assert what in error.what
    assert at_text(error).startswith(place)


def test_both_ends_of_a_range_are_tried() -> None:
    narrow = (FULL, "heads: 4, kv_heads: 2, window: 32}")
    (error,) = refused(narrow, (TAKER, "heads: 4, kv_heads: 2, keys_from: full, window: {int: [4, 64]}}"))
    assert (error.code, error.what) == (
        "reference-mismatch",
        "with this option blocks.taker.mixer.keys_from: full keeps a window of 32, and 64 are to be seen",
    )
    assert at_text(error).startswith("64]")
    # One that is open with its option alone has its low end tried, too.
    mixer = "{kind: attention, heads: 4, kv_heads: 2, keys_from: full, window: {int: [40, 64]}}"
    errors = refused(
        narrow,
        (
            "taker: {mixer: {kind: attention, heads: 4, kv_heads: 2, keys_from: full}",
            f"taker: {{mixer: {{choice: [{{kind: gated_deltanet, heads: 2}}, {mixer}]}}",
        ),
    )
    assert {at_text(one)[:3] for one in errors} >= {"40,", "64]"}


def test_what_fits_at_another_setting_of_what_it_takes_from_is_let_through() -> None:
    both = [(FULL, "heads: 4, kv_heads: {choice: [2, 4]}}")]
    both += [(TAKER, "heads: 4, kv_heads: {choice: [2, 4]}, keys_from: full}")]
    file = loads(written(*both))
    plan(file.spec.model)
    with pytest.raises(HeddleErrors):
        plan(file.resolve({"blocks.full.mixer.kv_heads": 4}).model)
    # An option that fits neither is told still, and at its own place.
    both[1] = (both[1][0], both[1][1].replace("[2, 4]", "[2, 1]"))
    assert [at_text(one)[:2] for one in refused(*both)] == ["4]", "1]"]


def test_what_is_wrong_at_the_defaults_is_told_by_the_plan_alone() -> None:
    text = written((TAKER, "heads: {choice: [4, 8]}, kv_heads: 4, keys_from: full}"))
    with pytest.raises(HeddleErrors) as told:
        plan(loads(text).spec.model)
    assert told.value.code == "reference-mismatch"


def test_many_open_values_are_checked_in_little_time() -> None:
    blocks = "".join(
        f"    b{i}: {{mixer: {{kind: attention, heads: {{choice: [4, 8]}}, kv_heads: {{choice: [2, 4]}}, keys_from: full,"
        f" window: {{int: [4, 64]}}}}, channel: {{kind: {{choice: [gelu, swiglu]}}}}}}\n"
        for i in range(30)
    )
    layers = "[full, {repeat: 2, pattern: [" + ", ".join(f"b{i}" for i in range(30)) + "]}]"
    text = written(("  layers: [full, linear, taker]", f"{blocks}  layers: {layers}"))
    began = time.process_time()
    with pytest.raises(HeddleErrors) as told:
        loads(text)
    assert time.process_time() - began < 2
    # Eight heads of 8 and four of the source's 16 never meet, nor do four key heads and two.
    assert {one.code for one in told.value.errors} == {"reference-mismatch"}


# Placements.

PLACED = "{placement: {length: 6, of: [taker, full], count: {full: {int: [1, 3]}}}}"


def placed(layers: str = PLACED, *changes: tuple[str, str]) -> SpecFile:
    return loads(written(("[full, linear, taker]", layers), *changes), file="a.yaml")


def test_the_default_of_a_placement_puts_what_is_taken_from_first() -> None:
    file = placed()
    assert expand_layers(file.spec.model) == ["full", "taker", "taker", "taker", "taker", "taker"]
    plan(file.spec.model)
    for count in (1, 2, 3):
        model = file.resolve({"layers.placement.count.full": count}).model
        assert expand_layers(model).count("full") == count
        plan(model)
    assert file.order() == Order({"taker": frozenset({"full"})})
    # What was written out is left as it is, and refused.
    with pytest.raises(HeddleErrors) as told:
        plan(file.resolve({}, ["taker", "full", "taker", "taker", "taker", "taker"]).model)
    assert told.value.code == "reference-direction"


def test_a_placement_in_which_nothing_can_be_taken_is_refused() -> None:
    nowhere = PLACED.replace("[taker, full]", "[taker, linear]").replace("full:", "linear:")
    with pytest.raises(HeddleErrors) as told:
        plan(placed(nowhere).spec.model)
    assert told.value.code == "unknown-layer"
    # Blocks that take from each other in a circle.
    circle = (
        "{kind: attention, heads: 4, kv_heads: 2}",
        "{kind: attention, heads: 4, kv_heads: 2, values_from: taker}",
    )
    file = placed(PLACED, circle)
    assert expand_layers(file.spec.model) == ["taker", "taker", "taker", "taker", "taker", "full"]
    with pytest.raises(HeddleErrors) as told:
        plan(file.spec.model)
    assert told.value.code == "reference-direction"


def test_a_count_that_leaves_nothing_to_take_from_is_told_at_its_place() -> None:
    some = PLACED.replace("{int: [1, 3]}", "{choice: [1, 0]}")
    with pytest.raises(HeddleErrors) as told:
        placed(some)
    (error,) = told.value.errors
    assert error.code == "unknown-layer"
    assert at_text(error).startswith("0]}")
    # With no layer that takes, nothing is missing.
    placed(
        some.replace("{choice: [1, 0]}", "{choice: [1, 0]}, taker: {choice: [3, 0]}").replace(
            "[taker, full]", "[taker, full, linear]"
        )
    )


def test_a_source_that_another_option_names_is_asked_for_where_that_option_is() -> None:
    file = placed(
        PLACED.replace("[taker, full]", "[taker, full, linear]").replace("count: {", "count: {linear: 1, "),
        (TAKER, "heads: 4, kv_heads: 2, keys_from: {choice: [full, null]}}"),
    )
    name = "blocks.taker.mixer.keys_from"
    assert file.order({name: None}) == Order()
    assert file.placed({name: None}) == ["taker", "taker", "full", "taker", "taker", "linear"]
    assert file.placed() == ["full", "taker", "taker", "taker", "taker", "linear"]


def test_layers_of_a_shared_block_take_from_one_layer_in_every_order_that_is_kept() -> None:
    shared = (
        "keys_from: full}, channel: {kind: none}}",
        "keys_from: full}, channel: {kind: none}, shared: true}",
    )
    file = placed(PLACED.replace("{int: [1, 3]}", "3"), shared)
    order = file.order()
    assert order == Order({"taker": frozenset({"full"})}, {"taker": frozenset({"full"})})
    plan(file.spec.model)
    for layers in (
        ["full", "taker", "full", "taker", "full", "taker"],
        ["taker", *["full"] * 3, *["taker"] * 2],
    ):
        assert not order.keeps(layers)
        with pytest.raises(HeddleErrors):
            plan(file.resolve({}, layers).model)
        mended = order.mended(layers)
        assert sorted(mended) == sorted(layers)
        assert order.keeps(mended)
        plan(file.resolve({}, mended).model)


def test_blocks_without_references_may_stand_anywhere() -> None:
    file = placed("{placement: {length: 4, of: [full, linear], count: {full: 2}}}")
    assert order_of(file.spec.model.blocks).after.keys() == {"taker"}
    assert file.order() == Order()
    assert file.order().keeps(["linear", "full", "full", "linear"])
    assert file.placed() == ["linear", "full", "linear", "full"]
    assert loads(TEXT.replace("search: {tasks: [text]}\n", "")).placed() is None


def test_check_accepts_what_a_search_can_build(tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "a.yaml"
    path.write_text(written(("[full, linear, taker]", PLACED)))
    assert api.check(path).placed() == ["full", *["taker"] * 5]
