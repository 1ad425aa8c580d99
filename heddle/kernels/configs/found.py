"""Launches that `heddle bench --tune` found on this machine, in the user's cache folder: they come before the shipped tables.

A file of JSON, launches.json. What was found with another device, Triton or other kernels is passed over.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import astuple, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from heddle.kernels.configs.launch import Launch

Family = TypeVar("Family")
Launches = Mapping[str, Launch]
FORMAT = 1


def cache_folder() -> Path:
    """HEDDLE_CACHE, else heddle/ in the user's cache folder (XDG_CACHE_HOME, by default ~/.cache)."""
    named = os.environ.get("HEDDLE_CACHE")
    if named:
        return Path(named)
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "heddle"


def launches_file() -> Path:
    """Where they are kept; the file need not exist."""
    return cache_folder() / "launches.json"


@functools.cache
def kernel_digest() -> str:
    """16 hex digits of the text of heddle's kernels."""
    found = hashlib.sha256()
    folder = Path(__file__).parents[1]
    for path in sorted(folder.rglob("*.py")):
        found.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return found.hexdigest()[:16]


def running_digest() -> str:
    """16 hex digits of what runs: of `kernel_digest` and, if any was found for these kernels, of the launches."""
    entries = [entry for entry in _entries() if entry.get("kernels") == kernel_digest()]
    if not entries:
        return kernel_digest()
    return hashlib.sha256(json.dumps([kernel_digest(), entries], sort_keys=True).encode()).hexdigest()[:16]


def keep(
    op: str,
    launches: Mapping[str, Any],
    *,
    device: str,
    triton: str,
    told: Mapping[str, Any],
    library: str | None = None,
) -> Path:
    """Writes the launches of an op, in the place of earlier ones for the same device, Triton and kernels; gives the file.

    `told` is kept beside them: how they were found. `library`: the version of what else runs, if anything does.

    Raises:
        OSError: where the folder cannot be written to.
    """
    key = _key(op, device, triton, library)
    rest = [entry for entry in _entries() if any(entry.get(name) != value for name, value in key.items())]
    entry = {**key, "launches": {name: astuple(launch) for name, launch in launches.items()}, **told}
    path = launches_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".new", delete=False) as file:
        json.dump({"format": FORMAT, "found": [*rest, entry]}, file, indent=1)
    Path(file.name).replace(path)
    return path


def found_for(
    op: str,
    *,
    device: str,
    triton: str | None,
    library: str | None = None,
    made: Callable[..., Any] = Launch,
) -> dict[str, Any]:
    """What was found for an op here, by the names of its kernels; nothing where nothing was, or the file cannot be read.

    `made` makes it of the values that were kept.
    """
    if not launches_file().exists():
        return {}
    key = _key(op, device, triton, library)
    for entry in _entries():
        if all(entry.get(name) == value for name, value in key.items()):
            return {name: made(*values) for name, values in entry["launches"].items()}
    return {}


def _key(op: str, device: str, triton: str | None, library: str | None) -> dict[str, str | None]:
    return {"op": op, "device": device, "triton": triton, "kernels": kernel_digest(), "library": library}


def _entries() -> list[dict[str, Any]]:
    try:
        data = json.loads(launches_file().read_text())
        return list(data["found"]) if data["format"] == FORMAT else []
    except (OSError, ValueError, KeyError, TypeError):
        return []


def tunable(family: Any) -> dict[str, Launch]:
    """The launches of a table for elements of two bytes and heads up to `TALL`, by the names of their kernels."""
    plan = getattr(family, "half", family)
    names = [field.name for field in fields(plan)]
    # Without plans, the others of a family are those of tall heads and of four bytes.
    names = [name for name in names if plan is not family or not name.startswith(("tall", "wide"))]
    return {name: value for name in names if isinstance(value := getattr(plan, name), Launch)}


def overlaid(family: Family, launches: Launches) -> Family:
    """The table with other launches for elements of two bytes and heads up to `TALL`."""
    known: Any = family
    changed = {name: launch for name, launch in launches.items() if name in tunable(family)}
    if not hasattr(known, "half"):
        return replace(known, **changed)  # type: ignore[no-any-return]
    return replace(known, half=replace(known.half, **changed))  # type: ignore[no-any-return]
