"""Writes kt_kernel/kt_kernel_ext.pyi, the types of the compiled extension, from the extension itself.

    python scripts/extension_stub.py            rewrite the stub
    python scripts/extension_stub.py --check    change nothing; exit status 1 if the stub is out of date

pybind11 puts the signature of a function into the first line of its docstring. Numbers are int and float in
the stub: what converts to them is accepted as well.
"""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

STUB = Path(__file__).resolve().parents[1] / "kt_kernel/kt_kernel_ext.pyi"
HEADER = '''"""The compiled extension; csrc/*bindings.cc say more. Written by scripts/extension_stub.py."""

from collections.abc import Sequence
from typing import Any
'''
# Left: what pybind11 writes; right: what a reader wants.
WORDS = {
    "typing.SupportsInt | typing.SupportsIndex": "int",
    "typing.SupportsFloat | typing.SupportsIndex": "float",
    "collections.abc.Sequence": "Sequence",
    "kt_kernel.kt_kernel_ext.": "",
    "kt::": "",
}
BARE = {"dict": "dict[str, Any]", "list": "list[Any]", "tuple": "tuple[Any, ...]", "object": "Any"}


def signature(of: object) -> str:
    """`(arguments) -> type` of a function or a property's getter, from its docstring."""
    first = (inspect.getdoc(of) or "").partition("\n")[0]
    found = re.search(r"\(.*\) -> .+$", first)
    if not found:
        raise ValueError(f"{of!r} has no signature in its docstring: {first!r}")
    text = found[0]
    for written, wanted in WORDS.items():
        text = text.replace(written, wanted)
    text = re.sub(r"\bself: \w+", "self", text)
    arguments, _, result = text.rpartition(" -> ")
    return f"{arguments} -> {BARE.get(result, result)}"


def function(name: str, of: object, indent: str = "") -> str:
    return f"{indent}def {name}{signature(of)}: ..."


def class_lines(of: type) -> Iterator[str]:
    bases = [
        base.__name__ for base in of.__bases__ if base.__module__ == of.__module__ or base is RuntimeError
    ]
    yield f"class {of.__name__}({', '.join(bases)}):" if bases else f"class {of.__name__}:"
    members = []
    for name, member in sorted(vars(of).items()):
        if isinstance(member, property):
            result = signature(member.fget).rpartition(" -> ")[2]
            members.append(f"    @property\n    def {name}(self) -> {result}: ...")
        elif not name.startswith("_") or (name == "__init__" and ") -> None" in (member.__doc__ or "")):
            members.append(function(name, member, "    "))
    yield from members or ["    ..."]


def stub(extension: ModuleType) -> str:
    """The text of the stub, before the formatter."""
    names = [name for name in sorted(vars(extension)) if not name.startswith("_")]
    parts = [HEADER]
    for name in names:
        value = getattr(extension, name)
        if isinstance(value, type):
            parts.append("\n".join(class_lines(value)) + "\n")
        elif callable(value):
            parts.append(function(name, value))
        else:
            parts.append(f"{name}: tuple[{type(value[0]).__name__}, ...]")
    return "\n".join(parts) + "\n"


def formatted(text: str) -> str:
    ruff = Path(sys.executable).with_name("ruff")
    command = [str(ruff), "format", "--stdin-filename", str(STUB), "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


def main() -> int:
    """Exit status: 1 if --check found an outdated stub."""
    from kt_kernel import kt_kernel_ext

    current = formatted(stub(kt_kernel_ext))
    if "--check" in sys.argv[1:]:
        if STUB.read_text(encoding="utf-8") == current:
            return 0
        print(
            f"{STUB.name} differs from the extension: run python scripts/extension_stub.py", file=sys.stderr
        )
        return 1
    STUB.write_text(current, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
