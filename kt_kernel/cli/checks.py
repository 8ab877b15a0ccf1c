"""The checks behind `kt doctor`: each looks at one thing and says what it saw.

A check never raises: whatever goes wrong is its finding.
"""

from __future__ import annotations

import enum
import importlib
import importlib.metadata
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

from kt_kernel.cli.machine import native_extension, server_environment, this_machine
from kt_kernel.cli.version import installed_version
from kt_kernel.errors import KTError
from kt_kernel.user_cache import cache_root

SGLANG_VERSION = "0.5.23"
PLUGIN_GROUP = "sglang.srt.plugins"
OLDEST_PYTHON = (3, 11)
SERVER_HELP_SECONDS = 180.0  # importing SGLang takes 10-30 s on two cores; a hang must still end

_GIB = 1 << 30


class Status(enum.Enum):
    """How a check ended; only FAIL makes `kt doctor` fail."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Finding:
    """What one check saw and, unless all is well, what to do about it; `detail` is for `kt doctor -v`."""

    status: Status
    seen: str
    advice: str = ""
    detail: str = ""


def python_version() -> Finding:
    """The interpreter is one that the pinned packages support."""
    seen = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info < OLDEST_PYTHON:
        return Finding(Status.FAIL, seen, "use Python {}.{} or newer".format(*OLDEST_PYTHON))
    return Finding(Status.OK, seen)


def extension() -> Finding:
    """The native extension loads and has kernels for this CPU."""
    native = native_extension()
    return Finding(
        Status.OK,
        f"kt-kernel {installed_version('kt-kernel')}, {len(native.METHODS)} methods",
        detail=", ".join(native.METHODS),
    )


def cpu_features() -> Finding:
    """The instruction sets in use; a cap through KT_KERNEL_CPU_VARIANT is worth a warning."""
    features = native_extension().cpu_features()
    seen, detail = features["variant"], " ".join(features["active"])
    if features["cap"]:
        advice = f"KT_KERNEL_CPU_VARIANT={features['cap']} hides faster kernels: unset it"
        return Finding(Status.WARN, seen, advice, detail)
    return Finding(Status.OK, seen, detail=detail)


def topology() -> Finding:
    """Cores and NUMA nodes this process may use."""
    facts = native_extension().topology()
    nodes = "; ".join(
        f"node {node['node']}: {len(node['cores'])} cores, {node['memory_bytes'] / _GIB:.0f} GiB"
        for node in facts["numa_nodes"]
    )
    quota = "" if facts["cpu_quota"] is None else f", limited to {facts['cpu_quota']:g} CPUs"
    return Finding(Status.OK, f"{facts['physical_cores']} physical cores{quota}; {nodes}")


def torch_build() -> Finding:
    """torch imports, and what it can compute on."""
    import torch

    place = "CPU only"
    if torch.cuda.is_available():
        place = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    return Finding(Status.OK, f"{torch.__version__}, {place}")


def sglang_package() -> Finding:
    """SGLang is there, in the version this package is tested with."""
    seen = installed_version("sglang")
    if seen == "not installed":
        return Finding(Status.FAIL, seen, "run ./install.sh deps")
    if seen != SGLANG_VERSION:
        return Finding(Status.WARN, seen, f"tested with {SGLANG_VERSION}: run ./install.sh deps")
    return Finding(Status.OK, seen)


def plugin_registered() -> Finding:
    """SGLang will find this package's plug-in, and it can be imported."""
    ours = [
        entry
        for entry in importlib.metadata.entry_points(group=PLUGIN_GROUP)
        if entry.module.partition(".")[0] == "kt_kernel"
    ]
    if not ours:
        return Finding(Status.FAIL, f"no entry point in {PLUGIN_GROUP}", "run ./install.sh build")
    importlib.import_module(ours[0].module)
    return Finding(Status.OK, ours[0].value)


