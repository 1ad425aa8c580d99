"""The picture of a plan: well-formed, self-contained, nothing over anything else, long models folded."""

from __future__ import annotations

import random
import re
from itertools import combinations, pairwise
from typing import Any
from xml.etree import ElementTree

import pytest

from heddle.compose.picture import CARD, CARD_WIDTH, PITCH, svg
from heddle.compose.picture_rows import Arc, Fold, rows_of
from heddle.compose.plan import Plan, plan
from heddle.specs import ModelSpec

SVG = "{http://www.w3.org/2000/svg}"
ATTENTION = {"kind": "attention", "heads": 4}
DELTA = {"kind": "gated_deltanet", "heads": 2}
NESTED = {"kind": "parallel", "mixers": [ATTENTION, {"kind": "parallel", "mixers": [DELTA, ATTENTION]}]}
GLU, NONE = {"kind": "swiglu"}, {"kind": "none"}
BLOCKS: dict[str, Any] = {
    "linear": {"mixer": DELTA, "channel": GLU},
    "full": {"mixer": ATTENTION, "channel": GLU, "shared": True, "skip": {"source": "embedding"}},
    "both": {"mixer": NESTED, "channel": {"kind": "gelu"}, "skip": {"source": "anchor"}},
    "a_long_name_of_a_block_that_does_not_fit_into_its_column": {"mixer": DELTA, "channel": NONE},
    "again": {"mixer": ATTENTION, "channel": NONE, "skip": {"source": "again2"}},
    "again2": {"mixer": ATTENTION, "channel": NONE},
}
FIRST = {"block": "linear", "name": "anchor"}


def planned(*layers: Any) -> Plan:
    used = {name for layer in layers for name in _names(layer)}
    blocks = {name: block for name, block in BLOCKS.items() if name in used}
    return plan(
        ModelSpec.model_validate(
            {"vocab_size": 256, "hidden_size": 64, "blocks": blocks, "layers": list(layers)}
        )
    )


def _names(layer: Any) -> list[str]:
    if isinstance(layer, str):
        return [layer]
    return list(layer["pattern"]) if "pattern" in layer else [layer["block"]]


def mixed(count: int) -> Plan:
    """Layers in no order that would fold."""
    draw = random.Random(count)
    names = [name for name in BLOCKS if not name.startswith("again")]
    return planned(FIRST, *(draw.choice(names) for _ in range(count - 1)))


def boxes_of(tree: ElementTree.Element) -> list[tuple[float, float, float, float]]:
    """Left, top, right and bottom of every box but the ground."""
    found = []
    for one in list(tree.iter(f"{SVG}rect"))[1:]:
        x, y, width, height = (float(one.get(name, "0")) for name in ("x", "y", "width", "height"))
        found.append((x, y, x + width, y + height))
    return found


def cross(one: Any, other: Any) -> bool:
    """Whether two boxes lie over each other, neither inside the other."""
    if one[0] >= other[2] or other[0] >= one[2] or one[1] >= other[3] or other[1] >= one[3]:
        return False
    inside = [
        a[0] <= b[0] and a[1] <= b[1] and a[2] >= b[2] and a[3] >= b[3]
        for a, b in ((one, other), (other, one))
    ]
    return not any(inside)


@pytest.mark.parametrize("count", [1, 24, 60, 61, 300])
def test_nothing_lies_over_anything_else_or_outside(count: int) -> None:
    tree = ElementTree.fromstring(svg(mixed(count)))
    width, height = float(tree.get("width", "0")), float(tree.get("height", "0"))
    boxes = boxes_of(tree)
    assert all(0 <= x < right <= width and 0 <= y < low <= height for x, y, right, low in boxes)
    cards = [box for box in boxes if box[0] == CARD and box[2] == CARD + CARD_WIDTH]
    assert all(low < high for (*_, low), (_, high, *_) in pairwise(cards))
    for card in cards:
        held = [box for box in boxes if box != card and card[1] <= box[1] < card[3]]
        assert not any(cross(card, box) for box in held)
        assert not any(cross(one, other) for one, other in combinations(held, 2))
    for text in tree.iter(f"{SVG}text"):
        x, length = float(text.get("x", "0")), PITCH * len(text.text or "")
        begin = x - length if text.get("text-anchor") == "end" else x
        assert begin >= 0
        assert begin + length <= width, text.text


