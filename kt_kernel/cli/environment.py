"""Which environment this interpreter belongs to, and so what to tell its user to run in it."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

DISTRIBUTION = "kt-kernel"
PLUGIN_GROUP = "sglang.srt.plugins"
PLUGIN = "kt_kernel.integrations.sglang.plugin:register"
SGLANG_VERSION = "0.5.23"


def made_by_install_sh() -> bool:
    """install.sh leaves its state beside the packages."""
    return (Path(sys.prefix) / "kt-install").is_dir()


def checkout() -> Path | None:
    """The source tree that this package runs from, where it was installed with `--editable`."""
    root = Path(__file__).resolve().parents[2]
    return root if (root / "install.sh").is_file() else None


def advice_for_sglang() -> str:
    """How to get the SGLang that the plug-in is made for into this environment."""
    if made_by_install_sh():
        return f"run ./install.sh deps in {Path(sys.prefix).parent}"
    return (
        f"{sys.prefix} was not made by install.sh: install SGLang {SGLANG_VERSION} into it as "
        "doc/install.md says, By hand"
    )


def advice_for_build() -> str:
    """How to compile and install this package into this environment."""
    if made_by_install_sh():
        return f"run ./install.sh build in {Path(sys.prefix).parent}"
    source = checkout() or "DIRECTORY_OF_THE_SOURCES"
    return f"run {sys.executable} -m pip install --no-deps --editable {source}"


def foreign_distributions() -> list[str]:
    """Where packages lie that call themselves kt-kernel and do not bring this package's plug-in.

    A project on PyPI has the name, and the folder `kt_kernel`, too.
    """
    return [
        str(found.locate_file(""))
        for found in importlib.metadata.distributions(name=DISTRIBUTION)
        if PLUGIN not in {entry.value for entry in found.entry_points.select(group=PLUGIN_GROUP)}
    ]
