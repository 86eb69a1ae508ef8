# SPDX-License-Identifier: Apache-2.0
"""Import structure of the package, parsed from its sources: no import of a higher layer, no cycles.

Imports inside functions count; those under ``TYPE_CHECKING`` do not run and do not count.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import mustdrop_kernels

PACKAGE = Path(mustdrop_kernels.__file__).parent
NAME = PACKAGE.name

# Top-level modules from the bottom to the top; those of one layer may import each other.
LAYERS: tuple[frozenset[str], ...] = tuple(
    frozenset(names.split())
    for names in (
        "_namespace _load _sources _version errors files",
        "ops",
        "backends",
        "config stages placeholders plans engines parallel flops",
        "report",
        "integrations",
        "evaluation bench",
        "__init__",  # exports the operators, the configuration and drop_tokens
        "cli",
        "__main__",
    )
)
# Compiled, without a Python source.
NO_SOURCE = frozenset({"_native"})
# (importing module, imported module) -> the reason for an import of a higher layer or a cycle.
ALLOWED: dict[tuple[str, str], str] = {}


def modules(package: Path) -> dict[str, Path]:
    """Dotted name below the package -> file; a package is named like a module, the root is ``__init__``."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


def imports(tree: ast.AST, module: str, is_package: bool, known: dict[str, Path]) -> Iterator[str]:
    """Modules of the package that a module imports when it runs, by their names in `known`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                yield from imports(ast.Module([other], []), module, is_package, known)
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = list(_absolute(node, module, is_package, known))
        else:
            names = []
            yield from imports(node, module, is_package, known)
        for name in names:
            if name == NAME:
                yield "__init__"
            elif name.startswith(f"{NAME}."):
                yield name.removeprefix(f"{NAME}.")


def _absolute(node: ast.ImportFrom, module: str, is_package: bool, known: dict[str, Path]) -> Iterator[str]:
    """The modules of a ``from ... import ...``: each name that is a module itself, else the module it is taken from."""
    base = (node.module or "").split(".") if node.module else []
    if node.level:
        above = [NAME, *(part for part in module.split(".") if part != "__init__")]
        up = node.level - 1 if is_package else node.level
        base = above[: len(above) - up] + base
    source = ".".join(base)
    inside = source.removeprefix(NAME).removeprefix(".")
    for alias in node.names:
        name = f"{inside}.{alias.name}" if inside else alias.name
        yield f"{NAME}.{name}" if source.split(".")[0] == NAME and name in known else source


def graph(package: Path) -> dict[str, set[str]]:
    """Module -> modules of the package that it imports."""
    known = modules(package)
    return {
        name: set(imports(ast.parse(path.read_text()), name, path.stem == "__init__", known)) - {name}
        for name, path in known.items()
    }


def layer(module: str) -> int:
    top = module.split(".")[0]
    (number,) = (i for i, names in enumerate(LAYERS) if top in names)
    return number


def upward(found: dict[str, set[str]]) -> list[str]:
    return [
        f"{name} imports {other}"
        for name, others in found.items()
        for other in sorted(others)
        if other.split(".")[0] not in NO_SOURCE and layer(other) > layer(name) and (name, other) not in ALLOWED
    ]


def cycles(found: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(found[name]):
            if other not in found or (name, other) in ALLOWED:
                continue
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            at = stack.index(name)
            if len(stack) - at > 1:
                groups.append(stack[at:])
            del stack[at:]

    for name in found:
        if name not in index:
            visit(name)
    return groups


FOUND = graph(PACKAGE)


def test_every_module_has_a_layer() -> None:
    there = {name.split(".")[0] for name in FOUND}
    assert sorted(there - frozenset.union(*LAYERS)) == []
    assert len(frozenset.union(*LAYERS)) == sum(map(len, LAYERS)), "one layer each"


def test_no_import_of_a_higher_layer() -> None:
    assert upward(FOUND) == []


def test_no_import_cycles() -> None:
    assert cycles(FOUND) == []


def test_every_exception_is_used() -> None:
    assert [pair for pair in ALLOWED if pair[1] not in FOUND.get(pair[0], ())] == []


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"ops.py": "from .cli import app"}, "ops imports cli"),
        ({"ops.py": "def f():\n  from .cli.app import x", "cli/app.py": ""}, "ops imports cli.app"),
        ({"ops.py": "import mustdrop_kernels.cli.app", "cli/app.py": ""}, "ops imports cli.app"),
        ({"ops.py": "from mustdrop_kernels.cli import app", "cli/app.py": ""}, "ops imports cli.app"),
        ({"bench/baselines/a.py": "from ...cli import app", "cli/app.py": ""}, "bench.baselines.a imports cli.app"),
        ({"ops.py": "if TYPE_CHECKING:\n  from .cli import app"}, None),
        ({"cli/app.py": "from .. import ops", "ops.py": ""}, None),
    ],
)
def test_the_search_finds_upward_imports(files: dict[str, str], expected: str | None, tmp_path: Path) -> None:
    for name, text in {"__init__.py": "", "cli/__init__.py": "", **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert upward(graph(tmp_path)) == ([expected] if expected else [])


def test_the_search_finds_a_cycle(tmp_path: Path) -> None:
    texts = {
        "__init__.py": "",
        "a.py": "from . import b",
        "b.py": "def f():\n  from .c import x",
        "c.py": "from .a import y",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    assert [sorted(group) for group in cycles(graph(tmp_path))] == [["a", "b", "c"]]
