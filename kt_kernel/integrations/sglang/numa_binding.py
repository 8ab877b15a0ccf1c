"""SGLang's own NUMA binding: off, unless the user asked for it.

By default SGLang binds each scheduler to the node of its GPU where numactl is installed. Threads, staging
buffers and page cache of that process would then all be on that node, while the engine's pools keep the
experts on all nodes. Placement is the engine's business.
"""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger(__name__)


def leave_to_engine(options: Any) -> None:
    """For this process and the schedulers it starts, which inherit its environment.

    `options`: SGLang's. Both of SGLang's ways to bind, numactl and libnuma, look at the variable set here.
    """
    from sglang.srt.environ import envs

    if envs.SGLANG_AUTO_NUMA_BIND.is_set() or _asked_for(options, envs):
        return
    envs.SGLANG_AUTO_NUMA_BIND.set(False)
    logger.info(
        "SGLang's binding of each scheduler to one NUMA node is turned off: the CPU experts decide where "
        "their threads and memory are; give --numa-node, or set SGLANG_AUTO_NUMA_BIND=1, to bind all the same"
    )


def _asked_for(options: Any, envs: Any) -> bool:
    """By SGLang's flag, or by the variable that chooses numactl, set to true."""
    numactl = envs.SGLANG_NUMA_BIND_V2
    return options.numa_node is not None or (numactl.is_set() and numactl.get())
