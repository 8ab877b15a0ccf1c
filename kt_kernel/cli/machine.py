"""What `kt run` must know about this machine."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from kt_kernel.cli.errors import CommandError

_CPU_SHIMS = "kt_sglang_cpu_shims"  # third_party/: installed exactly where SGLang has to do without a GPU


@dataclass(frozen=True)
class Machine:
    """Compute threads to use, NUMA nodes that have cores for us, and which SGLang is installed."""

    threads: int
    numa_nodes: list[int]
    cpu_installation: bool
    """SGLang was installed without its GPU stack (`./install.sh` found no GPU, or was told --cpu)."""


def this_machine() -> Machine:
    """Topology as the extension sees it, cpuset and cgroup limits included.

    One thread per physical core: two threads of a core share the vector units that the kernels saturate.

    Raises:
        CommandError: the extension is not built.
    """
    topology = native_extension().topology()
    threads = topology["physical_cores"]
    if topology["cpu_quota"] is not None:
        threads = min(threads, max(1, int(topology["cpu_quota"])))
    nodes = [node["node"] for node in topology["numa_nodes"] if node["cores"]]
    return Machine(threads, nodes, importlib.util.find_spec(_CPU_SHIMS) is not None)


def native_extension():
    """The module `kt_kernel.kt_kernel_ext`.

    Raises:
        CommandError: it is not built, or cannot be loaded.
    """
    try:
        from kt_kernel import kt_kernel_ext
    except ImportError as error:
        raise CommandError(
            f"The native extension cannot be loaded ({error}): run ./install.sh build"
        ) from error
    return kt_kernel_ext
