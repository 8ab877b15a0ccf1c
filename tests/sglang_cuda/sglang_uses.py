"""Where SGLang asks for the class of a layer's method, or for the number of a layer's local experts.

Both answers are ours in a layer with CPU experts: its method is HybridMoEMethod, and the device holds fewer
experts than the layer has. Found in the source text alone, so that nothing of SGLang has to be imported.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

METHOD = "quant_method"
COUNT = "num_local_experts"


@dataclass(frozen=True, order=True)
class Use:
    """`function`: qualified by its classes and functions, "<module>" outside of any."""

    path: str
    function: str
    what: str

    def __str__(self) -> str:
        return f"{self.path}::{self.function} {self.what}"


def uses_in(package: Path) -> Counter[Use]:
    """All uses in the Python files below `package`, and how often each stands in its function."""
    found: Counter[Use] = Counter()
    for file in sorted(package.rglob("*.py")):
        source = file.read_text(encoding="utf-8")
        if METHOD in source or COUNT in source:
            path = file.relative_to(package).as_posix()
            found.update(
                Use(path, function, what) for function, what in _walk(ast.parse(source), (), frozenset())
            )
    return found


def reviewed(file: Path) -> Counter[Use]:
    """The uses in reviewed_uses.txt: paragraphs of a reason and, indented, what it covers."""
    uses: Counter[Use] = Counter()
    has_reason = False
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.startswith(" "):
            has_reason = bool(line)
            continue
        if not has_reason:
            raise ValueError(f"{file.name}, line {number}: no reason stands above this use; write one.")
        (place, what), times = line.rsplit(" x", 1)[0].split(), int(line.rsplit(" x", 1)[1])
        use = Use(*place.split("::"), what)
        if use in uses:
            raise ValueError(f"{file.name}, line {number}: {use} stands here twice; remove one.")
        uses[use] = times
    return uses


def differences(found: Counter[Use], expected: Counter[Use]) -> list[str]:
    """A line for each use that is more or less often there than reviewed."""
    changed = [use for use in sorted(found.keys() | expected.keys()) if found[use] != expected[use]]
    return [
        f"{'new' if found[use] > expected[use] else 'gone'}: {use} "
        f"({found[use]} times, reviewed {expected[use]})"
        for use in changed
    ]


def _walk(node: ast.AST, scope: tuple[str, ...], methods: frozenset[str]) -> Iterator[tuple[str, str]]:
    """(function, what) of each use at or below `node`; `methods`: local names of a layer's method."""
    what = _what(node, methods)
    if what is not None:
        yield ".".join(scope) or "<module>", what
    if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        scope = (*scope, node.name)
        methods = methods | _names_of_methods(node)
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, scope, methods)


def _names_of_methods(scope: ast.AST) -> frozenset[str]:
    """What `name = layer.quant_method` is called there."""
    return frozenset(
        target.id
        for statement in ast.walk(scope)
        if isinstance(statement, ast.Assign) and _is_method(statement.value, frozenset())
        for target in statement.targets
        if isinstance(target, ast.Name)
    )


def _what(node: ast.AST, methods: frozenset[str]) -> str | None:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
        is_about_method = _is_method(node.args[0], methods)
        if node.func.id == "isinstance" and is_about_method and len(node.args) == 2:
            return f"isinstance({_classes(node.args[1])})"
        if node.func.id == "type" and is_about_method:
            return "type()"
    return COUNT if _name_read(node) == COUNT else None


def _is_method(node: ast.AST, methods: frozenset[str]) -> bool:
    """`quant_method`, `layer.quant_method`, `getattr(layer, "quant_method", None)`, or one of `methods`."""
    if isinstance(node, ast.NamedExpr):
        return _is_method(node.value, methods)
    if isinstance(node, ast.Name):
        return node.id.endswith(METHOD) or node.id in methods
    return (_name_read(node) or "").endswith(METHOD)


def _name_read(node: ast.AST) -> str | None:
    """The attribute that is read: `x.name` or `getattr(x, "name", …)`."""
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
        return node.attr
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
        name = node.args[1] if len(node.args) > 1 else None
        return name.value if isinstance(name, ast.Constant) and isinstance(name.value, str) else None
    return None


def _classes(node: ast.AST) -> str:
    parts = node.elts if isinstance(node, ast.Tuple) else [node]
    return "|".join(ast.unparse(part).replace(" ", "") for part in parts)
