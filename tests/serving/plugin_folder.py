"""A folder on Python's path in which SGLang finds a plug-in of a test."""

from __future__ import annotations

from pathlib import Path


def install_plugin(folder: Path, module: Path) -> dict[str, str]:
    """Copy `module`, which has a function `register`, to `folder`; returns the environment that finds it."""
    name = module.stem
    information = folder / f"{name}-1.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    (information / "entry_points.txt").write_text(f"[sglang.srt.plugins]\n{name} = {name}:register\n")
    (folder / module.name).write_text(module.read_text())
    return {"PYTHONPATH": str(folder)}
