"""Architectures that people know, as spec files: `zoo()` names them, `load_zoo(name)` reads one."""

from __future__ import annotations

from importlib import resources

from heddle.errors import HeddleError
from heddle.specs.base import nearest
from heddle.specs.load import SpecFile, loads

FOLDER, SUFFIX = "heddle.specs.zoo", ".yaml"


def zoo() -> list[str]:
    """The names of the zoo, sorted."""
    files = resources.files(FOLDER).iterdir()
    return sorted(file.name.removesuffix(SUFFIX) for file in files if file.name.endswith(SUFFIX))


def zoo_text(name: str) -> str:
    """The file of that name, as it is.

    Raises:
        HeddleError: "bad-argument" for a name that the zoo has not.
    """
    known = zoo()
    if name not in known:
        close = nearest(name, known)
        hint = f"did you mean {close}?" if close else f"the zoo has {', '.join(known)}"
        raise HeddleError("bad-argument", f"the zoo has no {name!r}", hint=hint)
    return resources.files(FOLDER).joinpath(f"{name}{SUFFIX}").read_text(encoding="utf-8")


def load_zoo(name: str) -> SpecFile:
    """The spec of that name. Raises as `zoo_text`."""
    return loads(zoo_text(name), file=f"{name}{SUFFIX}")
