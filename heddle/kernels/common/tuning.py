"""Overrides of what the tables of launch configurations say: for measurements and tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from heddle.kernels.configs.launch import Launch

Value = TypeVar("Value", Launch, int)

_overrides: list[dict[str, Launch | int]] = []


@contextmanager
def tuning(**overrides: Launch | int) -> Iterator[None]:
    """Launches inside use these configurations, by the name of the kernel, or this segment length, in place of the table's."""
    _overrides.append(overrides)
    try:
        yield
    finally:
        _overrides.pop()


def is_tuned() -> bool:
    """Whether anything is overridden."""
    return bool(_overrides)


def tuned(name: str, otherwise: Value) -> Value:
    """The override of this name, or `otherwise`."""
    found = _overrides[-1].get(name) if _overrides else None
    return found if isinstance(found, type(otherwise)) else otherwise
