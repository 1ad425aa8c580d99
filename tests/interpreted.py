"""What Triton's interpreter runs: half of the tests that are chosen for it, and itself less what it does again and again."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import pytest

# They failed once, and run each time: by parts of their names.
PINNED = (
    "one_decay",
    "first_tokens",
    "short_last_chunk",
    "of_its_own_call",
    "rounded_once",
    "before_each_chunk",
)


def half(items: Sequence[pytest.Item], seed: int) -> list[pytest.Item]:
    """The pinned ones, and of the others half of those of each op and file, drawn."""
    groups = defaultdict[str, list[pytest.Item]](list)
    for item in items:
        op = item.callspec.params.get("op") if hasattr(item, "callspec") else None
        groups[f"{item.path.name} {getattr(op, 'name', '')}"].append(item)
    chosen = set[pytest.Item]()
    for name, group in groups.items():
        pinned = {item for item in group if any(part in item.name for part in PINNED)}
        others = [item for item in group if item not in pinned]
        chosen |= pinned | set(random.Random(f"{seed} {name}").sample(others, -(-len(others) // 2)))
    return [item for item in items if item in chosen]


def make_quick() -> None:
    """Takes from the interpreter, in this process, what it does again at each call of a function that a kernel calls.

    It lays its own language over Triton's by looking at all members of the module, for each launch and once more for each such
    call, where all is laid already; and it writes the table of numpy's types anew for each tensor. Both took two fifths of the
    time. What kernels compute is the same to the bit: one language is laid for all functions of a launch that see one module.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    lay, type_of = interpreter._patch_lang, interpreter._get_np_dtype
    launch = interpreter.GridExecutor.__call__
    laid: set[tuple[bool, bool]] = set()
    types: dict[Any, Any] = {}

    def lay_once(function: Any) -> Any:
        modules = list(function.__globals__.values())
        seen = (any(one is tl for one in modules), any(one is tl.core for one in modules))
        if seen in laid:
            return interpreter._LangPatchScope()
        laid.add(seen)
        return lay(function)

    def launch_anew(executor: Any, *given: Any, **named: Any) -> None:
        # What a launch has laid is taken away behind it.
        laid.clear()
        launch(executor, *given, **named)

    def known_type(given: Any) -> Any:
        scalar = given.scalar
        if isinstance(scalar, tl.pointer_type):
            # No key of a table; it is told first.
            return type_of(scalar)
        if scalar not in types:
            types[scalar] = type_of(scalar)
        return types[scalar]

    interpreter._patch_lang = lay_once
    interpreter.GridExecutor.__call__ = launch_anew
    interpreter._get_np_dtype = known_type
