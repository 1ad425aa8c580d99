"""What `heddle diff` tells: fields that differ, layers that came or went, and nothing of spellings."""

from __future__ import annotations

import json
from typing import Any

from toys import FORMS as GOOD

from heddle.specs import Difference, Spec, differences, loads, spec_hash

BLOCKS = {
    "full": {"mixer": {"kind": "attention", "heads": 4}, "channel": {"kind": "swiglu"}},
    "wide": {"mixer": {"kind": "attention", "heads": 4, "window": 8}, "channel": {"kind": "swiglu"}},
    "delta": {"mixer": {"kind": "gated_deltanet", "heads": 4}, "channel": {"kind": "none"}},
}


def spec(
    names: list[str], layers: list[Any] | None = None, *, train: dict[str, Any] | None = None, **model: Any
) -> Spec:
    used = {name: BLOCKS[name] for name in dict.fromkeys(names)}
    body = {"vocab_size": 256, "hidden_size": 64, "blocks": used, "layers": layers or names, **model}
    extra = {} if train is None else {"train": train}
    return loads(json.dumps({"version": 1, "name": "a", "model": body, **extra})).spec


def test_a_spec_does_not_differ_from_itself_spelled_otherwise() -> None:
    assert differences(spec(["full"] * 3), spec(["full"] * 3, norm_eps=1e-6)) == []
    repeated = spec(["full"], [{"repeat": 3, "pattern": ["full"]}])
    assert differences(spec(["full"] * 3), repeated) == []


def test_a_changed_field_is_told_with_its_layer() -> None:
    found = differences(spec(["full", "full"]), spec(["full", "wide"]))
    assert found == [Difference("layers.1.mixer.window", None, 8)]


def test_a_layer_more_is_told_as_that_and_shifts_nothing() -> None:
    (found,) = differences(spec(["full", "delta", "full"]), spec(["full", "delta", "delta", "full"]))
    assert found.path in ("layers.1", "layers.2")
    assert found.left is None
    assert found.right["mixer"]["kind"] == "gated_deltanet"
    (back,) = differences(spec(["full", "delta", "delta", "full"]), spec(["full", "delta", "full"]))
    assert (back.left, back.right) == (found.right, None)


def test_a_shifted_layer_is_told_with_both_places() -> None:
    found = differences(spec(["full", "full", "full"]), spec(["delta", "full", "full", "wide"]))
    assert [one.path for one in found] == ["layers.0", "layers.2 | 3.mixer.window"]


def test_scalars_and_sections_are_told_too() -> None:
    left, right = (
        spec(["full"], train={"tokens": 1000}),
        spec(["full"], hidden_size=128, train={"tokens": 2000}),
    )
    paths = [one.path for one in differences(left, right)]
    assert paths[0] == "hidden_size"
    assert "train.tokens" in paths
    assert differences(left, spec(["full"]))[0].path == "train.tokens"


# With two layers of the shared block.
FORMS = GOOD.replace("both, once,", "both, once, once,")


def told(*changes: tuple[str, str]) -> list[Difference]:
    """What differs between FORMS and the same with changes."""
    text = FORMS
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    left, right = loads(FORMS).spec, loads(text).spec
    found = differences(left, right)
    assert (found == []) == (spec_hash(left.model) == spec_hash(right.model))
    # From the other side it is the same, the sides changed.
    back = differences(right, left)
    assert sorted((str(one.left), str(one.right)) for one in found) == sorted(
        (str(one.right), str(one.left)) for one in back
    )
    return found


def test_a_name_is_no_difference_and_what_it_leads_to_is() -> None:
    assert told(("name: first", "name: anchor"), ("source: first", "source: anchor")) == []
    assert told(("source: first", "source: full")) == []
    assert told(("source: first", "source: both")) == [Difference("layers.4.skip.source", 0, 1)]
    assert told(("source: first", "source: embedding")) == [Difference("layers.4.skip.source", 0, -1)]


def test_a_layer_more_moves_no_reference() -> None:
    (found,) = told(("layers: [", "layers: [both, "))
    assert (found.path, found.left, found.right["mixer"]["kind"]) == ("layers.0", None, "parallel")
    # The name leads to the same layer, now one further; the second of the shared layers has the weights of the first.
    (found,) = told(("both, once, once", "both, both, once, once"))
    assert (found.path, found.left) in {("layers.1", None), ("layers.2", None)}


def test_a_reference_that_leads_to_another_layer_at_the_same_index_is_told() -> None:
    found = told(
        ("[{block: full, name: first}, ", "[both, {block: full, name: first}, "),
        ("source: first", "source: embedding"),
    )
    assert [one.path for one in found] == ["layers.0", "layers.4 | 5.skip.source"]
    assert (found[1].left, found[1].right) == (0, -1)


def test_weights_that_are_shared_are_told_by_the_layer_that_has_them() -> None:
    assert told((", shared: true", "")) == [Difference("layers.3.weights_of", 2, None)]
    (found,) = told(("once, once, late", "once, once, once, late"))
    assert (found.left, found.right["weights_of"]) == (None, 2)


def test_fields_of_mixers_in_lists_are_told_by_their_path() -> None:
    found = told(("{kind: gated_deltanet, heads: 2}", "{kind: gated_deltanet, heads: 2, short_conv: 2}"))
    assert found == [Difference("layers.1.mixer.mixers.1.short_conv", 4, 2)]
    found = told(
        (
            "kind: gated_deltanet, heads: 2}]}",
            "kind: gated_deltanet, heads: 2}], merge: gate, weights: [1.0, 2.0]}",
        )
    )
    assert [(one.path, one.left, one.right) for one in found] == [
        ("layers.1.mixer.merge", "sum", "gate"),
        ("layers.1.mixer.weights", None, [1.0, 2.0]),
    ]
    (more,) = told(
        (
            "{kind: gated_deltanet, heads: 2}]",
            "{kind: gated_deltanet, heads: 2}, {kind: attention, heads: 2}]",
        )
    )
    assert (more.path, more.left, more.right["heads"]) == ("layers.1.mixer.mixers.2", None, 2)


def test_overrides_residuals_and_norms_are_told_as_what_they_make_of_the_layer() -> None:
    assert told(("window: 8", "window: 16")) == [Difference("layers.5.mixer.window", 8, 16)]
    assert told(("{mixer: {window: 8}}", "{mixer: {window: 8}, norm_placement: sandwich}")) == [
        Difference("layers.5.norm_placement", None, "sandwich")
    ]
    (found,) = told(
        ("{mixer: {window: 8}}", "{mixer: {window: 8}, residual: {branch: 0.5}, channel_residual: {}}")
    )
    assert (found.path, found.right["branch"]) == ("layers.5.residual", 0.5)
