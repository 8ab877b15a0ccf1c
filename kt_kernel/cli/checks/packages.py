"""The Python packages: are they there, are they ours, and do they load?"""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import re
import sys

from kt_kernel.cli import environment
from kt_kernel.cli.checks.finding import Finding, Status
from kt_kernel.cli.errors import CommandError
from kt_kernel.cli.machine import native_extension
from kt_kernel.cli.version import installed_version

OLDEST_PYTHON = (3, 11)

# Libraries of the system that the extension is linked with, and the packages that bring them.
_SYSTEM_PACKAGES = {"libhwloc": "libhwloc15 (Debian, Ubuntu), hwloc-libs (Fedora, SUSE), hwloc (Arch)"}


def python_version() -> Finding:
    """The interpreter is one that the pinned packages support."""
    seen = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info < OLDEST_PYTHON:
        return Finding(Status.FAIL, seen, "use Python {}.{} or newer".format(*OLDEST_PYTHON))
    return Finding(Status.OK, seen)


def package() -> Finding:
    """The distribution called kt-kernel is this project's: PyPI has another one of that name."""
    foreign = environment.foreign_distributions()
    if foreign:
        return Finding(
            Status.FAIL,
            f"another project's package of the name kt-kernel is installed in {foreign[0]}",
            f"run {sys.executable} -m pip uninstall kt-kernel, then {environment.advice_for_build()}; never "
            "pip install -U kt-kernel, which takes PyPI's",
        )
    version = installed_version(environment.DISTRIBUTION)
    if version == "not installed":
        return Finding(Status.FAIL, "this package is not installed", environment.advice_for_build())
    maker = "install.sh's environment" if environment.made_by_install_sh() else "an environment of your own"
    return Finding(Status.OK, f"kt-kernel {version}, this project's, in {maker}", detail=sys.prefix)


def extension() -> Finding:
    """The native extension loads."""
    try:
        native = native_extension()
    except CommandError as error:
        return _why_it_does_not_load(error)
    return Finding(Status.OK, f"{len(native.METHODS)} methods", detail=", ".join(native.METHODS))


def _why_it_does_not_load(error: CommandError) -> Finding:
    cause = str(error.__cause__ or error)
    missing = re.search(r"(lib[\w+-]+)\.so[.\d]*: cannot open shared object file", cause)
    if missing is not None:
        package_names = _SYSTEM_PACKAGES.get(missing[1], f"the one that brings {missing[1]}")
        return Finding(
            Status.FAIL,
            f"the system's library {missing[0].partition(':')[0]} is missing",
            f"install the package {package_names}",
        )
    if "No module named" in cause:
        return Finding(Status.FAIL, "it is not compiled for this Python", environment.advice_for_build())
    return Finding(Status.FAIL, cause, environment.advice_for_build())


def torch_build() -> Finding:
    """torch imports, and what it can compute on."""
    import torch

    place = "CPU only"
    if torch.cuda.is_available():
        place = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    elif torch.version.cuda is not None:
        place = f"built for CUDA {torch.version.cuda}, which finds no GPU here: works on the CPU"
    return Finding(Status.OK, f"{torch.__version__}, {place}")


def sglang_package() -> Finding:
    """SGLang is there, in the version whose code the plug-in hooks into."""
    seen = installed_version("sglang")
    if seen == environment.SGLANG_VERSION:
        return Finding(Status.OK, seen)
    wanted = f"SGLang is {seen}, but the plug-in is made for {environment.SGLANG_VERSION}"
    return Finding(Status.FAIL, wanted, environment.advice_for_sglang())


def plugin_registered() -> Finding:
    """SGLang will find this package's plug-in, and it can be imported."""
    ours = [
        entry
        for entry in importlib.metadata.entry_points(group=environment.PLUGIN_GROUP)
        if entry.value == environment.PLUGIN
    ]
    if not ours:
        return Finding(
            Status.FAIL, f"no entry point in {environment.PLUGIN_GROUP}", environment.advice_for_build()
        )
    importlib.import_module(ours[0].module)
    return Finding(Status.OK, ours[0].value)
