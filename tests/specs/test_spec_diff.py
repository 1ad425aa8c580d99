"""What `heddle diff` tells: fields that differ, layers that came or went, and nothing of spellings."""

from __future__ import annotations

import json
from typing import Any

from heddle.specs import Difference, Spec, differences, loads

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
