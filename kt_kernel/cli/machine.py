"""What `kt run` must know about this machine."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass

from kt_kernel.cli.errors import CommandError
from kt_kernel.threads import plan_threads

_CPU_SHIMS = "kt_sglang_cpu_shims"  # third_party/: installed exactly where SGLang has to do without a GPU


@dataclass(frozen=True)
class Machine:
    """Compute threads to use, and the NUMA nodes that have cores for us."""

    threads: int
    numa_nodes: list[int]


def this_machine() -> Machine:
    """Topology as the extension sees it, cpuset and cgroup limits included.

    Raises:
        CommandError: the extension is not built.
    """
    plan = plan_threads(native_extension().topology())
    return Machine(plan.threads, list(plan.numa_nodes))


def server_environment() -> dict[str, str]:
    """The environment for SGLang's commands.

    Where it was installed without its GPU stack, it is told so: a GPU may be there all the same (--cpu).
    """
    environment = dict(os.environ)
    if importlib.util.find_spec(_CPU_SHIMS) is not None:
        environment.setdefault("KT_SGLANG_CPU_SHIMS", "1")
    return environment


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
