"""The shape of the package: who may import whom, what stays light, how long files and functions may be."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "heddle"
PARTS = ("specs", "kernels", "compose", "search", "dashboards")
# Part -> the parts it may import. What lies in heddle/ itself is the user's side and may import all of them.
ALLOWED = {
    "specs": set(),
    "kernels": set(),
    "compose": {"specs", "kernels"},
    "search": {"specs", "compose", "kernels"},
    "dashboards": {"specs", "search"},
}
HEAVY = ("torch", "ray", "transformers", "optuna", "triton", "plotly", "numpy")
LIGHT_MODULES = (
    "heddle",
    "heddle.specs",
    "heddle.compose.plan",
    "heddle.compose.targets.report",
    "heddle.search.record",
    "heddle.dashboards",
    "heddle.cli",
)
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imported(path: Path, *, nested: bool = True) -> Iterator[str]:
    """heddle modules a file imports; only those at import time unless `nested`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if nested else _at_import_time(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "heddle")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "heddle":
            assert node.module is not None
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES else node.module


def _at_import_time(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _at_import_time(child)


def _part(module: str) -> str | None:
    words = module.split(".")
    return words[1] if len(words) > 1 and words[1] in PARTS else None


@pytest.mark.parametrize("part", PARTS)
def test_a_part_imports_only_the_parts_it_may(part: str) -> None:
    wrong = []
    for module, path in MODULES.items():
        if _part(module) != part:
            continue
        for target in imported(path):
            other = _part(target)
            known_to_all = target in ("heddle", "heddle.errors")
            if not (known_to_all or other == part or other in ALLOWED[part]):
                wrong.append(f"{module} imports {target}")
    assert not wrong


def test_no_module_is_in_an_import_cycle() -> None:
    graph = nx.DiGraph()
    for module, path in MODULES.items():
        graph.add_edges_from((module, target) for target in imported(path, nested=False) if target != module)
    cycles = [group for group in nx.strongly_connected_components(graph) if len(group) > 1]
    assert not cycles


@pytest.mark.parametrize("module", LIGHT_MODULES)
def test_import_stays_light(module: str) -> None:
    code = f"import sys, {module}; print(*(name for name in {HEAVY!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_files_stay_short() -> None:
    found = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in MODULES.values()}
    limit = {name: 600 if name.startswith("heddle/kernels/") else 400 for name in found}
    assert not {name: lines for name, lines in found.items() if lines > limit[name]}


def _functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", node


def _body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of the body, its docstring left out: explanations are not what makes a function hard to read."""
    body = node.body
    if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant) and len(body) > 1:
        body = body[1:]
    return (node.end_lineno or node.lineno) - body[0].lineno + 1


def test_functions_stay_short() -> None:
    lengths = {name: _body_lines(node) for name, node in _functions()}
    limit = {name: 120 if name.startswith("heddle/kernels/") else 40 for name in lengths}
    assert not {name: lines for name, lines in lengths.items() if lines > limit[name]}


def _given_by_others(name: str, node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Commands follow the command line, a model's forward follows transformers, kernels follow Triton."""
    command = any("command(" in ast.unparse(decorator) for decorator in node.decorator_list)
    forward = name.startswith("heddle/compose/hf/") and node.name == "forward"
    return command or forward or name.startswith("heddle/kernels/")


def test_functions_take_few_positional_arguments() -> None:
    many = {}
    for name, node in _functions():
        if _given_by_others(name, node):
            continue
        arguments = [a.arg for a in (*node.args.posonlyargs, *node.args.args) if a.arg not in ("self", "cls")]
        if len(arguments) > 5:
            many[name] = arguments
    assert not many


def test_there_is_no_drawer_for_everything() -> None:
    names = {"utils.py", "util.py", "common.py", "misc.py", "helpers.py"}
    assert not [str(path) for path in MODULES.values() if path.name in names]
    assert all(len(path.relative_to(PACKAGE).parts) <= 3 for path in MODULES.values())
