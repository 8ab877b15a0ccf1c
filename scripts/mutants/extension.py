"""The extension with some sources compiled anew: those, and the objects of the last build for all others."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

_MODULE = "kt_kernel_ext"


class Build:
    """The last build of the sources at `root`: commands, objects, and what these were linked with."""

    def __init__(self, root: Path) -> None:
        found = sorted(root.glob("build/*/compile_commands.json"), key=lambda path: path.stat().st_mtime)
        if not found:
            raise FileNotFoundError(
                f"{root / 'build'} has no compile_commands.json; expected a build (./install.sh build)"
            )
        self._root = root
        self._folder = found[-1].parent
        entries = json.loads(found[-1].read_text())
        self._commands = {str(Path(entry["file"]).relative_to(root / "csrc")): entry for entry in entries}
        libraries = re.search(r"LINK_LIBRARIES = (.*)", (self._folder / "build.ninja").read_text())
        self._libraries = shlex.split(libraries[1]) if libraries else []

    def link(self, tree: Path, sources: Iterable[str], extension: Path) -> None:
        """Writes `extension`, with `sources` compiled from tree/csrc."""
        objects = {name: entry["output"] for name, entry in self._commands.items()}
        compiler = shlex.split(next(iter(self._commands.values()))["command"])[0]
        with tempfile.TemporaryDirectory(dir=tree) as folder:
            for place, name in enumerate(sources):
                objects[name] = f"{folder}/{place}.o"
                self._compile(tree, name, objects[name])
            arguments = Path(folder) / "arguments"
            arguments.write_text("\n".join([*objects.values(), *self._libraries]))
            _run([compiler, "-shared", "-pthread", "-o", str(extension), f"@{arguments}"], self._folder)

    def _compile(self, tree: Path, source: str, to: str) -> None:
        entry = self._commands[source]
        words = [
            word.replace(str(self._root / "csrc"), str(tree / "csrc"))
            for word in shlex.split(entry["command"])
        ]
        words[words.index("-o") + 1] = to
        _run(words, entry["directory"])


def _run(words: list[str], folder: Path | str) -> None:
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(words)[:400]}: {done.stderr[-2000:]}")
