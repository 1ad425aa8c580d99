"""The model's source as one flat folder, which transformers can load without heddle.

Starting at the file of the model's class, every `from heddle.a.b import c` is followed, the file copied as `a_b.py`, and the
import rewritten to `from .a_b import c`. The look-up of mixers by kind is replaced by a list of those in use,
so nothing else is copied.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from heddle import __version__
from heddle.compose.blocks import channel_module, mixer_module

MODEL, ENCODER = "heddle.compose.hf.model", "heddle.compose.hf.encoder"
CONFIG, BLOCKS = "heddle.compose.hf.config", "heddle.compose.blocks"
# transformers wants files of classes that it loads named like this.
ENTRIES = {
    MODEL: "modeling_heddle",
    ENCODER: "modeling_heddle_encoder",
    CONFIG: "configuration_heddle",
}
OPTIONAL_PACKAGE = "triton"
# Op names are global in a process; two exports of different code must not meet there.
LIBRARY = re.compile(r'^(LIBRARY(?:: [\w.\[\]]+)?) = "heddle"$', flags=re.MULTILINE)


@dataclass(frozen=True, slots=True)
class _Import:
    """One `from heddle.… import …`: where it stands, and whether the file can live without it."""

    module: str
    line: int
    optional: bool


@dataclass(slots=True)
class _Closure:
    """Every file the model needs: its source, and whether it is needed or optional.

    `roots` are the packages that are copied: heddle, and those that offer a kind of mixer that is in use.
    """

    blocks: str
    roots: frozenset[str]
    sources: dict[str, str] = field(default_factory=dict)
    needed: set[str] = field(default_factory=set)

    def visit(self, module: str, *, needed: bool) -> None:
        if module in self.needed or (module in self.sources and not needed):
            return
        if needed:
            self.needed.add(module)
        source = self.blocks if module == BLOCKS else _source_file(module).read_text(encoding="utf-8")
        self.sources[module] = source
        for found in _imports(source, self.roots):
            self.visit(found.module, needed=needed and not found.optional)


def flatten(mixers: Collection[str], channels: Collection[str], entry: str = MODEL) -> dict[str, str]:
    """File name → source, for a model of these kinds of blocks, its class in module `entry`. Equal input gives equal text."""
    modules = [mixer_module(kind) for kind in mixers] + [channel_module(kind) for kind in channels]
    roots = frozenset({"heddle", *(module.__module__.partition(".")[0] for module in modules)})
    closure = _Closure(_blocks_source(sorted(mixers), sorted(channels)), roots)
    closure.visit(entry, needed=True)
    digest = hashlib.sha256(
        "".join(f"{name}\n{text}" for name, text in sorted(closure.sources.items())).encode()
    ).hexdigest()[:12]
    files = {}
    for module, source in sorted(closure.sources.items()):
        text = LIBRARY.sub(rf'\1 = "heddle_{digest}"', _guard_optional(_relative(source, roots)))
        if module == entry:
            text += _fetch_list(closure, entry)
        files[f"{flat_name(module)}.py"] = (
            f"# Written by heddle {__version__} from {module}, code {digest}.\n{text}"
        )
    assert len(files) == len(closure.sources), "two modules share a flat name"
    return files


def flat_name(module: str) -> str:
    """heddle.compose.cache → compose_cache; a module of another package keeps its package's name"""
    return ENTRIES.get(module) or module.removeprefix("heddle.").replace(".", "_")


def _source_file(module: str) -> Path:
    found = importlib.util.find_spec(module)
    assert found is not None, f"{module} is not a module"
    assert found.origin is not None, f"{module} has no source"
    return Path(found.origin)


@functools.lru_cache(maxsize=512)
def _imports(source: str, roots: frozenset[str]) -> tuple[_Import, ...]:
    """Imports of modules of `roots`; those inside a `try` are optional."""
    tree = ast.parse(source)
    tried = {id(node) for block in ast.walk(tree) if isinstance(block, ast.Try) for node in ast.walk(block)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert not any(alias.name.split(".")[0] in roots for alias in node.names), (
                "write `from package.x import y`"
            )
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in roots:
            assert node.module is not None
            found.append(_Import(node.module, node.lineno, id(node) in tried))
    return tuple(found)


def _relative(source: str, roots: frozenset[str]) -> str:
    """The source with our imports made relative to the flat folder."""
    lines = source.splitlines(keepends=True)
    for found in _imports(source, roots):
        head = f"from {found.module} import"
        assert head in lines[found.line - 1], f"expected {head!r} on line {found.line}"
        lines[found.line - 1] = lines[found.line - 1].replace(
            head, f"from .{flat_name(found.module)} import", 1
        )
    return "".join(lines)


@functools.lru_cache(maxsize=512)
def _guard_optional(source: str) -> str:
    """The source with top-level imports of triton inside a `try`.

    transformers reads the imports of every file and refuses a model whose packages are missing, unless they
    are tried.
    """
    lines = source.splitlines(keepends=True)
    for first, last in reversed(list(_runs_of_optional_imports(source))):
        body = "".join("    " + line for line in lines[first - 1 : last])
        guarded = f"try:\n{body}except ImportError as error:\n    raise ImportError(str(error)) from error\n"
        lines[first - 1 : last] = [guarded]
    return "".join(lines)


def _runs_of_optional_imports(source: str) -> Iterator[tuple[int, int]]:
    """First and last line of each run of neighbouring top-level imports of the optional package."""
    run: tuple[int, int] | None = None
    for node in ast.parse(source).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if any(name.split(".")[0] == OPTIONAL_PACKAGE for name in names):
            assert node.end_lineno is not None
            run = (run[0] if run else node.lineno, node.end_lineno)
        elif run:
            yield run
            run = None
    if run:
        yield run


def _blocks_source(mixers: list[str], channels: list[str]) -> str:
    """A file that stands in for `heddle.compose.blocks` and lists just these kinds."""
    mixer_classes = {kind: mixer_module(kind) for kind in mixers}
    channel_classes = {kind: channel_module(kind) for kind in channels}
    classes = [*mixer_classes.values(), *channel_classes.values()]
    lines = ['"""Modules by kind: those this model uses."""', "", "from torch import nn", ""]
    lines += [f"from {kind.__module__} import {kind.__name__}" for kind in classes]
    for name, table in (("MIXERS", mixer_classes), ("CHANNELS", channel_classes)):
        entries = ", ".join(f'"{kind}": {found.__name__}' for kind, found in table.items())
        lines += ["", f"{name}: dict[str, type[nn.Module]] = {{{entries}}}"]
    for name, table_name in (("mixer_module", "MIXERS"), ("channel_module", "CHANNELS")):
        lines += ["", "", f"def {name}(kind: str) -> type[nn.Module]:", f"    return {table_name}[kind]"]
    return "\n".join(lines) + "\n"


def _fetch_list(closure: _Closure, entry: str) -> str:
    """Lines that import every other file from the entry file, so that transformers fetches them all."""
    helpers = [module for module in sorted(closure.sources) if module != entry]
    needed = [flat_name(module) for module in helpers if module in closure.needed]
    optional = [flat_name(module) for module in helpers if module not in closure.needed]
    lines = ["", "", "# transformers fetches the files that this one names."]
    lines += [f"from .{name} import __name__ as _{name}  # noqa: E402, F401" for name in needed]
    for name in optional:
        lines += [
            "try:",
            f"    from .{name} import __name__ as _{name}  # noqa: F401",
            "except ImportError:",
            "    pass",
        ]
    return "\n".join(lines) + "\n"
