"""Mixers of other packages, found through the entry point group `heddle.mixers`.

A package offers a kind by a line in its pyproject.toml, the name being the kind:

    [project.entry-points."heddle.mixers"]
    token_shift = "heddle_example.spec:TokenShift"

The class is a `MixerSpec` that imports no torch and names its module in `module`, as "package.module:Class".

Kinds of ours that need a package which is not always there come in the same way, where that package is.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING

from heddle.specs.kinds import MixerSpec

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "heddle.mixers"


@dataclass(frozen=True, slots=True)
class Broken:
    """A kind that a package offers and that cannot be used, and why."""

    kind: str
    package: str
    why: str


def load_plugins(taken: Collection[str]) -> tuple[list[type[MixerSpec]], list[Broken]]:
    """The kinds that installed packages offer, and those of them that cannot be used; `taken` are kinds of our own.

    A broken package must not take heddle down with it, so nothing is raised: `heddle doctor` and the error for an unknown
    kind tell what is wrong.
    """
    kinds: list[type[MixerSpec]] = []
    broken: list[Broken] = []
    known = set(taken)
    for point in sorted(_points(), key=lambda one: one.name):
        made, why = _load(point, known)
        if made is None:
            broken.append(Broken(point.name, point.dist.name if point.dist else "?", why))
        else:
            known.add(point.name)
            kinds.append(made)
    return kinds, broken


def _points() -> Iterable[EntryPoint]:
    """The entry points of the group.

    Without a package that offers any, as almost everywhere, importlib.metadata is not asked: with the modules that it
    imports it takes 8 % of the instructions of importing heddle.specs (cachegrind).
    """
    others = any(hasattr(one, "find_distributions") and one is not PathFinder for one in sys.meta_path)
    if not others and not any(_may_offer(place or ".") for place in sys.path):
        return ()
    from importlib.metadata import entry_points

    return entry_points(group=GROUP)


def _may_offer(place: str) -> bool:
    """Whether a place where Python looks for packages has one that names the group, or is none that can be looked into."""
    if not os.path.isdir(place):
        # A zip file, say.
        return os.path.exists(place)
    for name in os.listdir(place):
        if name.endswith((".dist-info", ".egg-info")):
            file = os.path.join(place, name, "entry_points.txt")
            if os.path.exists(file) and GROUP in Path(file).read_text(encoding="utf-8", errors="replace"):
                return True
    return place.endswith(".egg")


@dataclass(frozen=True, slots=True)
class Optional:
    """A kind of ours, the module that it needs, the package that has it, and where its schema is."""

    kind: str
    needs: str
    package: str
    value: str


OPTIONAL = (Optional("fla", "fla", "flash-linear-attention", "heddle.specs.optional.fla:Fla"),)


def load_optional() -> tuple[list[type[MixerSpec]], list[Broken]]:
    """The kinds of `OPTIONAL` whose package is installed, and the others. Nothing of a package is imported to look."""
    kinds: list[type[MixerSpec]] = []
    absent: list[Broken] = []
    for one in OPTIONAL:
        found = importlib.util.find_spec(one.needs)
        if found is None or found.origin is None:
            why = f"it is not installed: pip install 'heddle-lm[{one.kind}]'"
            absent.append(Broken(one.kind, one.package, why))
        else:
            from importlib.metadata import EntryPoint

            kinds.append(EntryPoint(one.kind, one.value, GROUP).load())
    return kinds, absent


def _load(point: EntryPoint, known: Collection[str]) -> tuple[type[MixerSpec] | None, str]:
    if point.name in known:
        return None, "there is a mixer of that kind already"
    try:
        made = point.load()
    except Exception as error:
        return None, f"{point.value} does not import: {type(error).__name__}: {error}"
    if not (isinstance(made, type) and issubclass(made, MixerSpec)):
        return None, f"{point.value} is no MixerSpec"
    kind = made.model_fields["kind"].default
    if kind != point.name:
        return None, f"its kind is {kind!r}, and the entry point is called {point.name!r}"
    if made.module is None or ":" not in made.module:
        return None, 'its module must be named as "package.module:Class"'
    return made, ""
