"""No module imports itself in a roundabout way, and floors import only floors below (doc/architecture.md).

All imports count, also those inside functions and those for type checkers: a circle that an import at the
last moment hides is still one, and so are objects that know each other's types.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "kt_kernel"

# From the top; what is not named is of the lowest floor.
FLOORS = (("cli", "demo", "bench", "convert", "planning"), ("training",), ("integrations",), ("hybrid",), ())


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(node: ast.AST) -> Iterator[str]:
    """Every name that is imported in `node`, with the module in which it is looked for."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: a relative import"
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    for part in ast.iter_child_nodes(node):
        yield from imported(part)


def graph_of(sources: dict[str, str]) -> dict[str, set[str]]:
    """module -> the modules that it imports, of those in `sources` (module -> text)."""
    graph = {}
    for module, source in sources.items():
        names = set(imported(ast.parse(source)))
        # `from package import module` means the module, `from module import name` the module before the dot.
        homes = {name if name in sources else name.rpartition(".")[0] for name in names}
        graph[module] = homes & sources.keys()
    return graph


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    paths = sorted((ROOT / PACKAGE).rglob("*.py"))
    graph = graph_of({module_name(path): path.read_text(encoding="utf-8") for path in paths})
    # The package itself fetches its names when they are first used, for everybody else; who imports the
    # extension through it imports nothing more.
    del graph[PACKAGE]
    return {module: found - {PACKAGE} for module, found in graph.items()}


def circle(graph: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def floor(module: str) -> int:
    package = module.split(".")[1]
    return next((level for level, packages in enumerate(FLOORS) if package in packages), len(FLOORS) - 1)


def test_no_module_imports_itself_in_a_roundabout_way(graph):
    assert circle(graph) == []


def test_floors_import_only_floors_below(graph):
    upwards = [
        f"{module} imports {other}"
        for module, others in graph.items()
        for other in others
        if floor(other) < floor(module)
    ]
    assert upwards == []


@pytest.mark.parametrize(
    ("second", "found"),
    [
        ("from p.a import x", True),
        ("def late():\n    import p.a", True),
        ("try:\n    from p import a\nexcept ImportError:\n    pass", True),
        ("if TYPE_CHECKING:\n    from p.a import x", True),
        ("from p.c import x", False),
    ],
)
def test_circles_are_seen_in_every_kind_of_import(second, found):
    graph = graph_of({"p": "", "p.a": "from p import b", "p.b": second, "p.c": ""})
    assert bool(circle(graph)) == found
