"""`kt version`: the versions that matter in a bug report, read without importing the packages."""

from __future__ import annotations

import importlib.metadata
import platform

from kt_kernel.cli.machine import native_extension

_PACKAGES = ("torch", "sglang", "transformers")


def version_lines() -> list[str]:
    """One line per component: name and version."""
    lines = [f"kt-kernel {installed_version('kt-kernel')}"]
    try:
        lines.append(f"cpu variant {native_extension().cpu_features()['variant']}")
    except ValueError as error:
        lines.append(f"cpu variant unknown: {error}")
    lines += [f"{package} {installed_version(package)}" for package in _PACKAGES]
    lines.append(f"python {platform.python_version()} on {platform.platform()}")
    return lines


def installed_version(package: str) -> str:
    """The version of an installed distribution, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
