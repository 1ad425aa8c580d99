"""Fields of softmax attention that rule each other out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from heddle.specs.kinds import Problem

if TYPE_CHECKING:
    from heddle.specs.mixers.attention import Attention


def conflicts(spec: Attention) -> list[Problem]:
    """Fields that ask for what another one rules out."""
    takes, selects, one = spec.keys_from is not None, spec.selection, "leave one of them out"
    slides, both = spec.boundary == "inward", "a window to both sides alone slides inward"
    bare, blind = "with keys_from there are no own keys", "blocks are selected among those before a query"
    no_values, dropped = (
        "with keys_from there are no own values to mix",
        "a window drops keys that could be selected",
    )
    sided = slides and (spec.causal or (spec.window is None and spec.grid is None))
    sinks, beside = spec.sink_tokens > 0, "first tokens stay in sight beside a window to earlier tokens alone"
    rules = [
        (takes and spec.values_from is not None, "values_from", no_values, one),
        (takes and spec.qk_source != "hidden", "qk_source", bare, one),
        (takes and spec.key_multiplier != 1, "key_multiplier", bare, "use scale"),
        (sided, "boundary", both, "causal: false and a window, or boundary: clip"),
        (slides and spec.softcap, "boundary", "no logits of an inward window are capped", one),
        (slides and spec.sinks, "boundary", "an inward window has no sinks", one),
        (selects and spec.window, "selection", dropped, one),
        (selects and not spec.causal, "selection", blind, "causal: true"),
        (sinks and spec.window is None, "sink_tokens", beside, "a window, or sink_tokens: 0"),
        (sinks and not spec.causal, "sink_tokens", beside, "causal: true, or sink_tokens: 0"),
    ]
    found = [Problem(field, what, hint, "conflicting-fields") for wrong, field, what, hint in rules if wrong]
    return found if selects is None else found + selects.problems()