def test_every_step_and_every_edge_is_drawn() -> None:
    made = mixed(24)
    found = rows_of(made)
    assert [row.label for row in found.rows][:1] == ["embedding"]
    assert [row.label for row in found.rows][-2:] == ["norm", "head"]
    assert [row.number for row in found.rows[1:-2]] == [str(index) for index in range(24)]
    tree = ElementTree.fromstring(svg(made))
    arrows = [path for path in tree.iter(f"{SVG}path") if "l7 -3.5v7z" in (path.get("d") or "")]
    assert len(arrows) == sum(len(arc.targets) for arc in found.arcs)
    assert {arc.kind for arc in found.arcs} == {"skip", "share"}
    texts = [text.text or "" for text in tree.iter(f"{SVG}text")]
    assert {"gated_deltanet", "attention", "parallel", "swiglu", "gelu", "linear anchor"} <= set(texts)
    assert f"24 layers, {made.parameters:,} parameters" in texts


def test_a_long_model_folds_what_repeats() -> None:
    made = planned(FIRST, {"repeat": 249, "pattern": ["linear", "linear", "both", "full"]}, "linear", "full")
    found = rows_of(made)
    assert len(found.rows) < 20
    # The first layer of a shared block has the weights, and is like no other.
    assert found.folds == [Fold(6, 9, 248)]
    assert found.rows[6].number == "5…"
    assert "×248" in svg(made)
    assert len(svg(made)) < 50_000


def test_a_short_model_is_not_folded() -> None:
    assert rows_of(planned({"repeat": 60, "pattern": ["linear"]})).folds == []
    assert rows_of(planned({"repeat": 61, "pattern": ["linear"]})).folds == [Fold(1, 1, 61)]


def test_what_comes_from_the_repeat_before_points_upwards() -> None:
    made = planned({"block": "again2", "name": "first"}, {"repeat": 50, "pattern": ["again", "again2"]})
    found = rows_of(made)
    assert len(found.folds) == 1
    (skip,) = [arc for arc in found.arcs if arc.kind == "skip" and arc.source > min(arc.targets)]
    assert isinstance(skip, Arc)
    ElementTree.fromstring(svg(made))


def test_names_are_text_and_nothing_else() -> None:
    model = planned("linear").model
    block = model.blocks["linear"]
    strange = model.model_copy(update={"blocks": {'<b a="1">&': block}, "layers": ['<b a="1">&']})
    drawn = svg(plan(strange))
    assert '<b a="1">' not in drawn
    assert '<b a="1">&' in [text.text for text in ElementTree.fromstring(drawn).iter(f"{SVG}text")]


def test_a_name_that_does_not_fit_is_cut_and_told_in_full() -> None:
    name = "a_long_name_of_a_block_that_does_not_fit_into_its_column"
    tree = ElementTree.fromstring(svg(planned(name)))
    assert any((text.text or "").endswith("…") for text in tree.iter(f"{SVG}text"))
    assert any(name in (title.text or "") for title in tree.iter(f"{SVG}title"))


def test_a_picture_needs_nothing_beside_itself() -> None:
    drawn = svg(mixed(24)).replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.search(r"https?:|href|<script|<style|@import|url\(", drawn)
    assert svg(mixed(24)) == svg(mixed(24))


def test_a_kind_has_one_colour_wherever_it_stands() -> None:
    tree = ElementTree.fromstring(svg(mixed(24)))
    colours: dict[str, set[str]] = {}
    pairs = list(tree.iter())
    for box, text in pairwise(pairs):
        if (
            box.tag == f"{SVG}rect"
            and text.tag == f"{SVG}text"
            and text.text in ("attention", "gated_deltanet")
        ):
            colours.setdefault(text.text, set()).add(box.get("fill", ""))
    assert [len(found) for found in colours.values()] == [1, 1]
    assert colours["attention"] != colours["gated_deltanet"]
