"""The machine: instruction sets, cores, memory, disk, and the port that a server would take."""

from __future__ import annotations

import errno
import os
import shutil
import socket
from pathlib import Path

from kt_kernel.cli.checks.finding import Finding, Status
from kt_kernel.cli.machine import native_extension
from kt_kernel.cli.settings import configured
from kt_kernel.threads import usable_cores
from kt_kernel.user_cache import cache_root

_GIB = 1 << 30
_DEFAULT_PORT = 30000  # SGLang's
_DEMO_BYTES = 0.4 * _GIB
_SHARED_MEMORY = Path("/dev/shm")
_SHARED_BYTES = 64 << 20  # what a server's processes pass to each other, with room


def cpu_features() -> Finding:
    """The instruction sets in use; worth a warning are a cap, and tiles that are refused."""
    try:
        features = native_extension().cpu_features()
    except ValueError as error:
        asked = os.environ.get("KT_KERNEL_CPU_VARIANT")
        advice = "unset KT_KERNEL_CPU_VARIANT" if asked else "this CPU is too old for every kernel here"
        return Finding(Status.FAIL, str(error), advice)
    seen, detail = features["variant"], " ".join(features["active"])
    if features["cap"]:
        advice = f"KT_KERNEL_CPU_VARIANT={features['cap']} hides faster kernels: unset it"
        return Finding(Status.WARN, seen, advice, detail)
    if features["no_tiles"]:
        advice = "let the process have them: Linux 5.16 or newer, no filter (seccomp) on arch_prctl"
        return Finding(Status.WARN, f"{seen}, without the CPU's AMX: {features['no_tiles']}", advice, detail)
    return Finding(Status.OK, seen, detail=detail)


def topology() -> Finding:
    """Cores and NUMA nodes this process may use; with a single core nothing else can run beside it."""
    facts = native_extension().topology()
    nodes = "; ".join(
        f"node {node['node']}: {len(node['cores'])} cores, {node['memory_bytes'] / _GIB:.0f} GiB"
        for node in facts["numa_nodes"]
    )
    quota = "" if facts["cpu_quota"] is None else f", limited to {facts['cpu_quota']:g} CPUs"
    seen = f"{facts['physical_cores']} physical cores{quota}; {nodes}"
    affinity = len(os.sched_getaffinity(0))  # taskset: the threads of torch keep to it
    if min(usable_cores(facts), affinity) > 1:
        return Finding(Status.OK, seen)
    if facts["cpu_quota"] is not None and affinity > 1:
        limit = f"a control group grants {facts['cpu_quota']:g} CPUs"
        advice = "raise it: docker run --cpus, CPUQuota= of systemd, cpu.max of the cgroup"
    else:
        limit = "this process may use one core"
        advice = "raise it: docker run --cpuset-cpus, taskset, numactl, the machine's own size"
    return Finding(Status.WARN, f"{limit}: a server's processes share it ({seen})", advice)


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
    """Space in the cache for the demo model, and for what a server's processes share."""
    shared = _free(_SHARED_MEMORY)
    if shared is not None and shared < _SHARED_BYTES:
        return Finding(
            Status.FAIL,
            f"no space left in {_SHARED_MEMORY} ({shared >> 20} MiB), where a server's processes meet",
            f"remove what is left there, or enlarge it: docker run --shm-size, mount -o remount,size=1G "
            f"{_SHARED_MEMORY}",
        )
    directory = cache_root()
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    free = _free(existing) or 0
    if free < _DEMO_BYTES:
        return Finding(
            Status.FAIL,
            f"no space left for {directory}: {free / _GIB:.2f} GiB, the demo needs 0.4",
            "free some, or set XDG_CACHE_HOME",
        )
    return Finding(Status.OK, f"{free / _GIB:.0f} GiB free for {directory}")


def _free(directory: Path) -> int | None:
    try:
        return shutil.disk_usage(directory).free
    except FileNotFoundError:
        return None


def port() -> Finding:
    """The port that `kt run` would serve at is free; a server that runs there is no fault."""
    number = configured("port") or _DEFAULT_PORT
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
        try:
            probe.bind(("127.0.0.1", number))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            return Finding(
                Status.WARN,
                f"port {number} is taken{_by(number)}",
                f"stop that, or give kt run another one: --port {number + 1}",
            )
    return Finding(Status.OK, f"{number} is free")


def _by(number: int) -> str:
    """ " by process 12 (python)", as far as this user may know."""
    try:
        import psutil  # SGLang brings it along

        for connection in psutil.net_connections("tcp"):
            if connection.laddr and connection.laddr.port == number and connection.pid:
                return f" by process {connection.pid} ({psutil.Process(connection.pid).name()})"
    except Exception:  # a name is welcome, not needed
        pass
    return ""
