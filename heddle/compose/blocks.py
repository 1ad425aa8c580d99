"""Modules by kind. The file of a kind bears its name, and defines one module class.

An exported model carries a generated file of this name instead, which lists just the classes it uses.
"""

from __future__ import annotations

import importlib
import inspect

from torch import nn

from heddle.specs.model import MIXERS


def mixer_module(kind: str) -> type[nn.Module]:
    """The mixer module of `kind`; one of another package stands where its spec says."""
    named = MIXERS[kind].module if kind in MIXERS else None
    return module_in(f"heddle.compose.mixers.{kind}") if named is None else _named(named)


def channel_module(kind: str) -> type[nn.Module]:
    """The channel module of `kind`."""
    return module_in(f"heddle.compose.channel.{kind}")


def _named(where: str) -> type[nn.Module]:
    """The class at "package.module:Class"."""
    module, _, name = where.partition(":")
    found: type[nn.Module] = getattr(importlib.import_module(module), name)
    return found


def module_in(name: str) -> type[nn.Module]:
    """The one module class that `name` defines."""
    found: list[type[nn.Module]] = [
        value
        for value in vars(importlib.import_module(name)).values()
        if inspect.isclass(value) and value.__module__ == name and issubclass(value, nn.Module)
    ]
    assert len(found) == 1, f"{name} must define one module, not {len(found)}"
    return found[0]
