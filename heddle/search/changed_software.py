"""What is said of a latency model that was fitted with other software, and of the sentinels that were timed for it.

Needs only the standard library: reports say it too. `changed` is {name: [then, now]}, `judged` what run.json keeps as
`latency_sentinels` (`heddle.search.latency_model.sentinels`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

HINT = "heddle bench SPEC --fit makes one for this software"


def told(changed: Mapping[str, Sequence[Any]], judged: Mapping[str, Any]) -> tuple[str, str]:
    """A message for the user, and its level: "info" where the model is trusted all the same."""
    began, places = f"the latency model was fitted with other software ({names(changed)})", places_of(judged)
    why = "".join(f"; {place_told(one)}" for one in places)
    if is_trusted(judged):
        return f"{began}, and is trusted all the same{why}", "info"
    if any(one["trusted"] for one in places):
        return f"{began}{why}; where it is not trusted it predicts, and rules nothing out; {HINT}", "warning"
    return f"{began}: it predicts, and rules nothing out{why}; {HINT}", "warning"


def names(changed: Mapping[str, Sequence[Any]]) -> str:
    """What changed, from what to what."""
    return ", ".join(f"{name} {then} then, {now} now" for name, (then, now) in changed.items())


def places_of(judged: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The verdict on each fit; none of a run whose sentinels were not timed."""
    return list(judged.get("places", ()))


def is_trusted(judged: Mapping[str, Any]) -> bool:
    """Whether all fits were found to hold."""
    places = places_of(judged)
    return bool(places) and all(one["trusted"] for one in places)


def place_told(one: Mapping[str, Any]) -> str:
    """What the sentinels of one fit say."""
    label, errors, margin = one["label"], one["errors"], 100 * one["margin"]
    if one["failure"] is not None:
        return f"{label}: a sentinel could not be timed ({one['failure']}), so it is not trusted"
    if not errors:
        return f"{label}: it predicts none of the specs that were to be timed, so it is not trusted"
    worst = 100 * max(errors, key=abs)
    if one["trusted"]:
        return f"{label}: {len(errors)} specs timed now are within its margin (worst {worst:+.1f} of ± {margin:.1f} %)"
    beyond = sum(abs(error) > one["margin"] for error in errors)
    return f"{label}: of {len(errors)} specs timed now {beyond} are beyond its margin (worst {worst:+.1f} of ± {margin:.1f} %)"