def server_flags() -> Finding:
    """The real server command starts far enough to list this package's flags.

    `--kt-gpu-experts-ratio` is a flag stock SGLang does not have, so it proves that the plug-in ran.
    """
    command = [sys.executable, "-m", "sglang.launch_server", "--help"]
    try:
        done = subprocess.run(
            command,
            env=server_environment(),
            capture_output=True,
            text=True,
            timeout=SERVER_HELP_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Finding(Status.FAIL, f"no answer in {SERVER_HELP_SECONDS:.0f} s", f"try: {' '.join(command)}")
    if done.returncode != 0:
        last_line = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return Finding(
            Status.FAIL, f"exit status {done.returncode}: {last_line}", f"try: {' '.join(command)}"
        )
    if "--kt-gpu-experts-ratio" not in done.stdout:
        return Finding(Status.FAIL, "the server starts without the --kt flags", "run ./install.sh")
    return Finding(Status.OK, "the server lists the --kt flags")


def memory() -> Finding:
    """Main memory, which holds all expert weights."""
    with open("/proc/meminfo", encoding="ascii") as file:
        kib = {name: int(rest.split()[0]) for name, rest in (line.split(":", 1) for line in file)}
    available, total = kib["MemAvailable"] << 10, kib["MemTotal"] << 10
    seen = f"{available / _GIB:.1f} of {total / _GIB:.1f} GiB available"
    if available < 4 * _GIB:
        return Finding(Status.WARN, seen, "the demo needs about 4 GiB, a served model its file size and more")
    return Finding(Status.OK, seen)


def disk() -> Finding:
    """Room in the cache for the demo model."""
    directory = cache_root()
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    seen = f"{free / _GIB:.0f} GiB free for {directory}"
    if free < _GIB:
        return Finding(Status.WARN, seen, "the demo needs 0.4 GiB: free some, or set XDG_CACHE_HOME")
    return Finding(Status.OK, seen)


def demo_source() -> Finding:
    """The package with the demo's weights."""
    from kt_kernel.demo import DemoError, demo_checkpoint_path
    from kt_kernel.demo.gguf_source import find_source

    try:
        source = find_source()
    except DemoError as error:
        return Finding(Status.WARN, "kt run demo cannot work", str(error))
    target = demo_checkpoint_path(source)
    return Finding(Status.OK, f"{target} ({'built' if target.exists() else 'built on first use'})")


def expert_layer() -> Finding:
    """A real layer of each method and kind of activations, loaded and run, against exact arithmetic."""
    from kt_kernel.cli.forward_check import TOLERANCE_NMSE, check_layers

    results = check_layers(this_machine().threads)
    wrong = [result for result in results if not result.accepted]
    if wrong:
        seen = ", ".join(
            f"{result.method} with {result.activations} activations, {result.tokens} tokens: error "
            f"{result.nmse:.1e}"
            for result in wrong
        )
        promises = ", ".join(f"{limit:.0e} ({kind})" for kind, limit in TOLERANCE_NMSE.items())
        advice = f"the promise is {promises}: report this with the output of kt doctor -v and kt version"
        return Finding(Status.FAIL, seen, advice)
    errors = {
        kind: max((result.nmse for result in results if result.activations == kind), default=None)
        for kind in TOLERANCE_NMSE
    }
    methods = dict.fromkeys(result.method for result in results)
    largest = ", ".join(f"{error:.1e} ({kind})" for kind, error in errors.items() if error is not None)
    return Finding(Status.OK, f"{len(methods)} methods, largest errors {largest}", detail=", ".join(methods))


CHECKS: dict[str, Callable[[], Finding]] = {
    "python": python_version,
    "extension": extension,
    "cpu": cpu_features,
    "topology": topology,
    "torch": torch_build,
    "sglang": sglang_package,
    "plug-in": plugin_registered,
    "server": server_flags,
    "memory": memory,
    "disk": disk,
    "demo model": demo_source,
    "expert layer": expert_layer,
}


def run_check(check: Callable[[], Finding]) -> Finding:
    """The finding of one check; an exception is a failure with its message."""
    try:
        return check()
    except KTError as error:
        return Finding(Status.FAIL, str(error))
    except Exception as error:  # a broken installation can raise anything
        return Finding(Status.FAIL, f"{type(error).__name__}: {error}", "run ./install.sh")
