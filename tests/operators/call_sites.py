"""Every call of a `torch.ops.sgl_kernel` operator in the installed SGLang, found in its source.

Found are direct calls, calls of a name or attribute of the same file that was assigned the operator, and
calls of such a name where another file imports it.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# Where SGLang's path on a CPU does not come along.
OTHER_DEVICES = ("hardware_backend/xpu", "hardware_backend/npu", "hardware_backend/musa", "platforms/xpu.py")


@dataclass(frozen=True)
class CallSite:
    operator: str
    place: str  # file:line
    positional: int
    keywords: tuple[str, ...]
    results: int | None  # names that the call's results are unpacked to, where they are


def source_folder() -> Path:
    spec = importlib.util.find_spec("sglang")
    return Path(spec.submodule_search_locations[0]) / "srt"


def _dotted(node: ast.AST) -> str:
    """ "a.b.c" of names alone, "" of anything else."""
    if isinstance(node, ast.Name):
        return node.id
    owner = _dotted(node.value) if isinstance(node, ast.Attribute) else ""
    return f"{owner}.{node.attr}" if owner else ""


def _operator(node: ast.AST) -> str | None:
    """The NAME of `torch.ops.sgl_kernel.NAME`."""
    owner, _, name = _dotted(node).rpartition(".")
    return name if owner == "torch.ops.sgl_kernel" else None


def _assigned(tree: ast.AST) -> dict[str, str]:
    """Name or self.attribute -> the operator it was assigned."""
    return {
        _dotted(target): name
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and (name := _operator(node.value)) is not None
        for target in node.targets
    }


def _imported(tree: ast.AST, exported: dict[str, str]) -> dict[str, str]:
    return {
        alias.asname or alias.name: exported[alias.name]
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sglang.srt.layers")
        for alias in node.names
        if alias.name in exported
    }


def _unpacked(tree: ast.AST) -> dict[ast.AST, int]:
    """Call -> how many names its results are unpacked to."""
    return {
        node.value: len(node.targets[0].elts)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple)
    }


def _calls(tree: ast.AST, place: str, names: dict[str, str]) -> Iterator[CallSite]:
    unpacked = _unpacked(tree)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        operator = _operator(node.func) or names.get(_dotted(node.func))
        open_ended = any(isinstance(one, ast.Starred) for one in node.args)
        if operator is None or open_ended or any(keyword.arg is None for keyword in node.keywords):
            continue
        keywords = tuple(keyword.arg for keyword in node.keywords)
        yield CallSite(operator, f"{place}:{node.lineno}", len(node.args), keywords, unpacked.get(node))


@cache
def _trees() -> dict[str, ast.AST]:
    trees = {}
    for path in sorted(source_folder().rglob("*.py")):
        place = path.relative_to(source_folder()).as_posix()
        text = path.read_text()
        concerned = "torch.ops.sgl_kernel" in text or "import apply_rotary_pos_emb" in text
        if concerned and not place.startswith(OTHER_DEVICES):
            trees[place] = ast.parse(text)
    return trees


def call_sites() -> list[CallSite]:
    trees = _trees()
    exported = {
        name: operator
        for place, tree in trees.items()
        if place.startswith("layers/")
        for name, operator in _assigned(tree).items()
        if name.isidentifier()
    }
    sites = []
    for place, tree in trees.items():
        names = {**_imported(tree, exported), **_assigned(tree)}
        sites += _calls(tree, place, names)
    return sites


def mentioned() -> dict[str, str]:
    """Operator -> a place where SGLang looks it up, called or not."""
    return {
        name: f"{place}:{node.lineno}"
        for place, tree in _trees().items()
        for node in ast.walk(tree)
        if (name := _operator(node)) is not None
    }
